"""Threads for what takes time."""

import asyncio
import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from serve_app.engines.workers import in_thread_of_its_own


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch computes on two threads, as a replica with two CPUs does."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def native_threads() -> set[str]:
    """All threads of this process, OpenMP's too."""
    return set(os.listdir("/proc/self/task"))


def test_openmp_keeps_no_helpers_of_a_load(two_threads: None) -> None:
    """What computes there leaves neither its thread nor the helpers that OpenMP gave to it."""
    before, during = native_threads(), set()
    matrix = torch.randn(512, 512)

    def work() -> int:
        for _ in range(4):
            matrix @ matrix
        during.update(native_threads())
        return threading.get_ident()

    assert asyncio.run(in_thread_of_its_own(work)) != threading.get_ident()
    assert len(during - before) >= 2, "there were no helpers, so the test shows nothing"
    until = time.monotonic() + 5
    while during & native_threads() - before and time.monotonic() < until:
        time.sleep(0.01)
    assert not during & native_threads() - before


def test_errors_are_raised_to_the_caller() -> None:
    """A load that fails says why."""

    def work() -> None:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        asyncio.run(in_thread_of_its_own(work))
