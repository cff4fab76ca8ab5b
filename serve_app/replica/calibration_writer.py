"""Adds what a replica was measured to hold to this machine's file of calibrations (`facts/calibration.py`)."""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from serve_app.facts.calibration import Calibrations, calibration_file, joined, read_calibrations

# A process waits this many seconds for another one that writes.
LOCK_TIMEOUT_S = 2.0


def write_calibrations(found: Calibrations, file: Path | None = None) -> bool:
    """Adds figures to the file, and returns whether they changed it. Raises OSError if it cannot be written.

    Processes write one after the other, and a reader sees the old file or the new one.
    """
    target = file or calibration_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_suffix(".lock")):
        before = read_calibrations(target)
        after = joined(before, found)
        if after == before:
            return False
        new = target.with_suffix(".new")
        new.write_text(_as_json(after))
        new.replace(target)
        return True


def _as_json(found: Calibrations) -> str:
    return json.dumps([asdict(found[key]) for key in sorted(found)], indent=1) + "\n"


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Holds the lock meanwhile. Raises TimeoutError, an OSError, if another process does not release it."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{lock} is held by another process") from None
                time.sleep(0.01)
        yield
