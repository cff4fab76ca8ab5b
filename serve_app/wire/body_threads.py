"""Has the threads that read bodies, so that an event loop waits for nothing that grows with a request.

Large bodies wait only for bodies of their own size. Nothing counts the bodies that wait, since the bytes of all bodies
together are bounded where they come in (`access/body_budget`). Each size has one thread: decoding JSON lets no other
thread of Python run, so more threads would only make the event loop wait for several of them in turn.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from serve_app.wire.census import UNCOUNTED_BYTES

# A long conversation is smaller than that.
MIDDLE_BYTES = 2**20
_MIDDLE = ThreadPoolExecutor(1, thread_name_prefix="middle-bodies")
_LARGE = ThreadPoolExecutor(1, thread_name_prefix="large-bodies")

T = TypeVar("T")


async def beside_loop(size: int, work: Callable[[], T]) -> T:
    """Returns `work()` on a body of `size` bytes, or raises its error. A small body is quicker without a thread."""
    if size <= UNCOUNTED_BYTES:
        return work()
    threads = _MIDDLE if size <= MIDDLE_BYTES else _LARGE
    return await asyncio.get_running_loop().run_in_executor(threads, work)
