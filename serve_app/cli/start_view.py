"""Shows `serve-app run` on the terminal: lines that stay and, on a real terminal, a live line for what is awaited."""

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

# If nothing can be redrawn and nothing changes, a sign of life is printed at this interval in seconds.
REMINDER_S = 30.0
REFRESHES_PER_SECOND = 4
# These are the styles of a failure, a warning and a success if there are colours.
STYLES = (("has failed", "bold red"), ("WARNING", "yellow"), ("is ready", "green"))


class StartView:
    """Prints what happens, with the seconds since the start. It is safe to use from several threads.

    If the reader of the stream has gone away, nothing more is printed and nothing is raised, because serving does not
    depend on a reader.
    """

    def __init__(self, stream: TextIO, live: bool = True, clock: Callable[[], float] = time.monotonic):
        self._clock, self._started = clock, clock()
        self._spoke = self._started
        self._lock = threading.Lock()
        # It has what is awaited, since when, and its spinner. A new spinner for each frame would always show its first.
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
        """Prints a line with the seconds since the start before it."""
        self.line(f"[{self._clock() - self._started:3.0f} s] {text}")

    def line(self, text: str) -> None:
        """Prints a line as it is."""
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
        """Shows what is awaited now, each with the seconds for which it has been awaited."""
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
        """Removes the live lines and gives the cursor back. Printed lines stay."""
        with self._lock:
            live, self._live = self._live, None
            self._awaited = {}
        if live is not None:
            with contextlib.suppress(OSError, ValueError):
                live.stop()

    def last_words(self, text: str) -> None:
        """Prints one line for a signal handler that ends the process, without taking a lock or waiting.

        The handler may have interrupted the thread that holds the lock. If the stream takes nothing now, the line is
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
        except (OSError, ValueError):  # The pipe is broken, or the terminal or file was closed.
            self._is_gone = True

    def _render(self) -> Group:
        now = self._clock()
        # The dictionary is replaced and never changed, so drawing needs no lock.
        awaited = self._awaited
        for text, (since, spinner) in awaited.items():
            spinner.update(text=Text(f"{text} {now - since:.0f} s"))
        return Group(*(spinner for _, spinner in awaited.values()))
