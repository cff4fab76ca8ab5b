"""Open pages: what each is sent, and what a slow one costs."""

import asyncio
from contextlib import ExitStack
from typing import Any

import pytest

from serve_app.console import feed as feed_module
from serve_app.console.feed import (
    MOST_PAGES,
    MOST_PAGES_OF_A_KEY,
    MOST_PENDING,
    PLACES_OF_ADMINS,
    Feed,
    OpenPage,
    send_events,
)
from serve_app.errors import ModelUnavailable


async def state(view: Any) -> bytes:
    """The whole state."""
    return f"state of {view}".encode()


async def nothing() -> None:
    """There is something to show at once."""


async def test_a_page_gets_the_whole_state_first_and_then_what_is_new() -> None:
    """What was pushed before its state is part of that."""
    page = OpenPage("v")
    page.push(b"before")
    events = page.events(nothing, state)
    assert await anext(events) == b"state of v"
    page.push(b"one")
    page.push(b"two")
    assert [await anext(events), await anext(events)] == [b"one", b"two"]
    page.end()
    assert [event async for event in events] == []


async def test_a_slow_page_skips_to_a_new_state() -> None:
    """So its lag takes no memory."""
    page = OpenPage("v")
    events = page.events(nothing, state)
    await anext(events)
    for _ in range(1000):
        page.push(b"delta")
    assert len(page._pending) <= MOST_PENDING
    assert await anext(events) == b"state of v"
    page.push(b"delta")
    assert await anext(events) == b"delta"


async def test_a_quiet_stream_has_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no proxy takes it for dead."""
    monkeypatch.setattr(feed_module, "COMMENT_EVERY_S", 0.01)
    events = OpenPage("v").events(nothing, state)
    await anext(events)
    assert (await anext(events)).startswith(b":")


async def test_pages_have_places() -> None:
    """One more is refused, and a stopping router takes none."""
    feed: Feed[int] = Feed()
    opened = [feed.opened(number) for number in range(MOST_PAGES)]
    pages = [place.__enter__() for place in opened]
    with pytest.raises(ModelUnavailable, match="64 pages of the console"), feed.opened(0):
        pass
    opened[0].__exit__(None, None, None)
    assert len(feed) == MOST_PAGES - 1
    feed.close()
    assert all(page.is_over for page in pages[1:])
    with pytest.raises(ModelUnavailable, match="stopping"), feed.opened(0):
        pass


async def test_one_key_cannot_take_all_places() -> None:
    """A key has its share, admins have a few places of their own, and a place that was left is free again."""
    feed: Feed[int] = Feed()
    with ExitStack() as pages:
        own = [pages.enter_context(ExitStack()) for _ in range(MOST_PAGES_OF_A_KEY)]
        for place in own:
            place.enter_context(feed.opened(0, "a", is_admin=False))
        with pytest.raises(ModelUnavailable, match="The API key 'a' has 8 pages"), feed.opened(0, "a", is_admin=False):
            pass
        own[0].close()
        pages.enter_context(feed.opened(0, "a", is_admin=False))
        for number in range(MOST_PAGES - PLACES_OF_ADMINS - MOST_PAGES_OF_A_KEY):
            pages.enter_context(feed.opened(0, f"key-{number}", is_admin=False))
        with pytest.raises(ModelUnavailable, match="The last 4 places are for admins"):
            pages.enter_context(feed.opened(0, "b", is_admin=False))
        for _ in range(PLACES_OF_ADMINS):
            pages.enter_context(feed.opened(0, "ops", is_admin=True))
        with pytest.raises(ModelUnavailable, match="64 pages"):
            pages.enter_context(feed.opened(0, "boss", is_admin=True))
    assert (len(feed), len(feed._keys)) == (0, 0)


async def test_a_client_that_reads_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some seconds, though it does not close its connection."""
    monkeypatch.setattr(feed_module, "SEND_TIMEOUT_S", 0.05)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    page = OpenPage("v")
    async with asyncio.timeout(5):
        await send_events(page.events(nothing, state), {}, receive, send)
    assert [message.get("body") for message in sent] == [None, b"state of v"]
