"""Tells a client that waits for a model how long it still has to wait, if it asked for such comments."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from serve_app.router.downstream import Downstream

# A client gets a comment at this interval in seconds. Proxies often cut silent connections after 60.
COMMENT_EVERY_S = 5.0


@asynccontextmanager
async def commented(downstream: Downstream, text: Callable[[], str]) -> AsyncIterator[None]:
    """Sends what `text` returns at once and at every interval, as long as the block runs."""
    telling = asyncio.create_task(_tell(downstream, text)) if downstream.wants_comments else None
    try:
        yield
    finally:
        if telling is not None:
            telling.cancel()
            await asyncio.wait({telling})  # Awaiting it itself would swallow a cancellation of this task.


async def _tell(downstream: Downstream, text: Callable[[], str]) -> None:
    while True:
        await downstream.comment(text())
        await asyncio.sleep(COMMENT_EVERY_S)
