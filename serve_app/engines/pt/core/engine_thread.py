"""Is the thread of an engine, which takes what is asked of it between two steps, sleeps without work, and stands still
while the engine is parked. What a step does is said by who derives from it."""

import contextlib
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future

import torch

from serve_app.engines.pt.core.heap import trim_heap
from serve_app.engines.pt.core.standstill import Movable, Standstill
from serve_app.errors import EngineError

logger = logging.getLogger("ray.serve")

# After this many seconds without work, the C heap gives back what it keeps, which takes some 15 ms.
IDLE_S = 2.0


class EngineThread(threading.Thread, ABC):
    """Runs steps while there is work. All methods but `run` and those that it calls may be called from any thread.

    Once it has ended, nothing is taken any more, and `_end_all` has told all that were left.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._closing = threading.Lock()
        self._closed = False
        self._busy_since: float | None = None
        self._standstill = Standstill()

    @property
    def has_ended(self) -> bool:
        """Returns whether it has stopped working. It is true before anyone who waits is told so, because a client of
        the end may ask for the engine's health at once, as the router does, and must not find a thread about to end."""
        return self._closed or not self.is_alive()

    @property
    def stuck_s(self) -> float:
        """Returns the seconds since a thread with work has ended a pass or begun, or 0 while it has no work or is
        parked."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def is_parked(self) -> bool:
        """Returns whether the memory is elsewhere or on its way back."""
        return self._standstill.state in ("parked", "waking")

    def park(self, memory: Movable) -> "Future[None]":
        """Moves the memory out before the next step, and computes nothing until `wake`. Returns what is done when the
        memory is free, and has an EngineError if nothing was moved. Raises EngineError unless it is awake."""
        self._require_open()
        asked = self._standstill.ask_to_park()
        self._inbox.put(lambda: self._stand_still(memory))
        return asked

    def wake(self) -> "Future[None]":
        """Brings the memory back and goes on. Returns what is done when steps may run again, and has an EngineError if
        the memory does not come back, with which the thread ends. Raises EngineError unless it is parked."""
        self._require_open()
        return self._standstill.ask_to_wake()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread, also a parked one, so that all that is left gets an error. Waits at most `timeout_s`
        seconds."""

        def end() -> None:
            self._stopping = True

        self._inbox.put(end)
        self._standstill.ask_to_end()
        if self.is_alive():
            self.join(timeout_s)

    def run(self) -> None:
        """Runs the steps."""
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._read_inbox()
                    if not self._stopping:
                        self._work()
        except Exception:
            logger.exception("The pt engine's thread has ended, so its replica has to be replaced.")
        finally:
            self._abandon()

    @abstractmethod
    def _has_work(self) -> bool:
        """Returns whether there is something to compute."""

    @abstractmethod
    def _work(self) -> None:
        """Does one step. Raises if the device is broken, which ends the thread."""

    @abstractmethod
    def _end_all(self, error: EngineError) -> None:
        """Tells all that are left that the thread has ended."""

    def _poll_s(self) -> float | None:
        """Returns after how many seconds without work it is to look again, or None if it need not."""
        return None

    def _put(self, work: Callable[[], None]) -> None:
        """Has the thread do something before its next step. Raises EngineError once it has ended."""
        with self._closing:
            self._require_open()
            self._inbox.put(work)

    def _tick(self) -> None:
        """Notes that a pass has ended."""
        self._busy_since = time.monotonic()

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("the pt engine has stopped")

    def _stand_still(self, memory: Movable) -> None:
        if self._stopping or self._closed:
            return
        self._tick()
        self._standstill.stand(memory, self._tick, self._rest)
        if memory.is_out:  # It has to end, and what else was asked of it may not touch memory that is not there.
            self._stopping = True
        self._tick()

    def _rest(self) -> None:
        self._busy_since = None

    def _read_inbox(self) -> None:
        if not self._has_work() and not self._stopping:
            self._rest()
            work = self._next_work()
            self._tick()
            if work is not None:
                work()
        while not self._stopping:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _next_work(self) -> Callable[[], None] | None:
        """Waits for what is asked next and returns it, or None if it is time to look again."""
        poll_s = self._poll_s()
        try:
            return self._inbox.get(timeout=IDLE_S if poll_s is None else poll_s)
        except queue.Empty:
            if poll_s is not None:
                return None
            trim_heap()
            return self._inbox.get()

    def _abandon(self) -> None:
        error = EngineError("the pt engine has stopped")
        with self._closing:
            self._closed = True
        self._standstill.end(error)
        while not self._inbox.empty():
            with contextlib.suppress(Exception):  # Even freeing fails on a broken device, but all must end.
                self._inbox.get_nowait()()
        self._end_all(error)
