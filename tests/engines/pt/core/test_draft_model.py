"""A second model that drafts changes how many passes a text takes, and never the text."""

import random
from collections import Counter
from collections.abc import Sequence as ReadOnlySequence

import pytest
import torch
from transformers import PreTrainedModel

from serve_app.engines.pt.core.draft_model import DraftModel
from serve_app.engines.pt.core.engine_loop import EngineLoop
from serve_app.engines.pt.core.model_runner import BatchRunner
from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.scheduler import Limits, Scheduler
from serve_app.engines.pt.core.sequence import SamplingParams, Sequence
from serve_app.engines.pt.core.speculator import Speculator
from serve_app.model_fields import PT_QUANTIZATIONS
from serve_app.planning.pt_kv_buffers import cells
from tests.engines.pt.core.test_model_runner import FailingOnce
from tests.engines.pt.core.test_speculation import (
    CPU,
    KINDS,
    ROLLED_BACK,
    FreeTimes,
    MaybeLate,
    requests,
    run,
    told,
)
from tests.engines.pt.quantized_models import quantized_model
from tests.engines.pt.tiny_models import VOCABULARY, tiny_model

TOKENS = 4


def noisy(model: PreTrainedModel, share: float = 0.06) -> PreTrainedModel:
    """The model with other weights, by such a share of their size. It often chooses the same token."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += share * parameter.std(correction=0) * torch.randn_like(parameter)
    return model


class Restless(Speculator):
    """Drafts in every step in which the drafter can, whatever that costs, but for one plain step in a row of them."""

    def __init__(self, runner: BatchRunner, drafter: DraftModel):
        super().__init__(runner, drafter, FreeTimes())


def draft_of(model: PreTrainedModel, limits: Limits | None = None, longest: int = 256) -> DraftModel:
    """The drafter with this model, whose prompts come in small chunks."""
    return DraftModel(BatchRunner(model, CPU), limits or Limits(8, 10**6, chunk_tokens=48), TOKENS, longest)


@pytest.mark.parametrize(
    ("kind", "count"),
    [*((kind, count) for kind in KINDS for count in (1, 8)), pytest.param("greedy", 32, marks=pytest.mark.slow)],
)
def test_drafts_change_no_output(kind: str, count: int) -> None:
    """Whatever is asked for, in rows that join and leave. With a seed, the sampled text is the same too."""
    model = tiny_model("llama")
    plain = run(BatchRunner(model, CPU), requests(count, **KINDS[kind]))
    speculator = Restless(BatchRunner(model, CPU), draft_of(noisy(tiny_model("llama"))))
    drafted = run(speculator._runner, requests(count, **KINDS[kind]), speculator)  # type: ignore[arg-type]
    assert told(drafted) == told(plain)
    counts = speculator.counts
    assert counts.draft_tokens > 0
    if "bias" not in kind and count > 1:  # The draft does not know of a bias, and always guesses wrongly with it.
        assert counts.draft_tokens > counts.accepted_tokens > 0
    assert sum(counts.accepted_per_pos) == counts.accepted_tokens


@pytest.mark.parametrize("name", ROLLED_BACK)
def test_a_model_accepts_its_own_drafts(name: str) -> None:
    """With the model as its own draft nearly all tokens hold, after any number of joins and leaves, for every kind of
    attention. So the draft's cache has what it should have."""
    model = tiny_model(name)
    plain = run(BatchRunner(model, CPU), requests(12, texts=4))
    speculator = Restless(BatchRunner(model, CPU), draft_of(model))
    assert told(run(speculator._runner, requests(12, texts=4), speculator)) == told(plain)  # type: ignore[arg-type]
    counts = speculator.counts
    assert counts.draft_tokens > 100
    assert counts.accepted_tokens > 0.97 * counts.draft_tokens  # The rest was beyond an end token.


