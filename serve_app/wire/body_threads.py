"""Threads for what reads a body: an event loop waits for nothing that grows with a request.

Large bodies wait for bodies of their own size only. Nothing counts those that wait, since the bytes of all bodies
together have a bound where they come in (`access/body_budget`). One thread for each size: whoever decodes JSON lets no
other thread of Python run, so more threads would only make the event loop wait for several of them in turn.
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
    """`work()` on a body of `size` bytes, with what it raises. A small body takes less time than changing threads."""
    if size <= UNCOUNTED_BYTES:
        return work()
    threads = _MIDDLE if size <= MIDDLE_BYTES else _LARGE
    return await asyncio.get_running_loop().run_in_executor(threads, work)
