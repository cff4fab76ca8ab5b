"""Joined sequences get the same answers as `generate` gives one by one, for every kind of attention."""

import gc
import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel

from serve_app.engines.pt.core.engine_loop import EngineLoop
from serve_app.engines.pt.core.model_runner import BatchRunner, Runner, SerialRunner
from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.scheduler import Limits, Scheduler, Step
from serve_app.engines.pt.core.sequence import Output, SamplingParams, Sequence
from serve_app.engines.pt.load.model_loader import LoadedModel
from serve_app.engines.pt.load.probe import probe
from serve_app.engines.torch_internals import is_out_of_memory
from serve_app.planning.pt_kv_buffers import cells
from tests.engines.pt.tiny_models import CONFIGS, JOINED, VOCABULARY, generate_one, tiny_model

CPU = torch.device("cpu")
# Logits closer than this are a tie, which rounding may decide either way.
TIE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    """Takes what has been imported out of the collections that follow an allocator's error, each of 0.4 s."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def loaded(model: PreTrainedModel) -> LoadedModel:
    """As the loader returns it, without a tokenizer."""
    return LoadedModel(model, None, CPU, 256, frozenset(), {}, None)  # type: ignore[arg-type]


def requests(count: int, seed: int = 0) -> list[Sequence]:
    """Greedy sequences with prompts of 1 to 30 tokens and 1 to 24 tokens to generate."""
    draw = random.Random(seed)
    return [
        Sequence(
            [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 30))],
            SamplingParams(max_tokens=draw.randint(1, 24), temperature=0),
        )
        for _ in range(count)
    ]


def run_all(runner: Runner, sequences: list[Sequence], rows: int = 8, pad: bool = True) -> list[Output]:
    """Runs the engine's own loop in this thread, two newcomers a step; returns the last output of each."""
    ends: list[Output] = []
    scheduler = Scheduler(Limits(rows, 10**6, chunk_tokens=24, pad_prompts=pad))
    loop = EngineLoop(runner, scheduler, Sampler(), lambda outputs: ends.extend(o for o in outputs if o.is_last))
    waiting = list(sequences)
    with torch.inference_mode():
        while len(ends) < len(sequences):
            for newcomer in waiting[:2]:
                scheduler.add(newcomer)
            del waiting[:2]
            loop._step()
    return ends


def assert_greedy(model: PreTrainedModel, sequence: Sequence) -> None:
    """The output is what `generate` gives for the prompt alone; where it differs, there was a tie."""
    expected = generate_one(model, tuple(sequence.prompt_ids), sequence.params.max_tokens)
    if sequence.output_ids == expected:
        return
    first = next(
        place for place, pair in enumerate(zip(sequence.output_ids, expected, strict=True)) if len(set(pair)) > 1
    )
    ids = torch.tensor([[*sequence.prompt_ids, *expected[:first]]])
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]
    assert abs(float(logits[expected[first]] - logits[sequence.output_ids[first]])) < TIE, (
        f"token {first}: {sequence.output_ids} instead of {expected}"
    )


