"""The terminal during `serve-app run`: lines that stay and, where it is a terminal, a live line for what is awaited."""

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

# Where nothing can be redrawn, a sign of life this often, in seconds, while nothing changes.
REMINDER_S = 30.0
REFRESHES_PER_SECOND = 4
# What a failure and a warning look like where there are colours.
STYLES = (("has failed", "bold red"), ("WARNING", "yellow"), ("is ready", "green"))


class StartView:
    """Prints what happens, with the seconds since the start. Safe to use from several threads.

    When the reader of the stream has gone away, nothing more is printed and nothing is raised: what is served does not
    depend on who watches.
    """

    def __init__(self, stream: TextIO, live: bool = True, clock: Callable[[], float] = time.monotonic):
        self._clock, self._started = clock, clock()
        self._spoke = self._started
        self._lock = threading.Lock()
        # What is awaited, since when, and its spinner: a new one for each frame would always show its first.
        self._awaited: dict[str, tuple[float, Spinner]] = {}
        self._stream = stream
        self._is_gone = False
        self._console: Console | None = None
        self._live: Live | None = None
        if live and stream.isatty():
            self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=REFRESHES_PER_SECOND,
                redirect_stdout=False, redirect_stderr=False, transient=True,
            )  # fmt: skip
            self._live.start()

    def event(self, text: str) -> None:
        """One line with the seconds before it."""
        self.line(f"[{self._clock() - self._started:3.0f} s] {text}")

    def line(self, text: str) -> None:
        """One line as it is."""
        with self._lock:
            self._spoke = self._clock()
            self._attempt(partial(self._print, text))

    def _print(self, text: str) -> None:
        if self._console is None:
            self._stream.write(text + "\n")
            self._stream.flush()
        else:
            style = next((style for words, style in STYLES if words in text), "")
            self._console.print(Text(text, style), soft_wrap=True)

    def wait_for(self, awaited: Sequence[str]) -> None:
        """What is awaited now, each with the seconds that it has been awaited."""
        now = self._clock()
        with self._lock:
            self._awaited = {text: self._awaited.get(text) or (now, Spinner("line")) for text in awaited}
            live = self._live
            is_quiet = bool(awaited) and self._console is None and now - self._spoke > REMINDER_S
        if live is not None:
            self._attempt(live.refresh)  # Lines that are printed next would otherwise stand over the old live lines.
        if is_quiet:
            self.event(f"still waiting: {', '.join(awaited)}")

    def close(self) -> None:
        """Takes the live lines away and gives the cursor back. What stays was printed."""
        with self._lock:
            live, self._live = self._live, None
            self._awaited = {}
        if live is not None:
            with contextlib.suppress(OSError, ValueError):
                live.stop()

    def last_words(self, text: str) -> None:
        """Prints one line for a signal handler that ends the process: it takes no lock and waits for nobody.

        The handler may have interrupted the thread that holds the lock. Where the stream takes nothing now, the line is
        lost.
        """
        with contextlib.suppress(OSError, ValueError):
            number = self._stream.fileno()
            if select.select([], [number], [], 0)[1]:
                os.write(number, f"[{self._clock() - self._started:3.0f} s] {text}\n".encode())

    def _attempt(self, write: Callable[[], None]) -> None:
        """Writes to the stream, unless a write has failed before."""
        if self._is_gone:
            return
        try:
            write()
        except (OSError, ValueError):  # A broken pipe, a terminal that was closed, a closed file.
            self._is_gone = True

    def _render(self) -> Group:
        now = self._clock()
        # The dictionary is replaced and never changed, so that drawing needs no lock.
        awaited = self._awaited
        for text, (since, spinner) in awaited.items():
            spinner.update(text=Text(f"{text} {now - since:.0f} s"))
        return Group(*(spinner for _, spinner in awaited.values()))
