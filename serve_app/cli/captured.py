"""Keeps the terminal for our own lines: whatever this process and the libraries in it print goes to a log file.

Ray's C++ code, warnings of libraries and what Ray forwards from its workers all end in the two standard streams, so
their file descriptors become a pipe. A thread reads it line by line into a file that is bounded and private.
"""

import contextlib
import errno
import logging
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from serve_app.errors import ConfigError
from serve_app.facts.calibration import calibration_file
from serve_app.terminal import MARK

# A log consists of its file and the one before it. This many logs of earlier starts are kept.
MOST_LOG_BYTES = 10_000_000
MOST_LOGS = 10
# A longer line is cut into pieces.
MOST_LINE_CHARACTERS = 16_384
# Seconds that the last lines may take to be written at the end.
LAST_LINES_S = 1.0
# What Ray puts before a worker's line: the actor's name, the process, and the address where it is on another node.
WORKER_LINE = re.compile(
    rf"^\((?:ServeReplica:(?P<application>[^:)]*):\S* )?[^()]*pid=[^()]*\) {re.escape(MARK)}(?P<text>.*)$"
)


class PrivateFile(RotatingFileHandler):
    """This is a bounded log that only its user can read, even if a file of that name existed before."""

    def _open(self) -> TextIOWrapper:
        # No link is followed, because another user may have made it, in a folder such as /tmp.
        file = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        if stat.S_ISREG(os.fstat(file).st_mode):  # /dev/null belongs to all users.
            os.fchmod(file, 0o600)
        return os.fdopen(file, "a", encoding="utf-8", errors="replace")


def new_log_file() -> Path:
    """Returns the path of a new log in the cache folder, and removes the oldest logs.

    Raises ConfigError if the folder cannot be written.
    """
    folder = calibration_file().parent / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for old in sorted(folder.glob("run-*.log"))[: -(MOST_LOGS - 1)]:
            for file in (old, old.with_name(f"{old.name}.1")):
                file.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}. Give the log another place with --log-file.") from None
    return folder / f"run-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


@contextlib.contextmanager
def captured(file: Path, told: Callable[[str], None]) -> Iterator[TextIO]:
    """Sends both standard streams of this process to `file` meanwhile, and yields a stream to the former stdout.

    `told` gets each line that a worker meant for the terminal (`terminal.notify`), in the thread that reads.
    Raises ConfigError if the file cannot be written.
    """
    try:
        log = PrivateFile(file, maxBytes=MOST_LOG_BYTES, backupCount=1)
    except OSError as error:
        reason = "it is a link. Name the file itself" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(f"--log-file: {file}: {reason}.") from None
    log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    _flush()
    saved = os.dup(1), os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)
    thread = threading.Thread(target=_keep, args=(reading, log, told), name="serve-app-log", daemon=True)
    thread.start()
    terminal = os.fdopen(saved[0], "w", buffering=1, encoding=sys.stdout.encoding, errors="replace")
    try:
        yield terminal
    finally:
        _flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        os.close(saved[1])
        with contextlib.suppress(OSError):  # It may hold text for a reader that has gone away.
            terminal.close()
        thread.join(LAST_LINES_S)  # A process that Ray has left behind may hold the pipe open.


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _keep(reading: int, log: PrivateFile, told: Callable[[str], None]) -> None:
    """Writes every line until no writer is left. If the disk is full, lines are lost, but nothing stops."""
    logging.raiseExceptions = False  # Its report would go to the stream that this function reads.
    with os.fdopen(reading, encoding="utf-8", errors="replace") as stream:
        while line := stream.readline(MOST_LINE_CHARACTERS):
            text = line.rstrip("\n")
            log.handle(logging.makeLogRecord({"msg": text}))
            if (found := WORKER_LINE.match(text)) is not None:
                with contextlib.suppress(Exception):  # If this thread ended, every later write would be an EPIPE.
                    told(f"{found['application']}: {found['text']}" if found["application"] else found["text"])
    log.close()
