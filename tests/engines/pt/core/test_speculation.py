"""Speculation changes how many passes a text takes, and never the text."""

import random
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlySequence
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from serve_app.engines.pt.core.engine_loop import EngineLoop
from serve_app.engines.pt.core.kv_cache import BatchCache
from serve_app.engines.pt.core.model_runner import BatchRunner
from serve_app.engines.pt.core.ngram import TokenArray, continuation, look_up
from serve_app.engines.pt.core.ngram_drafter import NgramDrafter, NgramSettings
from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.scheduler import Limits, Scheduler, Step
from serve_app.engines.pt.core.sequence import Output, SamplingParams, Sequence
from serve_app.engines.pt.core.speculator import Speculator
from serve_app.engines.pt.core.step_times import StepTimes
from serve_app.engines.pt.load.probe import probe, verifier
from serve_app.planning.pt_kv_buffers import cells
from tests.engines.pt.core.test_model_runner import FailingOnce, loaded
from tests.engines.pt.tiny_models import CONFIGS, JOINED, VOCABULARY, tiny_model

CPU = torch.device("cpu")
SETTINGS = NgramSettings(num_speculative_tokens=4, prompt_lookup_max=3, prompt_lookup_min=1)
ROLLED_BACK = [name for name in JOINED if name not in ("qwen3-next", "mamba2")]
EOS = 5


class FreeTimes(StepTimes):
    """Drafted tokens cost nothing, so every draft is computed."""

    def ratio(self, rows: int, more: int) -> float | None:
        """As long as without them."""
        return 1.0


class Oracle(Speculator):
    """Drafts what the text will be, of which some tokens are made wrong, with random lengths."""

    def __init__(self, runner: BatchRunner, future: dict[tuple[int, ...], list[int]], wrong: float, seed: int = 0):
        super().__init__(runner, NgramDrafter(SETTINGS), FreeTimes())
        self._future, self._wrong, self._draw = future, wrong, random.Random(seed)
        self.passes = 0

    def propose(self, sequences: ReadOnlySequence[Sequence], spare: int) -> list[list[int]] | None:
        """Within the bounds of the real one, which are asked first."""
        bounded = super().propose([replace_text(sequence) for sequence in sequences], spare)
        if bounded is None:
            return None
        drafts = []
        for sequence, bound in zip(sequences, bounded, strict=True):
            done = len(sequence.output_ids)
            text = self._future[tuple(sequence.prompt_ids)][done : done + self._draw.randint(0, len(bound))]
            drafts.append([self._draw.randrange(VOCABULARY) if self._draw.random() < self._wrong else t for t in text])
        self.passes += 1
        return drafts if any(drafts) else None


def replace_text(sequence: Sequence) -> Sequence:
    """The same lengths with one token everywhere, for which there is always a draft of the full length."""
    same = Sequence([1] * len(sequence.prompt_ids), sequence.params, output_ids=[1] * len(sequence.output_ids))
    same.cached = sequence.cached
    return same


def requests(count: int, texts: int = 0, **params: object) -> list[Sequence]:
    """Sequences with prompts of 2 to 30 tokens and 1 to 40 tokens to generate."""
    draw = random.Random(texts)
    return [
        Sequence(
            [draw.randrange(VOCABULARY) for _ in range(draw.randint(2, 30))],
            SamplingParams(**{"max_tokens": draw.randint(1, 40), "temperature": 0} | params),  # type: ignore[arg-type]
        )
        for _ in range(count)
    ]


def run(
    runner: BatchRunner,
    sequences: list[Sequence],
    speculator: Speculator | None = None,
    rows: int = 8,
    limits: Limits | None = None,
) -> dict[Sequence, list[Output]]:
    """Runs the engine's own loop in this thread, two newcomers a step; returns all outputs of each."""
    outputs: dict[Sequence, list[Output]] = {sequence: [] for sequence in sequences}
    scheduler = Scheduler(limits or Limits(rows, 10**6, chunk_tokens=48))
    loop = EngineLoop(
        runner,
        scheduler,
        Sampler(frozenset({EOS})),
        lambda step: [outputs[o.sequence].append(o) for o in step] and None,
        speculator,
    )
    waiting = list(sequences)
    with torch.inference_mode():
        while not all(items and items[-1].is_last for items in outputs.values()):
            for newcomer in waiting[:2]:
                scheduler.add(newcomer)
            del waiting[:2]
            loop._look_at_parked()
            loop._step()
    return outputs


