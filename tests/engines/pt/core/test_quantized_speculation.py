"""Speculation with quantised weights gives the answers of the same quantised model's `generate`."""

from collections.abc import Callable
from functools import cache

import pytest
from transformers import PreTrainedModel

from serve_app.engines.pt.core.model_runner import BatchRunner
from serve_app.engines.pt.core.scheduler import Limits
from serve_app.engines.pt.core.sequence import Sequence
from serve_app.engines.pt.core.speculator import Speculator
from serve_app.model_fields import PT_QUANTIZATIONS
from tests.engines.pt.core.test_draft_model import Restless, draft_of
from tests.engines.pt.core.test_model_runner import FailingOnce
from tests.engines.pt.core.test_speculation import CPU, ROLLED_BACK, Oracle, requests, run
from tests.engines.pt.load.test_quantization import assert_equal
from tests.engines.pt.quantized_models import quantized_model
from tests.engines.pt.tiny_models import generate_one, tiny_model

LIMITS = Limits(32, 10**6, chunk_tokens=48)
MakeSpeculator = Callable[[PreTrainedModel, BatchRunner, list[Sequence]], Speculator | None]


@cache
def quantized_once(name: str, method: str) -> PreTrainedModel:
    """The model of one name, which several tests ask."""
    return quantized_model(name, method)


def by_oracle(model: PreTrainedModel, runner: BatchRunner, sequences: list[Sequence]) -> Oracle:
    """Drafts that are right and wrong, of different lengths in the rows of a pass."""
    future = {tuple(s.prompt_ids): generate_one(model, tuple(s.prompt_ids), s.params.max_tokens) for s in sequences}
    return Oracle(runner, future, wrong=0.2)


def by_draft(model: PreTrainedModel, runner: BatchRunner, _: list[Sequence]) -> Speculator:
    """Drafts of the whole model for the quantised one, which mostly hold."""
    return Restless(runner, draft_of(tiny_model("llama"), LIMITS))


WAYS: dict[str, MakeSpeculator] = {"none": lambda *_: None, "oracle": by_oracle, "draft": by_draft}


def check(
    model: PreTrainedModel,
    method: str,
    count: int,
    make: Callable[[PreTrainedModel, BatchRunner, list[Sequence]], Oracle],
) -> Oracle:
    """Runs so many requests, and compares each with `generate`."""
    runner, sequences = BatchRunner(model, CPU), requests(count, texts=5, ignore_eos=True)
    limits = Limits(32, 10**6, chunk_tokens=48, pad_prompts=runner.pad_prompts)
    speculator = make(model, runner, sequences)
    outputs = run(runner, sequences, speculator, limits=limits)
    for sequence, items in outputs.items():
        assert all(output.error is None for output in items)
        expected = generate_one(model, tuple(sequence.prompt_ids), sequence.params.max_tokens)
        assert_equal(model, method, list(sequence.prompt_ids), sequence.output_ids, expected)
    return speculator


@pytest.mark.slow
@pytest.mark.parametrize("method", PT_QUANTIZATIONS)
@pytest.mark.parametrize("name", ROLLED_BACK)
def test_answers_with_drafts_equal_generate(name: str, method: str) -> None:
    """One request, and several that join and leave, 32 of them for one architecture. Without drafts,
    `test_joined_answers_equal_generate` asks for the same."""
    model = quantized_once(name, method)
    for count in (1, 32 if name == "llama" else 8):
        counts = check(model, method, count, by_oracle).counts
        assert counts.draft_tokens > counts.accepted_tokens > 0


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", PT_QUANTIZATIONS)
def test_out_of_memory_at_any_forward_of_quantised_weights(method: str, way: str) -> None:
    """The run of 4 requests is repeated for every fifth of the model's passes, which fails."""
    model = quantized_once("llama", method)
    forward, at, calls = model.forward, 10**9, 0
    while calls == 0 or at <= calls:
        runner, sequences = BatchRunner(model, CPU), requests(4, texts=3, ignore_eos=True)
        speculator = WAYS[way](model, runner, sequences)
        failing = FailingOnce(forward, at)
        model.forward = failing  # type: ignore[method-assign]
        try:
            outputs = run(runner, sequences, speculator, limits=LIMITS)
        finally:
            model.forward = forward  # type: ignore[method-assign]
        calls, at = (calls, at + 5) if calls else (failing.calls, 2)
        for sequence, items in outputs.items():
            assert all(output.error is None for output in items)
            expected = generate_one(model, tuple(sequence.prompt_ids), sequence.params.max_tokens)
            assert_equal(model, method, list(sequence.prompt_ids), sequence.output_ids, expected)
    assert calls > 10
