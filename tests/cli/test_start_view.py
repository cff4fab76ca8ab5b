"""The terminal of `serve-app run`: plain lines in a pipe, a live line on a terminal."""

import contextlib
import io
import os
import pty
import re
import select
import time

import pytest

from serve_app.cli.start_view import REFRESHES_PER_SECOND, REMINDER_S, StartView


class Clock:
    """A clock that is set."""

    now = 100.0

    def __call__(self) -> float:
        """In seconds."""
        return self.now


def test_lines_in_a_pipe_have_no_control_characters() -> None:
    """The seconds count from the start; what is awaited is told again only after a while without news."""
    stream, clock = io.StringIO(), Clock()
    view = StartView(stream, clock=clock)
    view.event("Ray is up")
    clock.now += 12.4
    view.wait_for(["a is loading"])
    view.event("b is ready")
    clock.now += REMINDER_S + 1
    view.wait_for(["a is loading"])
    view.wait_for(["a is loading"])
    view.line("done")
    view.close()
    assert stream.getvalue().splitlines() == [
        "[  0 s] Ray is up",
        "[ 12 s] b is ready",
        "[ 43 s] still waiting: a is loading",
        "done",
    ]


def test_a_terminal_shows_what_is_awaited_and_keeps_lines_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The live line has its seconds and goes away; a long line, such as a curl, is not broken."""
    monkeypatch.setenv("TERM", "xterm-256color")
    master, slave = pty.openpty()
    clock = Clock()
    long = "try: " + "x" * 300
    with os.fdopen(slave, "w", buffering=1) as stream:
        view = StartView(stream, clock=clock)
        view.wait_for(["a is loading"])
        clock.now += 7
        view.line(long)
        time.sleep(4 / REFRESHES_PER_SECOND)
        view.close()
        shown = b""
        while select.select([master], [], [], 0.2)[0]:  # A terminal hands over a few kilobytes at a time.
            shown += os.read(master, 65536)
    os.close(master)
    assert b"a is loading 7 s" in shown
    frames = set(re.findall(rb"[-\\|/](?= a is loading)", shown))
    assert len(frames) > 1, "it turns"
    assert long.encode() in shown
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l"), "the cursor is back"


def test_a_reader_that_has_gone_away_is_not_an_error() -> None:
    """Of a pipe and of a terminal: what is served does not depend on who watches."""
    for reading, writing in (os.pipe(), pty.openpty()):
        stream = os.fdopen(writing, "w", buffering=1)
        view = StartView(stream)
        os.close(reading)
        for _ in range(2):
            view.event("Ray is up")
            view.wait_for(["a is loading"])
        view.last_words("ends at once")
        view.close()
        with contextlib.suppress(OSError):
            stream.close()


def test_last_words_wait_for_nobody() -> None:
    """Neither for the lock nor for a reader that does not read."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w", buffering=1) as stream:
        view = StartView(stream)
        with view._lock:
            view.last_words("ends at once")
        assert os.read(reader.fileno(), 100).endswith(b"s] ends at once\n")
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 65536)
        os.set_blocking(writing, True)
        view.last_words("is lost")
