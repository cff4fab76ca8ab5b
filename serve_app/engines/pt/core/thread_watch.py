"""Notices an engine's thread that hangs, as in a kernel that never ends."""

import asyncio
import logging
from collections.abc import Callable

from serve_app.engines.pt.core.engine_thread import EngineThread
from serve_app.errors import EngineError

logger = logging.getLogger("ray.serve")

# The thread is looked at at this interval in seconds.
WATCH_EVERY_S = 1.0


class ThreadWatch:
    """Watches one thread from the event loop on which it is made.

    A thread that has work but ends no pass for `step_timeout_s` seconds counts as dead from then on, and `on_hang` gets
    the error for all that wait, once.
    """

    def __init__(self, thread: EngineThread, step_timeout_s: float, on_hang: Callable[[EngineError], None]):
        self._thread, self._step_timeout_s, self._on_hang = thread, step_timeout_s, on_hang
        self._hang: EngineError | None = None
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._watch())

    def require_alive(self) -> None:
        """Raises EngineError if the thread has ended or hangs."""
        if self._hang is not None:
            raise EngineError(str(self._hang))
        if self._thread.has_ended:
            raise EngineError("the pt engine's thread has ended. The replica will be replaced.")

    def stop(self) -> None:
        """Ends the watch. It may be called from any thread."""
        self._loop.call_soon_threadsafe(self._task.cancel)

    async def _watch(self) -> None:
        while self._thread.stuck_s < self._step_timeout_s:  # noqa: ASYNC110  a thread that hangs sets no event
            await asyncio.sleep(min(WATCH_EVERY_S, self._step_timeout_s / 4))
        self._hang = EngineError(
            f"the pt engine has work but has ended no step for {self._step_timeout_s:g} s (step_timeout_s). The "
            "replica will be replaced."
        )
        logger.error("%s What waits for it ends.", self._hang)
        self._on_hang(self._hang)
