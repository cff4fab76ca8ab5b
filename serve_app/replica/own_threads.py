"""Runs calls that may never return, such as those that read a file server that is away.

Each has a thread of its own, so it takes none from the threads that others share, and the process can end while it
runs.
"""

import asyncio
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")


class OwnThreads:
    """Has the calls of one event loop that run. There is at most one of each key."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Future[Any]] = {}

    async def call(self, key: Hashable, work: Callable[[], Result], timeout_s: float) -> Result:
        """Returns what `work` returns, or raises what it raises. Raises TimeoutError after `timeout_s` seconds, and
        `work` goes on. If a call with this key still runs, it waits for that one, so calls that hang do not become
        more when they are tried again."""
        running = self._running.get(key) or self._begun(key, work)
        done, _ = await asyncio.wait([running], timeout=timeout_s)
        if not done:
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        result: Result = running.result()
        return result

    def _begun(self, key: Hashable, work: Callable[[], Result]) -> asyncio.Future[Result]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def end(result: Result | None, error: BaseException | None) -> None:
            del self._running[key]
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)
                future.exception()  # Perhaps nobody waits for it any more, which asyncio would report.

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as raised:
                error = raised
            with suppress(RuntimeError):  # The loop has been closed meanwhile.
                loop.call_soon_threadsafe(end, result, error)

        self._running[key] = future
        threading.Thread(target=run, name="serve-app-own", daemon=True).start()
        return future
