"""The engine's thread: what ends, what goes on."""

import itertools
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ReadOnlySequence
from contextlib import contextmanager

import pytest
import torch

from serve_app.engines.pt.core import engine_thread
from serve_app.engines.pt.core.engine_loop import EngineLoop
from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.scheduler import Limits, Scheduler, Step
from serve_app.engines.pt.core.sequence import Output, SamplingParams, Sequence
from serve_app.errors import EngineError, InvalidRequest

EOS = 0


class CountingRunner:
    """A model whose next token is always the last one plus one; `fail` may raise for a sequence."""

    def __init__(self, fail: Callable[[Sequence], None] = lambda _: None):
        self._fail = fail
        self.dropped: list[Sequence] = []

    def prefill(self, step: Step) -> torch.Tensor | None:
        """Whole prompts only."""
        return self.decode(step.prefill)

    def decode(self, sequences: ReadOnlySequence[Sequence]) -> torch.Tensor:
        """Logits with one maximum."""
        for sequence in sequences:
            self._fail(sequence)
        last = torch.tensor([sequence.token_ids[-1] for sequence in sequences])
        return torch.nn.functional.one_hot((last + 1) % 10, 10).float()

    def drop(self, sequence: Sequence) -> None:
        """Remembers it."""
        self.dropped.append(sequence)

    def drop_prompts(self) -> None:
        """There is no cache."""

    def reset(self) -> None:
        """There is no cache."""


@contextmanager
def running(runner: CountingRunner, max_num_seqs: int = 8) -> Iterator[tuple[EngineLoop, "queue.Queue[Output]"]]:
    """A started loop and its outputs."""
    outputs: queue.Queue[Output] = queue.Queue()
    scheduler = Scheduler(Limits(max_num_seqs, max_cache_tokens=10**12))
    loop = EngineLoop(
        runner, scheduler, Sampler(frozenset({EOS})), lambda step: [outputs.put(o) for o in step] and None
    )
    loop.start()
    try:
        yield loop, outputs
    finally:
        loop.stop(timeout_s=10)
        assert not loop.is_alive()


def sequence(start: int, max_tokens: int = 100, ignore_eos: bool = False) -> Sequence:
    """A greedy sequence that counts up from `start`."""
    return Sequence([start], SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=ignore_eos))


def until_the_end(outputs: "queue.Queue[Output]", count: int = 1) -> list[Output]:
    """All outputs until `count` sequences have ended."""
    seen = []
    while count:
        output = outputs.get(timeout=10)
        seen.append(output)
        count -= output.is_last
    return seen


def test_a_sequence_ends_at_eos_or_at_its_length() -> None:
    """The end token is counted; `ignore_eos` goes past it."""
    with running(CountingRunner()) as (loop, outputs):
        loop.submit(sequence(7))
        assert [(o.token_id, o.finish_reason) for o in until_the_end(outputs)] == [(8, None), (9, None), (0, "stop")]
        loop.submit(sequence(7, max_tokens=2))
        assert [o.finish_reason for o in until_the_end(outputs)] == [None, "length"]
        loop.submit(sequence(9, max_tokens=3, ignore_eos=True))
        assert [o.token_id for o in until_the_end(outputs)] == [0, 1, 2]


def test_sequences_advance_together() -> None:
    """A long one does not hold a short one back."""
    with running(CountingRunner()) as (loop, outputs):
        long, short = sequence(1, max_tokens=10**9, ignore_eos=True), sequence(5, max_tokens=2)
        loop.submit(long)
        loop.submit(short)
        assert until_the_end(outputs)[-1].sequence is short
        loop.cancel(long)


def test_an_error_ends_the_sequence_at_fault_and_no_other() -> None:
    """Neither those that were running, nor those of the same pass, nor those that come later."""

    def fail(which: Sequence) -> None:
        if list(which.prompt_ids) == [3]:
            raise RuntimeError("broken prompt")

    with running(CountingRunner(fail)) as (loop, outputs):
        good, bad, beside = sequence(1, max_tokens=10**9, ignore_eos=True), sequence(3), sequence(7)
        loop.submit(good)
        outputs.get(timeout=10)
        loop.submit(bad)
        loop.submit(beside)
        ends = {o.sequence: o for o in until_the_end(outputs, 2) if o.is_last}
        assert str(ends[bad].error) == "broken prompt"
        assert ends[beside].finish_reason == "stop"
        loop.submit(sequence(8))
        assert until_the_end(outputs)[-1].finish_reason == "stop"
        loop.cancel(good)