def told(outputs: dict[Sequence, list[Output]]) -> list[list[tuple[object, ...]]]:
    """What the clients get of each sequence, in order. Log probabilities are rounded."""
    return [
        [
            (
                o.token_id,
                o.finish_reason,
                str(o.error),
                o.logprobs and (round(o.logprobs.logprob, 3), [t for t, _ in o.logprobs.top]),
            )
            for o in items
        ]
        for items in outputs.values()
    ]


def future_of(outputs: dict[Sequence, list[Output]]) -> dict[tuple[int, ...], list[int]]:
    """The text that follows each prompt."""
    return {tuple(sequence.prompt_ids): list(sequence.output_ids) for sequence in outputs}


KINDS: dict[str, dict[str, object]] = {
    "greedy": {},
    "log probabilities": {"logprobs": 2},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "bias and least length": {"logit_bias": {7: 3.0, EOS: 2.0}, "min_tokens": 6},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "seed": 11},
    "sampled with penalties": {"temperature": 0.7, "top_k": 8, "frequency_penalty": 0.4, "seed": 3, "logprobs": 1},
    "past the end": {"ignore_eos": True},
}


@pytest.mark.parametrize("count", [1, 8, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_change_no_output(kind: str, count: int) -> None:
    """Right and wrong drafts of different lengths in the rows of one pass, for rows that join and leave, whatever is
    asked for. With a seed, the sampled text is the same too."""
    model = tiny_model("llama")
    plain = run(BatchRunner(model, CPU), requests(count, **KINDS[kind]))
    runner = BatchRunner(model, CPU)
    oracle = Oracle(runner, future_of(plain), wrong=0.2)
    drafted = run(runner, requests(count, **KINDS[kind]), oracle)
    assert told(drafted) == told(plain)
    counts = oracle.counts
    assert counts.draft_tokens > counts.accepted_tokens > 0
    assert counts.accepted_per_pos == sorted(counts.accepted_per_pos, reverse=True)
    assert sum(counts.accepted_per_pos) == counts.accepted_tokens


@pytest.mark.parametrize("name", ROLLED_BACK)
def test_every_kind_of_attention_is_rolled_back(name: str) -> None:
    """Sliding windows, ALiBi, learned positions, compressed caches and experts: after any number of refused tokens."""
    model = tiny_model(name)
    plain = run(BatchRunner(model, CPU), requests(8, texts=4))
    for wrong in (0.0, 0.3, 1.0):
        runner = BatchRunner(model, CPU)
        oracle = Oracle(runner, future_of(plain), wrong)
        assert told(run(runner, requests(8, texts=4), oracle)) == told(plain)
        assert oracle.passes > 5


@pytest.mark.parametrize("count", [1, 8, 32])
def test_looked_up_drafts_change_no_output_and_save_passes(count: int) -> None:
    """Random weights repeat themselves when they are greedy, so many drafts hold."""
    model = tiny_model("qwen2")
    sequences = requests(count, texts=2, max_tokens=60, ignore_eos=True)
    plain = run(BatchRunner(model, CPU), sequences)
    runner = BatchRunner(model, CPU)
    speculator = Speculator(runner, NgramDrafter(SETTINGS), FreeTimes())
    drafted = run(runner, requests(count, texts=2, max_tokens=60, ignore_eos=True), speculator)
    assert told(drafted) == told(plain)
    assert speculator.counts.accepted_tokens > 20 * count


def test_drafts_are_verified_over_a_device_map(tmp_path: Path) -> None:
    """A layer on the disk comes and goes in every pass, and its cache stays where it computes."""
    model = tiny_model("llama")
    plain = run(BatchRunner(model, CPU), requests(8, texts=4))
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk", dtype=torch.float32
    ).eval()
    assert spread.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    runner = BatchRunner(spread, CPU)
    oracle = Oracle(runner, future_of(plain), wrong=0.3)
    assert told(run(runner, requests(8, texts=4), oracle)) == told(plain)
    assert oracle.passes > 5


@pytest.mark.parametrize("name", CONFIGS)
def test_a_load_finds_out_whether_drafts_can_be_verified(name: str) -> None:
    """A state has all tokens in it, and a model that runs alone has no cache."""
    model = loaded(tiny_model(name))
    probed = probe(model)
    found = verifier(model, probed)
    if name in ROLLED_BACK:
        assert found is probed.runner
    else:
        reason = "it runs one request at a time" if name == "mamba" else "its cache has states"
        assert str(found).startswith(reason)


def test_a_model_that_verifies_wrongly_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes one token too few back, and one whose pass over several tokens fails."""
    model = loaded(tiny_model("llama"))
    roll_back = BatchCache.roll_back

    def too_few(cache: BatchCache, tokens: list[int], lengths: list[int]) -> None:
        roll_back(cache, [max(0, count - 1) for count in tokens], lengths)

    monkeypatch.setattr(BatchCache, "roll_back", too_few)
    assert "drafted tokens got other logits" in str(verifier(model, probe(model)))

    def fails(*_: object) -> None:
        raise ValueError("no such shape")

    monkeypatch.setattr(BatchCache, "roll_back", fails)
    assert str(verifier(model, probe(model))) == "verifying drafts failed: ValueError: no such shape"


class MaybeLate:
    """A format that allows the tokens of one residue after each token, and whose masks are late now and then."""

    def __init__(self, seed: int = 0) -> None:
        self._draw = random.Random(seed)
        self.first_mask = self._mask(0)
        self.problem, self.mask, self.was_late, self._is_there = None, self.first_mask, False, True

    @staticmethod
    def _mask(residue: int) -> bytes:
        words = numpy.zeros(-(-VOCABULARY // 32), dtype=numpy.uint32)
        for token in range(VOCABULARY):
            if token % 3 != residue:
                words[token // 32] |= numpy.uint32(1 << token % 32)
        return words.tobytes()

    def matcher(self) -> "MaybeLate":
        """The grammar's part of it."""
        return self

    def accept(self, token: int) -> None:
        """The next mask, which may come later."""
        self.mask = self._mask(token % 3)
        self._is_there = self._draw.random() < 0.7

    def is_ready(self, until: float) -> bool:
        """It is there when it is asked for again."""
        is_there, self._is_there = self._is_there, True
        return is_there

    def close(self) -> None:
        """Nothing to end."""


def test_output_formats_hold_at_every_accepted_token() -> None:
    """Also if a mask is late in the middle of a draft, which parks nobody, or at its beginning, which does."""
    model = tiny_model("llama")

    def constrained(count: int) -> list[Sequence]:
        return [
            Sequence(item.prompt_ids, replace(item.params, grammar=MaybeLate(number)))  # type: ignore[arg-type]
            for number, item in enumerate(requests(count, texts=6, max_tokens=30))
        ]

    plain = run(BatchRunner(model, CPU), constrained(6))
    runner = BatchRunner(model, CPU)
    oracle = Oracle(runner, future_of(plain), wrong=0.1)
    drafted = run(runner, constrained(6), oracle)
    assert told(drafted) == told(plain)
    assert oracle.counts.accepted_tokens > 20
    for sequence in drafted:
        pairs = zip(sequence.output_ids, sequence.output_ids[1:], strict=False)
        assert all(one % 3 != other % 3 for one, other in pairs)


@pytest.mark.parametrize("first", [1, 3])
def test_out_of_memory_at_any_pass_changes_no_output(first: int) -> None:
    """The run is repeated for every fourth of its passes, which fails; drafts rest afterwards."""
    model = tiny_model("llama")
    plain = run(BatchRunner(model, CPU), requests(8, texts=3))
    forward, at, calls = model.forward, first, 10**9
    while calls >= at:
        runner = BatchRunner(model, CPU)
        model.forward = FailingOnce(forward, at)
        drafted = run(runner, requests(8, texts=3), Oracle(runner, future_of(plain), wrong=0.2))
        calls, model.forward = model.forward.calls, forward
        assert told(drafted) == told(plain)
        at += 4
    assert at > 20


@pytest.mark.parametrize("place", [0, 1, 2])
def test_out_of_memory_while_choosing_loses_no_token(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a draft that were chosen before are delivered."""
    model = tiny_model("llama")
    plain = run(BatchRunner(model, CPU), requests(3, texts=3, max_tokens=20, ignore_eos=True))
    runner, failed = BatchRunner(model, CPU), []
    oracle = Oracle(runner, future_of(plain), wrong=0.0)
    sample, verify, since = Sampler.sample, oracle.verify, [99]

    def counted(*arguments: object) -> torch.Tensor:
        since[0] = -1
        return verify(*arguments)  # type: ignore[arg-type]

    def failing(self: Sampler, sequences: list[Sequence], logits: torch.Tensor) -> object:
        since[0] += 1
        if since[0] == place and not failed:
            failed.append(place)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(self, sequences, logits)

    monkeypatch.setattr(oracle, "verify", counted)
    monkeypatch.setattr(Sampler, "sample", failing)
    drafted = run(runner, requests(3, texts=3, max_tokens=20, ignore_eos=True), oracle)
    assert failed
    assert told(drafted) == told(plain)


class FailingDrafts(BatchRunner):
    """It has no memory for more than one token in a row."""

    def verify(self, *_: object) -> torch.Tensor:
        """Raises."""
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_sequence_alone_survives_drafts_that_never_fit() -> None:
    """It is tried again without a draft, and not given up."""
    model = tiny_model("llama")
    plain = run(BatchRunner(model, CPU), requests(1, max_tokens=30))
    runner = FailingDrafts(model, CPU)
    assert told(run(runner, requests(1, max_tokens=30), Oracle(runner, future_of(plain), 0.0))) == told(plain)


@pytest.mark.parametrize("budget", [500, 2000])
def test_the_buffers_never_exceed_the_budget(budget: int) -> None:
    """Drafts have room in what the scheduler has counted for the rows."""
    model = tiny_model("llama")
    runner = BatchRunner(model, CPU)
    runner.max_cells = budget
    limits = Limits(16, budget, chunk_tokens=48, cells=cells)
    most = 0
    logits = runner._logits

    def noting(*arguments: object, **named: object) -> torch.Tensor:
        nonlocal most
        result = logits(*arguments, **named)  # type: ignore[arg-type]
        most = max(most, runner._batch.cells + runner._group.cells)
        return result

    runner._logits = noting  # type: ignore[method-assign]
    speculator = Speculator(runner, NgramDrafter(SETTINGS), FreeTimes())
    run(runner, requests(40, texts=9, max_tokens=50, ignore_eos=True), speculator, limits=limits)
    assert 0 < most <= budget
    assert speculator.counts.accepted_tokens > 100


def test_drafted_tokens_share_the_budget_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the prompts of the same step and all that fills rows up, a pass has no more than a chunk and the rows."""
    model = tiny_model("llama")
    runner = BatchRunner(model, CPU)
    chunk, passes = 24, []
    extend, prefill = runner._extend, runner.prefill

    def noting(tokens: ReadOnlySequence[ReadOnlySequence[int]], *more: object) -> torch.Tensor:
        passes.append((len(tokens), len(tokens) * max(map(len, tokens))))
        return extend(tokens, *more)  # type: ignore[arg-type]

    prompts = [0]

    def chunked(step: Step) -> torch.Tensor | None:
        prompts[0] = len(step.prefill) * (step.end - step.begin)
        return prefill(step)

    monkeypatch.setattr(runner, "_extend", noting)
    monkeypatch.setattr(runner, "prefill", chunked)
    run(
        runner,
        requests(20, texts=1, max_tokens=30, ignore_eos=True),
        Speculator(runner, NgramDrafter(SETTINGS), FreeTimes()),
        limits=Limits(8, 10**6, chunk_tokens=chunk),
    )
    assert max(tokens - rows for rows, tokens in passes) > 0
    assert all(tokens - rows <= chunk for rows, tokens in passes)


class FixedLogits:
    """A model with the same logits at every place."""

    def __init__(self, logits: torch.Tensor):
        self._logits = logits

    def prefill(self, step: Step) -> torch.Tensor | None:
        """Whole prompts only."""
        return self.decode(step.prefill)

    def decode(self, sequences: ReadOnlySequence[Sequence]) -> torch.Tensor:
        """One row for each."""
        return self._logits.repeat(len(sequences), 1)

    def verify(self, sequences: ReadOnlySequence[Sequence], drafts: ReadOnlySequence[list[int]]) -> torch.Tensor:
        """One place for each token."""
        return self._logits.repeat(len(sequences), 1 + max(map(len, drafts)), 1)

    def keep(self, tokens: object) -> None:
        """There is no cache."""

    def drop(self, sequence: Sequence) -> None:
        """There is no cache."""


@pytest.mark.parametrize("drafted", [0, 3])
def test_sampled_tokens_keep_their_distribution(drafted: int) -> None:
    """A chi-square test of 6,000 tokens that were drafted, and of those after them. A likely and an unlikely draft."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, 0.0, -1.0, 0.5, 0.2])
    runner = FixedLogits(logits)

    class Always(Speculator):
        def propose(self, sequences: ReadOnlySequence[Sequence], spare: int) -> list[list[int]] | None:
            return [[drafted] * max(0, 2 - len(sequence.output_ids)) for sequence in sequences]

    speculator = Always(runner, NgramDrafter(SETTINGS), FreeTimes())  # type: ignore[arg-type]
    sequences = [Sequence([number], SamplingParams(3, seed=number)) for number in range(6000)]
    scheduler = Scheduler(Limits(64, 10**9))
    loop = EngineLoop(runner, scheduler, Sampler(), lambda _: None, speculator)  # type: ignore[arg-type]
    for sequence in sequences:
        scheduler.add(sequence)
    with torch.inference_mode():
        while scheduler.sequences:
            loop._step()
    expected = 6000 * logits.softmax(-1)
    for place in (1, 2):
        tokens = torch.tensor([sequence.output_ids[place] for sequence in sequences])
        seen = torch.bincount(tokens, minlength=8)
        assert float(((seen - expected) ** 2 / expected).sum()) < 24.3  # 7 degrees of freedom, 1 in 1,000
    share = speculator.counts.accepted_per_pos[0] / speculator.counts.drafts
    assert share == pytest.approx(float(logits.softmax(-1)[drafted]), abs=0.03)


@pytest.mark.parametrize(
    ("text", "longest", "shortest", "place"),
    [
        ([1, 2, 3, 9, 1, 2], 3, 1, 2),
        ([1, 2, 3, 9, 2], 3, 2, None),  # One token is too short a match.
        ([7, 2, 5, 1, 2, 6, 8, 2, 4, 1, 2], 3, 1, 5),  # The longer match comes before the later one.
        ([1, 2, 3, 1, 2, 4, 1, 2], 3, 1, 5),  # Of equal matches, the later one.
        ([1], 3, 1, None),
        ([1, 2, 3], 3, 1, None),
        ([4, 4, 4, 4], 3, 2, 3),
    ],
)
def test_the_longest_match_is_found(text: list[int], longest: int, shortest: int, place: int | None) -> None:
    """And the latest of them."""
    assert look_up(numpy.array(text, dtype=numpy.int32), longest, shortest) == place


def test_look_up_agrees_with_a_plain_search() -> None:
    """On random texts of few tokens."""
    draw = random.Random(1)
    for _ in range(500):
        text = [draw.randrange(3) for _ in range(draw.randint(1, 30))]
        longest = draw.randint(1, 6)
        shortest = draw.randint(1, longest)
        expected = next(
            (
                end
                for size in range(longest, shortest - 1, -1)
                for end in range(len(text) - 1, size - 1, -1)
                if text[end - size : end] == text[len(text) - size :]
            ),
            None,
        )
        assert look_up(numpy.array(text, dtype=numpy.int32), longest, shortest) == expected, (text, longest, shortest)


def test_a_draft_repeats_what_ends_with_the_text() -> None:
    """A period goes on."""
    ids = numpy.array([9, 1, 2, 1, 2], dtype=numpy.int32)
    assert continuation(ids, 3, 5) == [1, 2, 1, 2, 1]


def test_the_array_follows_the_sequence() -> None:
    """Token by token, and several at once."""
    sequence = Sequence([1, 2], SamplingParams(max_tokens=5))
    array = TokenArray(sequence)
    for more in ([], [3], [4, 5], [6, 7]):
        sequence.output_ids += more
        assert array.ids().tolist() == sequence.token_ids


def pay(per_token: float, text: ReadOnlySequence[int], rows: int, steps: int = 200) -> float:
    """The share of steps with drafts if a step takes 1 s and each drafted token `per_token` more, for rows of one
    text, of which each draft holds."""
    speculator = Speculator(None, NgramDrafter(SETTINGS))  # type: ignore[arg-type]
    sequences = [Sequence(text, SamplingParams(max_tokens=10**4)) for _ in range(rows)]
    for sequence in sequences:
        sequence.output_ids.append(text[0])
    drafted = 0
    for _ in range(steps):
        drafts = speculator.propose(sequences, 512)
        if drafts is None:
            speculator.note_plain(rows, 1.0)
            continue
        drafted += 1
        for sequence, draft in zip(sequences, drafts, strict=True):
            sequence.output_ids += [*draft, 1]
        speculator.note_drafted(
            sequences,
            drafts,
            {sequence: len(draft) + 1 for sequence, draft in zip(sequences, drafts, strict=True)},
            1 + per_token * rows * max(map(len, drafts)),
        )
    return drafted / steps


def test_it_drafts_while_that_pays_and_stops_where_it_does_not() -> None:
    """With cheap tokens nearly always, and with dear ones only to measure them."""
    assert pay(0.05, [1] * 20, rows=1) > 0.9
    assert pay(0.05, [1] * 20, rows=8) > 0.9
    assert pay(0.05, [1] * 20, rows=32) < 0.05
    assert pay(2.0, [1] * 20, rows=1) < 0.05


def test_a_time_that_was_measured_in_a_bad_moment_is_measured_again() -> None:
    """Steps without drafts took 10 s while something else ran, and take 1 s now; with drafts, 6 s for 5 tokens."""
    speculator = Speculator(None, NgramDrafter(SETTINGS))  # type: ignore[arg-type]
    sequence = Sequence([1] * 20, SamplingParams(max_tokens=10**5), output_ids=[1])
    for _ in range(10):
        speculator.note_plain(1, 10.0)
    drafted = []
    for _ in range(1000):
        drafts = speculator.propose([sequence], 512)
        drafted.append(drafts is not None)
        if drafts is None:
            speculator.note_plain(1, 1.0)
            continue
        sequence.output_ids += [*drafts[0], 1]
        speculator.note_drafted([sequence], drafts, {sequence: len(drafts[0]) + 1}, 6.0)
    assert drafted[0]
    assert sum(drafted) < 30


@pytest.mark.parametrize(
    ("rows", "cost", "holds", "least"),
    [
        (1, 0.08, 0.95, 2.0),  # A token more costs little for one reader.
        (1, 0.08, 0.0, 0.95),
        (32, 0.8, 0.9, 0.95),  # Where the processor computes all the time, five tokens take nearly five times as long.
        (32, 0.8, 0.0, 0.95),
        (32, 1.2, 0.9, 0.95),
        (32, 0.05, 0.9, 2.0),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_it_pays_though_other_work_holds_steps_up(
    rows: int, cost: float, holds: float, least: float, seed: int
) -> None:
    """Tokens for the time that steps take by themselves, against that without drafts, over 2,000 steps.

    A drafted token in each row makes a step by `cost` longer. The measured times have bursts of other work, in which
    all takes up to six times as long. New texts come every 60 steps.
    """
    draw = random.Random(seed)
    speculator = Speculator(None, NgramDrafter(SETTINGS))  # type: ignore[arg-type]
    taken, tokens, burst, left = 0.0, 0, 1.0, 0
    sequences: list[Sequence] = []
    for step in range(2000):
        if step % 60 == 0:
            sequences = [Sequence([1] * 20, SamplingParams(max_tokens=10**4), output_ids=[1]) for _ in range(rows)]
        if not left:
            burst, left = draw.choice([1.0, 1.0, draw.uniform(1, 6)]), draw.randint(5, 100)
        left -= 1
        drafts = speculator.propose(sequences, 512)
        if drafts is None:
            taken, tokens = taken + 1, tokens + rows
            for sequence in sequences:
                sequence.output_ids.append(1)
            speculator.note_plain(rows, burst * draw.uniform(1, 1.1))
            continue
        own_s = 1 + cost * max(map(len, drafts))
        got = {}
        for sequence, draft in zip(sequences, drafts, strict=True):
            held = next((n for n in range(len(draft)) if draw.random() >= holds), len(draft))
            got[sequence] = held + 1
            sequence.output_ids += [*draft[:held], 1 if held == len(draft) else 2]
        speculator.note_drafted(sequences, drafts, got, own_s * burst * draw.uniform(1, 1.1))
        for sequence in sequences:  # The text goes on as if it had been repeated, so there is a draft again.
            sequence.output_ids[-1] = 1
            sequence.drafting.tokens = TokenArray(sequence)
        taken, tokens = taken + own_s, tokens + sum(got.values())
    assert tokens / rows / taken > least


def test_a_text_that_does_not_repeat_itself_is_left_alone() -> None:
    """Drafts that never hold take less than 3 % of the time, and a text that begins to repeat itself is noticed."""
    speculator = Speculator(None, NgramDrafter(SETTINGS))  # type: ignore[arg-type]
    sequence = Sequence([1] * 20, SamplingParams(max_tokens=10**4), output_ids=[1])

    def steps(count: int, accepted: Callable[[int], int]) -> tuple[int, float]:
        drafted, more_s = 0, 0.0
        for _ in range(count):
            drafts = speculator.propose([sequence], 512)
            if drafts is None:
                speculator.note_plain(1, 1.0)
                continue
            drafted, more_s = drafted + 1, more_s + 0.1 * len(drafts[0])
            held = accepted(len(drafts[0]))
            sequence.output_ids[-held - 1 :] = [*drafts[0][:held], 2]
            speculator.note_drafted([sequence], drafts, {sequence: held + 1}, 1 + 0.1 * len(drafts[0]))
            sequence.output_ids[-1] = 1
            sequence.drafting.tokens = TokenArray(sequence)
        return drafted, more_s

    assert steps(1000, lambda _: 0)[1] < 0.03 * 1000
    assert steps(300, lambda length: length)[0] > 150


def test_positions_stay_within_those_of_the_model() -> None:
    """Positions of what fills rows up stay within those that the model knows: GPT-2's table ends at 256."""
    model: PreTrainedModel = tiny_model("gpt2")
    prompts = [[3, 4] * 124, [5, 6, 7]]
    params = [SamplingParams(max_tokens=7, temperature=0), SamplingParams(max_tokens=40, temperature=0)]

    def both() -> list[Sequence]:
        return [Sequence(prompt, item) for prompt, item in zip(prompts, params, strict=True)]

    plain = run(BatchRunner(model, CPU), both())
    runner = BatchRunner(model, CPU)
    assert told(run(runner, both(), Oracle(runner, future_of(plain), 0.0))) == told(plain)
