"""Threads for what takes time."""

import asyncio
import os
import threading
import time

import pytest

from serve_app.engines.workers import in_thread_of_its_own


def test_the_thread_of_a_load_has_ended() -> None:
    """OpenMP keeps a thread's helpers for as long as the thread lives, so it must be gone when its work is done."""

    native = asyncio.run(in_thread_of_its_own(threading.get_native_id))
    assert native != threading.get_native_id()
    until = time.monotonic() + 5  # The kernel may list a thread for a moment after Python has joined it.
    while str(native) in os.listdir("/proc/self/task") and time.monotonic() < until:
        time.sleep(0.01)
    assert str(native) not in os.listdir("/proc/self/task")


def test_errors_are_raised_to_the_caller() -> None:
    """A load that fails says why."""

    def work() -> None:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        asyncio.run(in_thread_of_its_own(work))
