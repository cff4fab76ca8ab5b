"""An event loop whose clock jumps: when everything waits, the next timer is due. No test waits real seconds by it.

A module of a folder whose `conftest.py` has the hook below asks for it with `USES_VIRTUAL_CLOCK = True`.

While a thread works for the loop (`run_in_executor`), the clock stands still. Threads that the loop has not started,
such as an engine's, are unknown to it: tests of those keep real time.
"""

import asyncio
import selectors
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

import pytest


class _Selector(selectors.DefaultSelector):
    """Instead of waiting for `timeout` seconds it moves the clock by them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.threads = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        """Ready files at once; none after a jump."""
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        if self.threads:
            return super().select(None)
        found = super().select(0)
        if not found:
            self.now += timeout
        return found


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own, in seconds from 0."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        """The clock."""
        return self._clock.now

    def run_in_executor(self, executor: Executor | None, func: Callable[..., Any], *args: Any) -> Any:
        """As any loop does; the clock stands still until the thread is done."""
        self._clock.threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._returned)
        return future

    def _returned(self, _: object) -> None:
        self._clock.threads -= 1


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """A hook of pytest-asyncio: which event loop a test gets."""
    if getattr(getattr(item, "module", None), "USES_VIRTUAL_CLOCK", False):
        return {"virtual": VirtualClockLoop}
    return {"real": asyncio.new_event_loop}
