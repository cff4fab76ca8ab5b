"""Has threads for what takes time: a model's load, and with each request its body, template, tokens and answer.

No work that grows with a request runs on the event loop. Large requests wait only behind large ones, and what waits has
a bound, so that one client's large requests cannot delay all the others.
"""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from serve_app.errors import Overloaded

# A request of at most this many bytes takes milliseconds.
SMALL_BYTES = 2**16
SMALL_THREADS = 2
LARGE_THREADS = 1
MOST_WAITING_SMALL = 1024
MOST_WAITING_LARGE = 32

T = TypeVar("T")


async def in_thread_of_its_own(work: Callable[[], T]) -> T:
    """Returns `work()`, which runs in a new thread that has ended before this returns. Raises its errors.

    It is for work that computes with torch before the engine's thread does. OpenMP gives each thread that computes
    helpers of its own, which live as long as that thread. GNU's OpenMP lets helpers spin for a moment between two
    operations, but if there are more helpers than cores they sleep at once, and each of the hundreds of operations of
    a step has to wake them. So no thread that has computed may stay beside the engine's.
    """
    threads = ThreadPoolExecutor(1, thread_name_prefix="pt-load")
    try:
        result = await asyncio.get_running_loop().run_in_executor(threads, work)
    except BaseException:
        threads.shutdown(wait=False)  # The work may go on after a cancellation.
        raise
    threads.shutdown()  # The work is done, so the thread ends at once.
    return result


class Workers:
    """Has lanes of threads: one for small requests, one for large ones, and one for large answers. It is used on one
    event loop."""

    def __init__(self) -> None:
        self._small = _Lane("small", SMALL_THREADS, MOST_WAITING_SMALL)
        self._large = _Lane("large", LARGE_THREADS, MOST_WAITING_LARGE)
        self._answers = _Lane("answers", LARGE_THREADS, MOST_WAITING_LARGE)

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Returns `work()` of a request of `size` bytes. Raises its errors, and Overloaded if too much waits."""
        return await (self._small if size <= SMALL_BYTES else self._large).run(work)

    async def write(self, size: int, work: Callable[[], T]) -> T:
        """Returns `work()`, which writes about `size` bytes of an answer that was computed. Raises its errors.

        It is never refused, because the engine bounds how many answers there are at one time, and it does not wait
        behind large requests.
        """
        if size <= SMALL_BYTES:
            return await self._small.run(work, is_bounded=False)
        return await self._answers.run(work, is_bounded=False)


class _Lane:
    def __init__(self, name: str, threads: int, most: int):
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._most = most
        self._unfinished = 0

    async def run(self, work: Callable[[], T], is_bounded: bool = True) -> T:
        if is_bounded and self._unfinished >= self._most:
            raise Overloaded(
                f"{self._unfinished} requests are being read already, which is the limit. Try again.",
                retry_after_s=1.0,
            )
        self._unfinished += 1
        future = self._threads.submit(work)
        loop = asyncio.get_running_loop()

        def finished(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # The loop has been closed meanwhile.
                loop.call_soon_threadsafe(self._finish)

        future.add_done_callback(finished)
        # If a client leaves, its work leaves the queue. Work that has begun goes on, and counts until its end.
        return await asyncio.wrap_future(future)

    def _finish(self) -> None:
        self._unfinished -= 1
