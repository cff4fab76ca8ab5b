"""A Chromium of the system, in which tests open the console's page, and what they all ask of it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Dialog, Error, Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Chromium's sandbox needs rights that containers lack, and the page is our own. The others keep it off the network.
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
DESKTOP = (1440, 900)
PHONE = (390, 844)
TIMEOUT_MS = 10_000
# Set where the absence of a browser is a failure, as in .ci/run.
NEEDED = "SERVE_APP_NEEDS_BROWSER"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Starts it, with a new profile. Skips the test if the system has none, or fails it where NEEDED is set."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = "Chromium is not installed: scripts/install_browser.sh installs it"
        (pytest.fail if os.environ.get(NEEDED) else pytest.skip)(reason)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found,
            args=list(ARGUMENTS),
            env={**os.environ, "HOME": home},  # Debian's wrapper writes there
        )
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page of a new profile, with what went wrong in it: errors, dialogs, and requests to other hosts."""

    def __init__(self, browser: Browser, url: str, size: tuple[int, int] = DESKTOP, scheme: Any = "light"):
        self.url = url
        self.context: BrowserContext = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.context.set_default_timeout(TIMEOUT_MS)
        self.page: Page = self.context.new_page()
        self.troubles: list[str] = []
        # Of requests that the test wants to fail: Chromium writes each into its console.
        self.expected: tuple[str, ...] = ()
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.troubles.append(f"exception: {error}"))
        self.page.on("dialog", self._on_dialog)
        self.page.on("request", self._on_request)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(text in message.text for text in self.expected):
            self.troubles.append(f"console: {message.text}")

    def _on_dialog(self, dialog: Dialog) -> None:
        self.troubles.append(f"dialog: {dialog.message}")
        with suppress(Error):
            dialog.dismiss()

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.troubles.append(f"request: {request.url}")

    def open(self, tab: str = "memory") -> Page:
        """Opens the console at one of its sections."""
        self.page.goto(f"{self.url}/ui/#{tab}")
        return self.page

    def show(self, tab: str) -> None:
        """Changes to a section."""
        self.page.locator(f"#tab-{tab}").click()
        self.page.locator(f"#panel-{tab}").wait_for()

    def violations(self) -> list[str]:
        """What axe-core finds, of any impact."""
        found = Axe().run(self.page).response["violations"]
        return [f"{each['id']} ({each['impact']}): {node['html'][:300]}" for each in found for node in each["nodes"]]

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        wide: int = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        return wide

    def close(self) -> None:
        """Closes it. Fails if anything went wrong."""
        self.context.close()
        assert not self.troubles, self.troubles