def test_an_error_among_the_running_ends_the_one_at_fault() -> None:
    """The others go on with the tokens that they have."""

    def fail(which: Sequence) -> None:
        if list(which.prompt_ids) == [2] and which.output_ids:
            raise RuntimeError("broken row")

    with running(CountingRunner(fail)) as (loop, outputs):
        rows = {start: sequence(start, max_tokens=40, ignore_eos=True) for start in (1, 2, 3)}
        for row in rows.values():
            loop.submit(row)
        ends = {o.sequence: o for o in until_the_end(outputs, 3) if o.is_last}
        assert str(ends[rows[2]].error) == "broken row"
        for start in (1, 3):
            assert ends[rows[start]].finish_reason == "length"
            assert rows[start].output_ids == [(start + 1 + number) % 10 for number in range(40)]


def test_an_error_in_sampling_ends_its_row_alone() -> None:
    """Whatever raises it: here a parameter that no check has seen."""
    with running(CountingRunner()) as (loop, outputs):
        good = sequence(1, max_tokens=30, ignore_eos=True)
        params = SamplingParams(max_tokens=5, temperature="hot")  # type: ignore[arg-type]
        bad = Sequence([1], params)
        loop.submit(good)
        loop.submit(bad)
        ends = {o.sequence: o for o in until_the_end(outputs, 2) if o.is_last}
        assert isinstance(ends[bad].error, TypeError)
        assert ends[good].finish_reason == "length"
        assert good.output_ids == [(2 + number) % 10 for number in range(30)]


class LateMatcher:
    """A matcher of which every mask is late until `open` is set; then each is there."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.problem: InvalidRequest | None = None
        self.mask: bytes | None = None
        self.closed = False
        self.was_late = False
        self.accepted: list[int] = []

    def matcher(self) -> "LateMatcher":
        """The grammar's part of it."""
        return self

    def accept(self, token: int) -> None:
        """Every mask allows every token."""
        self.accepted.append(token)

    def is_ready(self, until: float) -> bool:
        """At once, or not at all."""
        return self.open.is_set() or bool(self.problem)

    def close(self) -> None:
        """The sequence has ended."""
        self.closed = True


def late_sequence() -> tuple[LateMatcher, Sequence]:
    """A sequence of eight tokens whose format takes its time after the first."""
    matcher = LateMatcher()
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, grammar=matcher)  # type: ignore[arg-type]
    return matcher, Sequence([1], params)


def test_nobody_waits_for_a_slow_format() -> None:
    """Its sequence is parked, with its place free for others, and goes on where it was."""
    runner = CountingRunner()
    with running(runner, max_num_seqs=1) as (loop, outputs):
        matcher, slow = late_sequence()
        loop.submit(slow)
        assert outputs.get(timeout=10).sequence is slow
        fast = sequence(8)
        loop.submit(fast)
        assert [o.sequence for o in until_the_end(outputs)] == [fast, fast]
        assert runner.dropped == [slow, fast]
        matcher.open.set()
        assert until_the_end(outputs)[-1].finish_reason == "length"
        assert slow.output_ids == [2, 3, 4, 5, 6, 7, 8, 9]
        assert matcher.closed


def test_a_parked_sequence_hears_of_its_formats_end_and_can_be_cancelled() -> None:
    """It needs no place for that."""
    with running(CountingRunner()) as (loop, outputs):
        matcher, slow = late_sequence()
        loop.submit(slow)
        outputs.get(timeout=10)
        matcher.problem = InvalidRequest("It takes too long.")
        assert str(until_the_end(outputs)[-1].error) == "It takes too long."
        other, cancelled = late_sequence()
        loop.submit(cancelled)
        outputs.get(timeout=10)
        loop.cancel(cancelled)
        loop.submit(sequence(8))
        until_the_end(outputs)
        assert other.closed


@pytest.mark.parametrize("tokens", [4, 5])
def test_no_mask_is_asked_for_after_the_last_token(tokens: int) -> None:
    """Nobody would read it, and it would take the room of those that are read: at the limit, and at the end token."""
    matcher = LateMatcher()
    matcher.open.set()
    params = SamplingParams(max_tokens=tokens, temperature=0, grammar=matcher)  # type: ignore[arg-type]
    whole = Sequence([5], params)
    with running(CountingRunner()) as (loop, outputs):
        loop.submit(whole)
        until_the_end(outputs)
    assert (whole.output_ids[-1] == EOS, matcher.accepted) == (tokens == 5, whole.output_ids[:-1])


