"""A browser for each file, and a scripted server and pages for each test."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.browser import Watched, chromium
from tests.console.browser.scripted import Scripted, serving

Open = Callable[..., Watched]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. It ends with the file, because Playwright's event loop runs in this thread while it is open."""
    with chromium() as started:
        yield started


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """The server, which a test may script further."""
    with serving(Scripted()) as server:
        yield server


@pytest.fixture
def open_page(browser: Browser, scripted: Scripted) -> Iterator[Open]:
    """Opens pages, in which nothing may go wrong."""
    opened: list[Watched] = []

    def make(**options: Any) -> Watched:
        opened.append(Watched(browser, scripted.url, **options))
        return opened[-1]

    yield make
    for each in opened:
        each.close()
