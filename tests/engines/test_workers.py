"""Threads for what takes time."""

import asyncio
import os
import threading
import time

import pytest

from serve_app.engines.workers import MOST_WAITING_LARGE, SMALL_BYTES, Workers, in_thread_of_its_own
from serve_app.errors import Overloaded


def has_ended(thread: int) -> bool:
    """Whether the thread of this native id ends, which the kernel may show a moment after Python has joined it."""
    until = time.monotonic() + 2
    while str(thread) in os.listdir("/proc/self/task") and time.monotonic() < until:
        time.sleep(0.01)
    return str(thread) not in os.listdir("/proc/self/task")


def test_the_thread_of_a_load_has_ended() -> None:
    """OpenMP keeps a thread's helpers for as long as the thread lives, so it is gone while the event loop still runs,
    which a thread of the loop's own pool is not."""

    async def main() -> None:
        assert has_ended(await in_thread_of_its_own(threading.get_native_id))
        assert not has_ended(await asyncio.to_thread(threading.get_native_id))

    asyncio.run(main())


def test_errors_are_raised_to_the_caller() -> None:
    """A load that fails says why."""

    def work() -> None:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        asyncio.run(in_thread_of_its_own(work))


def test_answers_do_not_wait_behind_requests_and_are_not_refused() -> None:
    """Large requests of one client fill their lane, and the answer of another one is computed already."""

    async def main() -> None:
        workers, free = Workers(), threading.Event()
        waiting = [asyncio.ensure_future(workers.run(SMALL_BYTES + 1, free.wait)) for _ in range(MOST_WAITING_LARGE)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await workers.run(SMALL_BYTES + 1, free.wait)
        async with asyncio.timeout(5):
            assert await workers.write(SMALL_BYTES + 1, lambda: "answer") == "answer"
        free.set()
        assert all(await asyncio.gather(*waiting))

    asyncio.run(main())
