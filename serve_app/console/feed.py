"""Keeps the open pages of one router replica, and what each of them has not been sent yet.

A page that reads slowly costs no memory: once it lags by `MOST_PENDING` deltas, they are dropped, and it gets the whole
state when it reads again. One that takes nothing for `SEND_TIMEOUT_S` is closed.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from starlette.types import Receive, Scope, Send

from serve_app.errors import ClientGone, ModelUnavailable
from serve_app.wire.asgi import unless_gone

MOST_PAGES = 64
# The pages of one API key, and the places that are left to admins.
MOST_PAGES_OF_A_KEY, PLACES_OF_ADMINS = 8, 4
MOST_PENDING = 8
# A comment is sent after so many seconds without an event, so that no proxy takes the stream for dead.
COMMENT_EVERY_S = 15.0
SEND_TIMEOUT_S = 30.0
# A client that is refused is told to come back after so many seconds.
RETRY_S = 10.0

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-accel-buffering", b"no"),
)

View = TypeVar("View")


class OpenPage(Generic[View]):
    """This is one open stream. `view` is what its key may see, and `needs_state` that it gets the whole state next."""

    def __init__(self, view: View):
        self.view = view
        self.needs_state = True
        self.is_over = False
        self._pending: deque[bytes] = deque()
        self._has_news = asyncio.Event()

    def push(self, event: bytes) -> None:
        """Adds an event, unless the page gets the whole state anyway."""
        if self.needs_state:
            return
        if len(self._pending) >= MOST_PENDING:
            self._pending.clear()
            self.needs_state = True
        else:
            self._pending.append(event)
        self._has_news.set()

    def end(self) -> None:
        """Ends the stream, from which its page recovers by opening another one."""
        self.is_over = True
        self._has_news.set()

    async def events(
        self, read: Callable[[], Awaitable[None]], state: Callable[[View], Awaitable[bytes]]
    ) -> AsyncIterator[bytes]:
        """Yields the events. `read` returns once there is something to show, and `state` makes the event of the whole
        state. What is pushed after `state` has returned comes after that state."""
        while not self.is_over:
            if self.needs_state:
                await read()
                whole = await state(self.view)
                self._pending.clear()
                self.needs_state = False
                yield whole
            elif self._pending:
                yield self._pending.popleft()
            else:
                self._has_news.clear()
                try:
                    async with asyncio.timeout(COMMENT_EVERY_S):
                        await self._has_news.wait()
                except TimeoutError:
                    yield b": nothing new\n\n"


class Feed(Generic[View]):
    """Holds all open pages."""

    def __init__(self) -> None:
        self._pages: set[OpenPage[View]] = set()
        self._keys: Counter[str] = Counter()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[OpenPage[View]]:
        return iter(tuple(self._pages))

    @contextmanager
    def opened(self, view: View, key: str = "", is_admin: bool = True) -> Iterator[OpenPage[View]]:
        """Takes a place for a page. `key` is the name of its API key, or empty where none is needed. Raises
        ModelUnavailable, which is a 503, if there is no place for it or the router ends."""
        if self._is_closed:
            raise ModelUnavailable("This router is stopping. Open the stream again.", retry_after_s=1.0)
        if key and self._keys[key] >= MOST_PAGES_OF_A_KEY:
            text = (
                f"The API key '{key}' has {MOST_PAGES_OF_A_KEY} pages of the console open at this router, which is the "
                "limit for a key. Close one of them."
            )
            raise ModelUnavailable(text, retry_after_s=RETRY_S)
        if len(self._pages) >= MOST_PAGES - (0 if is_admin else PLACES_OF_ADMINS):
            kept = "" if is_admin else f" The last {PLACES_OF_ADMINS} places are for admins."
            count = len(self._pages)
            text = f"{count} pages of the console are open at this router, of at most {MOST_PAGES}.{kept} Close one."
            raise ModelUnavailable(text, retry_after_s=RETRY_S)
        page = OpenPage(view)
        self._pages.add(page)
        self._keys[key] += 1
        try:
            yield page
        finally:
            self._pages.discard(page)
            self._keys[key] -= 1
            if not self._keys[key]:
                del self._keys[key]

    def close(self) -> None:
        """Ends all streams and takes no more."""
        self._is_closed = True
        for page in self:
            page.end()


async def send_events(events: AsyncIterator[bytes], scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with a stream of server-sent events, until it ends or its client leaves or does not read."""

    async def work() -> None:
        async for event in events:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    await _send_start(send)
    with suppress(ClientGone, TimeoutError):
        await unless_gone(work(), receive)


async def send_head(send: Send) -> None:
    """Answers a HEAD request with the head of a stream, and ends the answer. A server drops the body of such an answer,
    so a stream would never end, and its connection would be taken for a free one."""
    await _send_start(send)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_start(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