def test_texts_get_a_token_between_any_two_chunks_of_other_prompts() -> None:
    """Two clients that ask for vectors of many inputs take half of the passes, not all of them."""
    passes: list[str] = []

    class NotingRunner(CountingRunner):
        def prefill(self, step: Step) -> torch.Tensor | None:
            passes.append("prompts" if step.pools else "text")
            return torch.zeros(len(step.prefill), 2) if step.pools else super().decode(step.prefill)

        def decode(self, sequences: ReadOnlySequence[Sequence]) -> torch.Tensor:
            passes.append("token")
            return super().decode(sequences)

    with running(NotingRunner(), max_num_seqs=2) as (loop, outputs):
        text = sequence(1, max_tokens=10**9, ignore_eos=True)
        loop.submit(text)
        outputs.get(timeout=10)
        params = SamplingParams(max_tokens=0)
        for number in range(40):
            loop.submit(Sequence([1] * 500, params, owner=number % 2, pools=True))
        until_the_end(outputs, 40)
        loop.cancel(text)
    prompts = [place for place, name in enumerate(passes) if name == "prompts"]
    assert len(prompts) >= 40
    assert all("token" in passes[one:other] for one, other in itertools.pairwise(prompts))


def test_a_loop_that_hangs_says_how_long() -> None:
    """And one without work does not, however long it has had none."""
    hold = threading.Event()

    def fail(which: Sequence) -> None:
        if list(which.prompt_ids) == [3]:
            hold.wait(30)

    with running(CountingRunner(fail)) as (loop, outputs):
        loop.submit(sequence(8))
        until_the_end(outputs)
        time.sleep(0.2)
        assert loop.stuck_s == 0
        loop.submit(sequence(3))
        deadline = time.monotonic() + 10
        while loop.stuck_s < 0.3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 0.3 <= loop.stuck_s < 10
        hold.set()
        until_the_end(outputs)


def test_a_cancelled_sequence_frees_its_place() -> None:
    """With one place, the next runs as soon as the first is cancelled, and nothing more comes of the first."""
    runner = CountingRunner()
    with running(runner, max_num_seqs=1) as (loop, outputs):
        endless, next_one = sequence(1, max_tokens=10**9, ignore_eos=True), sequence(8)
        loop.submit(endless)
        outputs.get(timeout=10)
        loop.submit(next_one)
        loop.cancel(endless)
        while outputs.get(timeout=10).sequence is endless:
            pass
        assert all(output.sequence is next_one for output in until_the_end(outputs))
        assert runner.dropped[0] is endless


def test_stopping_tells_those_that_are_left() -> None:
    """Nobody waits for ever."""
    with running(CountingRunner()) as (loop, outputs):
        loop.submit(sequence(1, max_tokens=10**9, ignore_eos=True))
        outputs.get(timeout=10)
        loop.stop(timeout_s=10)
        last = until_the_end(outputs)[-1]
        assert isinstance(last.error, EngineError)


def test_who_hears_of_the_end_finds_it_ended() -> None:
    """While the thread still tells the others: the router asks for the health of an engine as soon as one says so."""

    def breaks(_: Sequence) -> None:
        raise torch.AcceleratorError("the device is broken")

    seen: list[tuple[bool, bool]] = []
    scheduler = Scheduler(Limits(max_num_seqs=1, max_cache_tokens=10**12))
    loop = EngineLoop(
        CountingRunner(breaks), scheduler, Sampler({EOS}), lambda _: seen.append((loop.has_ended, loop.is_alive()))
    )
    loop.start()
    loop.submit(sequence(1))
    loop.join(10)
    assert seen == [(True, True)]


def test_an_idle_loop_gives_memory_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not between steps, and not again while nothing comes; then again after the next work."""
    given: list[int] = []
    monkeypatch.setattr(engine_thread, "IDLE_S", 0.05)
    monkeypatch.setattr(engine_thread, "trim_heap", lambda: given.append(1))
    with running(CountingRunner()) as (loop, outputs):
        wait_for(lambda: len(given) == 1)
        time.sleep(0.2)
        assert len(given) == 1
        loop.submit(sequence(start=0, max_tokens=5))
        until_the_end(outputs)
        wait_for(lambda: len(given) == 2)
        time.sleep(0.2)
        assert len(given) == 2


def wait_for(happens: Callable[[], bool]) -> None:
    """Waits for at most 10 s, since a machine may be slow."""
    deadline = time.monotonic() + 10
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_free_pages_of_the_heap_go_back() -> None:
    """100 MB in pieces too small for pages of their own, with one left at the end: glibc keeps all of it."""
    script = """
import psutil
from serve_app.engines.pt.core.heap import trim_heap
held = [bytes(100_000) for _ in range(1000)]
last = held.pop()
held.clear()
before = psutil.Process().memory_info().rss
trim_heap()
print((before - psutil.Process().memory_info().rss) // 10**6)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=50)
    assert int(told.stdout) > 50
