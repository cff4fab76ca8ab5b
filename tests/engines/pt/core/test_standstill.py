"""The engine's thread stands still while its memory is away: who waits, what is refused, and how it ends."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from serve_app.engines.pt.core.engine_loop import EngineLoop
from serve_app.engines.pt.core.memory_part import Tick
from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.scheduler import Limits, Scheduler, Step
from serve_app.engines.pt.core.sequence import Output, Sequence
from serve_app.errors import EngineError
from tests.engines.pt.core.test_engine_loop import CountingRunner, running, sequence, until_the_end


class Memory:
    """Memory that counts its moves; each may fail, or wait for `hold`."""

    def __init__(self, out: str = "", back: str = ""):
        self._failures = {"out": out, "back": back}
        self.hold = threading.Event()
        self.hold.set()
        self.moves: list[str] = []
        self.is_out = False

    def move_out(self, tick: Tick) -> None:
        """Frees it."""
        self._move("out", tick)

    def move_back(self, tick: Tick) -> None:
        """Brings it back."""
        self._move("back", tick)

    def _move(self, where: str, tick: Tick) -> None:
        tick()
        assert self.hold.wait(20)
        if self._failures[where]:
            raise EngineError(self._failures[where])
        self.is_out = where == "out"
        self.moves.append(where)


Loop = tuple[EngineLoop, "queue.Queue[Output]"]


@contextmanager
def busy(runner: CountingRunner) -> Iterator[Loop]:
    """A loop with an endless sequence, which is cancelled at the end."""
    with running(runner) as (loop, outputs):
        endless = sequence(1, max_tokens=10**9, ignore_eos=True)
        loop.submit(endless)
        outputs.get(timeout=10)
        yield loop, outputs
        loop.cancel(endless)


def quiet(outputs: "queue.Queue[Output]") -> bool:
    """Whether no output comes for a while."""
    while not outputs.empty():
        outputs.get()
    time.sleep(0.1)
    return outputs.empty()


def test_a_busy_loop_stands_still_and_goes_on() -> None:
    """Not one token comes while it is parked, none is missing afterwards, and it is not taken for stuck."""
    with running(CountingRunner()) as (loop, outputs):
        memory, text = Memory(), sequence(1, max_tokens=5_000, ignore_eos=True)
        loop.submit(text)
        outputs.get(timeout=10)
        loop.park(memory).result(10)
        assert (memory.moves, loop.is_parked) == (["out"], True)
        assert quiet(outputs)
        assert len(text.output_ids) < 5_000
        assert loop.stuck_s == 0
        loop.wake().result(10)
        assert (memory.moves, loop.is_parked) == (["out", "back"], False)
        until_the_end(outputs)
        assert text.output_ids == [(2 + number) % 10 for number in range(5_000)]


def test_an_idle_loop_parks_and_what_comes_meanwhile_waits() -> None:
    """Submits and cancels are seen at the wake."""
    runner = CountingRunner()
    with running(runner) as (loop, outputs):
        memory = Memory()
        for _ in range(3):
            loop.park(memory).result(10)
            kept, cancelled = sequence(8), sequence(8)
            loop.submit(kept)
            loop.submit(cancelled)
            loop.cancel(cancelled)
            assert quiet(outputs)
            loop.wake().result(10)
            assert {output.sequence for output in until_the_end(outputs)} == {kept}
        assert memory.moves == ["out", "back"] * 3


def test_what_makes_no_sense_is_refused() -> None:
    """A second park, a wake of an engine that is awake, and either while the other one is on its way."""
    with busy(CountingRunner()) as (loop, _):
        memory = Memory()
        with pytest.raises(EngineError, match="cannot wake now, because it is awake"):
            loop.wake()
        memory.hold.clear()
        asked = loop.park(memory)
        for ask in (lambda: loop.park(memory), loop.wake):
            with pytest.raises(EngineError, match="because it is parking"):
                ask()
        memory.hold.set()
        asked.result(10)
        with pytest.raises(EngineError, match="cannot park now, because it is parked"):
            loop.park(memory)
        loop.wake().result(10)
        assert memory.moves == ["out", "back"]


def test_a_move_that_hangs_can_be_told_from_one_that_waits() -> None:
    """Health goes by `stuck_s`, which counts while memory is moved and not while the engine is parked."""
    with running(CountingRunner()) as (loop, _):
        memory = Memory()
        memory.hold.clear()
        asked = loop.park(memory)
        time.sleep(0.3)
        assert loop.stuck_s >= 0.2
        memory.hold.set()
        asked.result(10)
        time.sleep(0.3)
        assert loop.stuck_s == 0
        loop.wake().result(10)


def test_a_park_that_fails_changes_nothing() -> None:
    """Who asked for it hears why, the texts go on, and the next one may succeed."""
    with busy(CountingRunner()) as (loop, outputs):
        with pytest.raises(EngineError, match="the disk is full"):
            loop.park(Memory(out="the disk is full")).result(10)
        assert not quiet(outputs)
        assert not loop.has_ended
        loop.park(Memory()).result(10)
        loop.wake().result(10)


def test_a_park_that_loses_something_ends_the_engine() -> None:
    """When not even what was freed comes back."""
    with busy(CountingRunner()) as (loop, outputs):
        memory = Memory(out="the kernel refuses")
        memory.is_out = True
        with pytest.raises(EngineError, match="the kernel refuses"):
            loop.park(memory).result(10)
        assert loop.has_ended
        assert isinstance(until_the_end(outputs)[-1].error, EngineError)


def test_a_wake_that_fails_ends_the_engine() -> None:
    """It counts as dead and not as wrong: health fails, and whoever waits gets an error and no token."""
    with running(CountingRunner()) as (loop, outputs):
        text = sequence(1, max_tokens=10**9, ignore_eos=True)
        loop.submit(text)
        outputs.get(timeout=10)
        loop.park(Memory(back="another process has the memory")).result(10)
        assert quiet(outputs)
        waiting = sequence(5)
        loop.submit(waiting)
        asked = loop.wake()
        with pytest.raises(EngineError, match="another process has the memory"):
            asked.result(10)
        assert loop.has_ended
        ends = until_the_end(outputs, 2)
        assert {output.sequence for output in ends} == {text, waiting}
        assert all(isinstance(output.error, EngineError) for output in ends)
        for ask in (lambda: loop.park(Memory()), loop.wake):
            with pytest.raises(EngineError, match="has stopped"):
                ask()


def test_a_parked_loop_stops() -> None:
    """Its sequences get an error, and its memory stays where it is."""
    with running(CountingRunner()) as (loop, outputs):
        loop.submit(sequence(1, max_tokens=10**9, ignore_eos=True))
        outputs.get(timeout=10)
        memory = Memory()
        loop.park(memory).result(10)
        loop.stop(timeout_s=10)
        assert not loop.is_alive()
        assert isinstance(until_the_end(outputs)[-1].error, EngineError)
        assert memory.moves == ["out"]


class Keeping:
    """Keeps texts, which reads the caches of those that end."""

    def __init__(self, read: Callable[[], None]):
        self._read = read

    def saves_a_pass(self, _: Sequence) -> bool:
        """Nothing is kept."""
        return False

    def begin(self, _: Step) -> int:
        """Nothing is kept."""
        return 0

    def note_end(self, _: Sequence) -> None:
        """Reads the cache."""
        self._read()


def test_a_parked_loop_that_stops_touches_nothing() -> None:
    """What was cancelled while it was parked would be kept, and a step would compute, from memory that is free."""
    memory, touched = Memory(), list[str]()
    runner = CountingRunner(lambda _: touched.append("a step") if memory.is_out else None)
    keeping = Keeping(lambda: touched.append("a text") if memory.is_out else None)
    outputs: queue.Queue[Output] = queue.Queue()
    loop = EngineLoop(
        runner, Scheduler(Limits(8, max_cache_tokens=10**12)), Sampler(),
        lambda step: [outputs.put(o) for o in step] and None, None, keeping,  # type: ignore[arg-type]
    )  # fmt: skip
    loop.start()
    texts = [sequence(start, max_tokens=10**9, ignore_eos=True) for start in (1, 2)]
    for text in texts:
        loop.submit(text)
    while {outputs.get(timeout=10).sequence for _ in range(4)} != set(texts):
        pass
    loop.park(memory).result(10)
    loop.cancel(texts[0])
    loop.stop(timeout_s=10)
    assert not loop.is_alive()
    assert touched == []
    assert runner.dropped == []
    assert until_the_end(outputs)[-1].sequence is texts[1]


def test_a_stop_before_the_park_has_begun_ends_both() -> None:
    """Nobody waits for ever for a park that does not come."""
    is_in_step, hold = threading.Event(), threading.Event()

    def wait(_: Sequence) -> None:
        is_in_step.set()
        hold.wait(20)

    with running(CountingRunner(wait)) as (loop, _):
        loop.submit(sequence(1))
        assert is_in_step.wait(20)
        stopper = threading.Thread(target=loop.stop, args=(10,))
        stopper.start()
        time.sleep(0.1)
        memory = Memory()
        asked = loop.park(memory)
        hold.set()
        with pytest.raises(EngineError, match="has stopped"):
            asked.result(10)
        stopper.join(10)
        assert memory.moves == []


def test_one_who_leaves_does_not_stop_the_park() -> None:
    """A future that is cancelled from outside cannot fail the engine's thread."""
    with busy(CountingRunner()) as (loop, _):
        memory = Memory()
        memory.hold.clear()
        asked = loop.park(memory)
        assert not asked.cancel()
        memory.hold.set()
        asked.result(10)
        loop.wake().result(10)