@pytest.mark.parametrize("count", [1, 8, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", JOINED)
def test_joined_answers_equal_generate(name: str, count: int) -> None:
    """Rows join and leave at every step, prompts come in chunks, and nobody's answer changes."""
    model = tiny_model(name)
    result = probe(loaded(model))
    assert result.reason == ""
    sequences = requests(count)
    assert all(output.error is None for output in run_all(result.runner, sequences, pad=result.pad_prompts))
    for sequence in sequences:
        assert_greedy(model, sequence)


def test_a_model_that_cannot_be_joined_is_found_out_and_still_right() -> None:
    """Mamba forgets the first chunk of a prompt: in chunks, it would answer wrongly without an error."""
    model = tiny_model("mamba")
    result = probe(loaded(model))
    assert isinstance(result.runner, SerialRunner)
    assert "joined" in result.reason
    sequences = requests(3)
    run_all(result.runner, sequences, rows=1)
    for sequence in sequences:
        assert_greedy(model, sequence)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next"])
def test_a_row_that_leaves_does_not_disturb_the_others(name: str) -> None:
    """Cancelled in the prompt or while running, in the middle or at the end of the batch."""
    model = tiny_model(name)
    runner = BatchRunner(model, CPU)
    sequences = requests(12, seed=5)
    leaving = {sequences[1], sequences[4], sequences[10]}
    scheduler = Scheduler(Limits(8, 10**6, chunk_tokens=16, pad_prompts=runner.pad_prompts))
    ends: list[Output] = []
    loop = EngineLoop(runner, scheduler, Sampler(), lambda outputs: ends.extend(o for o in outputs if o.is_last))
    for sequence in sequences:
        scheduler.add(sequence)
    with torch.inference_mode():
        for step in range(1000):
            if step in (1, 3, 6):
                loop._drop([leaving.pop()])
            if not scheduler.sequences:
                break
            loop._step()
    for output in ends:
        assert output.error is None
        assert_greedy(model, output.sequence)
    assert len(ends) >= 9


class FailingOnce:
    """A model's forward that is out of memory at one call, as the CPU allocator says it."""

    def __init__(self, forward: Callable[..., object], at: int):
        self._forward = forward
        self._at = at
        self.calls = 0

    def __call__(self, *args: object, **kwargs: object) -> object:
        """The forward pass."""
        self.calls += 1
        if self.calls == self._at:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
            )
        return self._forward(*args, **kwargs)


@pytest.mark.parametrize("first", [1, *(pytest.param(first, marks=pytest.mark.slow) for first in (2, 3, 4))])
def test_out_of_memory_at_any_forward_changes_no_answer(first: int) -> None:
    """16 requests; the run is repeated for every fourth of its forward passes, which fails."""
    model = tiny_model("llama")
    forward = model.forward
    for at in itertools.count(first, 4):
        sequences = requests(16, seed=3)
        runner = BatchRunner(model, CPU)
        model.forward = FailingOnce(forward, at)
        ends = run_all(runner, sequences)
        calls = model.forward.calls
        model.forward = forward
        assert all(output.error is None for output in ends)
        for sequence in sequences:
            assert_greedy(model, sequence)
        if calls < at:
            break
    assert at > 30


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next"])
@pytest.mark.parametrize("budget", [500, 2000, pytest.param(6000, marks=pytest.mark.slow)])
def test_the_buffers_never_exceed_the_budget(name: str, budget: int) -> None:
    """Not even while a layer is moved: its bytes stand twice then, and are counted twice at all times."""
    model = tiny_model(name)
    result = probe(loaded(model))
    runner = result.runner
    assert isinstance(runner, BatchRunner)
    runner.max_cells = budget
    limits = Limits(16, budget, chunk_tokens=24, pad_prompts=result.pad_prompts, cells=cells)
    scheduler, draw, sequences = Scheduler(limits), random.Random(7), []
    most = 0.0
    loop = EngineLoop(runner, scheduler, Sampler(), lambda _: None)
    with torch.inference_mode():
        for _ in range(300):
            if draw.random() < 0.3:
                prompt, tokens = draw.randint(1, 60), draw.randint(1, 60)
                sequences.append(Sequence([1] * prompt, SamplingParams(tokens, temperature=0)))
                scheduler.add(sequences[-1])
            loop._step()
            held = sum(runner.cache_bytes.values()) + sum(runner._batch.transient_bytes.values())
            most = max(most, held / sum(result.bytes_per_token.values()))
    assert 0 < most <= budget


def test_one_request_that_is_too_big_alone_gets_an_error_and_the_next_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only requests with more than 20 tokens fail, always."""
    model = tiny_model("llama")
    forward = model.forward

    def small_only(*args: object, **kwargs: object) -> object:
        if kwargs["input_ids"].shape[1] > 12:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)

    runner = BatchRunner(model, CPU)
    monkeypatch.setattr(model, "forward", small_only)
    params = SamplingParams(max_tokens=3, temperature=0)
    big, small = Sequence([1] * 30, params), Sequence([2] * 5, params)
    ends = {output.sequence: output for output in run_all(runner, [big, small])}
    monkeypatch.undo()
    assert "no memory for 30 tokens" in str(ends[big].error)
    assert_greedy(model, small)


def test_other_errors_are_not_taken_for_out_of_memory() -> None:
    """Both allocators' words are known, and nothing else."""
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))


def test_every_tiny_model_is_covered() -> None:
    """A kind of attention that is added is tested."""
    assert set(JOINED) | {"mamba"} == set(CONFIGS)


@pytest.mark.parametrize("name", JOINED)
def test_vectors_of_joined_prompts_are_those_of_one_pass(name: str) -> None:
    """Of several lengths, in chunks of 24 tokens, beside texts that are generated, with one that leaves in between."""
    model = tiny_model(name)
    runner = BatchRunner(model, CPU)
    draw = random.Random(3)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (40, 40, 33, 30, 5, 1)]
    params = SamplingParams(max_tokens=0)
    pooling = [Sequence(prompt, params, owner="vectors", pools=True) for prompt in prompts]
    ends = run_all(runner, [*pooling, *requests(4)], pad=runner.pad_prompts)
    vectors = {output.sequence: output.vector for output in ends if output.vector is not None}
    assert set(vectors) == set(pooling)
    for sequence in pooling:
        with torch.inference_mode():
            ids = torch.tensor([sequence.token_ids])
            states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        expected = torch.nn.functional.normalize(states.float().mean(0), dim=0)
        assert vectors[sequence] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_prompt_that_leaves_takes_its_sum_along() -> None:
    """The last row takes its place in the cache and in the sums."""
    model = tiny_model(JOINED[0])
    runner = BatchRunner(model, CPU)
    params = SamplingParams(max_tokens=0)
    gone, kept = (Sequence([token] * 20, params, pools=True) for token in (3, 5))
    with torch.inference_mode():
        assert runner.prefill(Step((gone, kept), 0, 10, 20)) is None
        runner.drop(gone)
        vectors = runner.prefill(Step((kept,), 10, 20, 20))
        assert vectors is not None
        alone = runner.prefill(Step((kept,), 0, 20, 20))
        assert alone is not None
    assert vectors.shape[0] == 1
    assert torch.allclose(vectors, alone, atol=1e-5)