def test_a_draft_is_the_greedy_text_of_its_own_model() -> None:
    """Also of a model that mostly disagrees, after texts of which none, some or all tokens held, after steps without
    drafts, and for rows that come late."""
    draft = tiny_model("qwen2")
    drafter, alone = draft_of(draft), BatchRunner(draft, CPU)
    sequences = requests(5, texts=8, max_tokens=200, ignore_eos=True)
    checked, draw = Counter[str](), random.Random(3)
    with torch.inference_mode():
        for sequence in sequences:
            sequence.output_ids.append(len(sequence.prompt_ids))
        for step in range(40):
            present = sequences[: 2 + step // 8]
            able = drafter.able(present)
            counts = [draw.randint(0, TOKENS) if can else 0 for can in able]
            drafts = drafter.draft(present, counts) if any(counts) else [[] for _ in present]
            for sequence, tokens, count in zip(present, drafts, counts, strict=True):
                expected = run(alone, [Sequence(sequence.token_ids, SamplingParams(count, 0))]) if count else {}
                assert [tokens] * len(expected) == [list(s.output_ids) for s in expected]
                held = draw.randint(0, len(tokens))
                checked[f"{held} of {count}"] += 1
                sequence.output_ids += [*tokens[:held], draw.randrange(VOCABULARY)]
            if step % 7 == 6:  # More steps without drafts than a pass takes at once.
                for sequence in present:
                    sequence.output_ids += [1, 2, 3, 4, 5, 6, 7][: 7 - step % 3]
    assert {"0 of 4", "4 of 4", "2 of 4", "0 of 1", "1 of 1", "0 of 0"} <= checked.keys()


@pytest.mark.parametrize("first", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_out_of_memory_at_any_pass_of_either_model_changes_no_output(first: int) -> None:
    """The run is repeated for every fourth of the passes of both models, which fails; drafts rest afterwards."""
    model, draft = tiny_model("llama"), noisy(tiny_model("llama"))
    plain = run(BatchRunner(model, CPU), requests(6, texts=3))
    for failing in (model, draft):
        forward, at, calls = failing.forward, 10**9, 0
        while calls == 0 or at <= calls:
            speculator = Restless(BatchRunner(model, CPU), draft_of(draft))
            failing.forward = FailingOnce(forward, at)
            drafted = run(speculator._runner, requests(6, texts=3), speculator)  # type: ignore[arg-type]
            calls, at = (calls, at + 4) if calls else (failing.forward.calls, first)
            failing.forward = forward
            assert told(drafted) == told(plain)
        assert calls > 15


def test_a_draft_that_fails_otherwise_changes_no_output() -> None:
    """It is a bug of the draft model alone, so it rests, and no sequence is retried or given up."""
    model, draft = tiny_model("llama"), tiny_model("llama")
    plain = run(BatchRunner(model, CPU), requests(4, texts=3))

    def fails(**_: object) -> None:
        raise ValueError("no such shape")

    draft.forward = fails  # type: ignore[method-assign]
    speculator = Restless(BatchRunner(model, CPU), draft_of(draft))
    assert told(run(speculator._runner, requests(4, texts=3), speculator)) == told(plain)  # type: ignore[arg-type]
    assert speculator._resting > 0


def test_output_formats_hold_at_every_accepted_token() -> None:
    """The draft knows nothing of the format, so what it forbids is refused."""
    model = tiny_model("llama")

    def constrained() -> list[Sequence]:
        items = enumerate(requests(6, texts=6, max_tokens=30))
        return [Sequence(item.prompt_ids, SamplingParams(30, 0, grammar=MaybeLate(number))) for number, item in items]  # type: ignore[arg-type]

    plain = run(BatchRunner(model, CPU), constrained())
    speculator = Restless(BatchRunner(model, CPU), draft_of(model))
    assert told(run(speculator._runner, constrained(), speculator)) == told(plain)  # type: ignore[arg-type]
    assert 0 < speculator.counts.accepted_tokens < speculator.counts.draft_tokens


@pytest.mark.parametrize("budget", [700, 2000])
def test_the_drafts_buffers_never_exceed_the_budget(budget: int) -> None:
    """Rows for which they have no room get no drafts, and the answers are the same."""
    model = tiny_model("llama")
    limits = Limits(16, budget, chunk_tokens=48, cells=cells)
    fields = {"texts": 9, "max_tokens": 50, "ignore_eos": True}
    plain = run(BatchRunner(model, CPU), requests(30, **fields), limits=limits)  # type: ignore[arg-type]
    runner, drafter = BatchRunner(model, CPU), draft_of(model, limits)
    drafter._runner.max_cells = runner.max_cells = budget
    most, extend, prefill = 0, drafter._runner.extend, drafter._runner.prefill

    def noting(function: object) -> object:
        def noted(*arguments: object, **named: object) -> object:
            nonlocal most
            result = function(*arguments, **named)  # type: ignore[operator]
            most = max(most, drafter._runner._batch.cells + drafter._runner._group.cells)
            return result

        return noted

    drafter._runner.extend, drafter._runner.prefill = noting(extend), noting(prefill)  # type: ignore[method-assign,assignment]
    speculator = Restless(runner, drafter)
    drafted = run(runner, requests(30, **fields), speculator, limits=limits)  # type: ignore[arg-type]
    assert told(drafted) == told(plain)
    assert 0 < most <= budget
    assert speculator.counts.accepted_tokens > 100


def test_texts_beyond_the_drafts_context_get_no_drafts() -> None:
    """And those that reach it while they run lose theirs."""
    model = tiny_model("llama")
    plain = run(BatchRunner(model, CPU), requests(8, texts=2, max_tokens=60, ignore_eos=True))
    drafter = draft_of(model, longest=40)
    speculator = Restless(BatchRunner(model, CPU), drafter)
    extend, most = drafter._runner.extend, 0

    def noting(copies: ReadOnlySequence[Sequence], *arguments: object, **named: object) -> torch.Tensor:
        nonlocal most
        logits = extend(copies, *arguments, **named)  # type: ignore[arg-type]
        most = max(most, *(copy.cached for copy in copies))
        return logits

    drafter._runner.extend = noting  # type: ignore[method-assign]
    drafted = run(speculator._runner, requests(8, texts=2, max_tokens=60, ignore_eos=True), speculator)  # type: ignore[arg-type]
    assert told(drafted) == told(plain)
    assert 20 < most <= 40
    assert speculator.counts.accepted_tokens > 50


def test_nothing_is_left_of_sequences_that_have_ended() -> None:
    """Whether they ended while they were drafted for, or while their prompts waited for the draft."""
    model = tiny_model("llama")
    drafter = draft_of(model)
    speculator = Restless(BatchRunner(model, CPU), drafter)
    run(speculator._runner, requests(20, texts=5), speculator)  # type: ignore[arg-type]
    assert not drafter._rows
    assert not drafter._scheduler.sequences
    assert drafter._runner.cache_bytes == {}


def test_sampled_tokens_keep_their_distribution() -> None:
    """A chi-square test of 6,000 draws of the token after the first one, which was drafted, from the text's exact
    distribution: the sum over all first tokens. The draft mostly disagrees with what is drawn."""
    model, prompt, draws = tiny_model("llama"), [3, 1, 4], 6000
    with torch.inference_mode():
        first = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
        texts = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
        expected = draws * (first[:, None] * model(input_ids=texts).logits[:, -1].softmax(-1)).sum(0)
    rows = Limits(64, 10**6)
    speculator = Restless(BatchRunner(model, CPU), draft_of(noisy(tiny_model("llama")), rows))
    scheduler, sequences = Scheduler(rows), [Sequence(prompt, SamplingParams(3, ignore_eos=True)) for _ in range(draws)]
    loop = EngineLoop(speculator._runner, scheduler, Sampler(frozenset()), lambda _: None, speculator)
    for sequence in sequences:
        scheduler.add(sequence)
    with torch.inference_mode():
        while scheduler.sequences:
            loop._step()
    seen = torch.bincount(torch.tensor([s.output_ids[1] for s in sequences]), minlength=VOCABULARY)
    assert float(expected.min()) > 5
    assert float(((seen - expected) ** 2 / expected).sum()) < 144.6  # 96 degrees of freedom, 1 in 1,000
    counts = speculator.counts
    assert counts.drafts > draws / 2
    assert 0.005 < counts.accepted_tokens / counts.draft_tokens < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("method", PT_QUANTIZATIONS)
def test_a_quantised_model_drafts_for_the_whole_one(method: str) -> None:
    """Its drafts hold often, and the answers stay those of whole weights."""
    model = tiny_model("llama")
    plain = run(BatchRunner(model, CPU), requests(8, texts=4, max_tokens=40))
    speculator = Restless(BatchRunner(model, CPU), draft_of(quantized_model("llama", method)))
    assert told(run(speculator._runner, requests(8, texts=4, max_tokens=40), speculator)) == told(plain)  # type: ignore[arg-type]
    assert speculator.counts.accepted_tokens > 20
