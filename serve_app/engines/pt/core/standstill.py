"""Has the engine's thread stand still between two steps while its memory is away.

awake ── ask_to_park ──▶ parking ──▶ parked ── ask_to_wake ──▶ waking ──▶ awake
                            │                                     │
                            └▶ awake, if nothing could be copied  └▶ ended, if it could not be brought back
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal, Protocol

from serve_app.engines.pt.core.memory_part import Tick
from serve_app.errors import EngineError

State = Literal["awake", "parking", "parked", "waking", "ended"]


class Movable(Protocol):
    """Is the memory of an engine, which can leave its devices and come back. `is_out` says that it is not there, or not
    as a whole."""

    @property
    def is_out(self) -> bool:
        """Returns whether nothing can be computed with it."""
        ...

    def move_out(self, tick: Tick) -> None:
        """Frees the memory. Raises EngineError if that fails, after which all is as it was unless `is_out` says
        otherwise."""
        ...

    def move_back(self, tick: Tick) -> None:
        """Brings it back. Raises EngineError if that fails, after which nothing can be computed."""
        ...


class Standstill:
    """Keeps the state. The engine's thread calls `stand` and `end`, and other threads call the rest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: State = "awake"
        self._asked: Future[None] | None = None
        self._problem: EngineError | None = None
        # A thread that stands still waits for True, to wake, or False, to end.
        self._orders: queue.SimpleQueue[bool] = queue.SimpleQueue()

    @property
    def state(self) -> State:
        """Returns what the thread does, or is asked to do next."""
        return self._state

    def ask_to_park(self) -> "Future[None]":
        """Returns what will be done when the memory is free. Raises EngineError unless the engine is awake."""
        return self._ask("awake", "parking", "park")

    def ask_to_wake(self) -> "Future[None]":
        """Returns what will be done when the memory is back. Raises EngineError unless the engine is parked."""
        asked = self._ask("parked", "waking", "wake")
        self._orders.put(True)
        return asked

    def ask_to_end(self) -> None:
        """Has a thread that stands still, now or later, go on without its memory, which then has to end."""
        self._orders.put(False)

    def stand(self, memory: Movable, tick: Tick, rest: Callable[[], None]) -> None:
        """Moves the memory out, waits, and moves it back. `tick` is called as it is moved, and `rest` before the thread
        waits. Raises EngineError if the memory cannot be brought back."""
        try:
            memory.move_out(tick)
        except EngineError as error:
            if memory.is_out:
                self._problem = error
                raise
            self._answer("awake", error)
            return
        self._answer("parked")
        rest()
        if not self._orders.get():
            return
        tick()
        try:
            memory.move_back(tick)
        except EngineError as error:
            self._problem = error  # Who waits hears of it from `end`, when the engine's health says so too.
            raise
        self._answer("awake")

    def end(self, error: EngineError) -> None:
        """Tells those who wait for parking or waking that the engine has ended, by `error` unless there is a reason
        here."""
        self._answer("ended", self._problem or error)

    def _ask(self, before: State, after: State, what: str) -> "Future[None]":
        with self._lock:
            if self._state != before:
                raise EngineError(f"The engine cannot {what} now, because it is {self._state}.")
            self._state, self._asked = after, Future()
            self._asked.set_running_or_notify_cancel()  # It goes on if the one who asked for it leaves.
            return self._asked

    def _answer(self, state: State, error: EngineError | None = None) -> None:
        with self._lock:
            self._state, asked, self._asked = state, self._asked, None
        if asked is None:
            return
        if error is None:
            asked.set_result(None)
        else:
            asked.set_exception(error)
