"""Counts how many requests wait at each model, and estimates how long the next one would wait, which a refusal says.

It is pure except for the clock, which is passed in. Each router replica has queues of its own.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.config import RouterConfig
from serve_app.errors import Overloaded

# The rate is measured over the answers of the last so many seconds.
RATE_WINDOW_S = 60.0
# A refusal never names less or more than these seconds.
LEAST_RETRY_S, MOST_RETRY_S = 1.0, 120.0
# A refusal names these seconds for a model that has not answered anything yet.
UNKNOWN_RETRY_S = 5.0


class ModelQueue:
    """These are the requests of one model that wait for their first byte, and the rate at which they are answered."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic):
        self.name = name
        self.waiting = 0
        self.held = 0
        self._clock = clock
        self._answered: deque[float] = deque(maxlen=10_000)

    @contextmanager
    def place(self, config: RouterConfig) -> Iterator[None]:
        """Takes a place in the queue. Raises Overloaded when all are taken."""
        if self.waiting >= config.max_waiting_requests:
            raise Overloaded(
                f"{self.waiting} requests wait for '{self.name}' already, which is the limit. Try again later.",
                retry_after_s=self.retry_after_s(),
            )
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    @contextmanager
    def hold(self, config: RouterConfig, retry_after_s: float) -> Iterator[None]:
        """Takes a place among the requests that wait for a model to load. Raises Overloaded when all are taken."""
        if self.held >= config.max_held_requests:
            raise Overloaded(
                f"The model '{self.name}' is loading, and {self.held} requests wait for it already.",
                retry_after_s=retry_after_s,
            )
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    def answered(self) -> None:
        """Notes that one request has its first byte."""
        self._answered.append(self._clock())

    def rate(self) -> float | None:
        """Returns the answers per second, or None if there were fewer than two lately."""
        now = self._clock()
        while self._answered and self._answered[0] < now - RATE_WINDOW_S:
            self._answered.popleft()
        if len(self._answered) < 2:
            return None
        return len(self._answered) / max(now - self._answered[0], 1e-3)

    @property
    def is_idle(self) -> bool:
        """Returns whether nothing waits and nothing was answered lately, so that a new queue would be the same."""
        return not self.waiting and not self.held and self.rate() is None and not self._answered

    def retry_after_s(self) -> float:
        """Returns the seconds until the requests that wait now will have been answered, at the measured rate."""
        rate = self.rate()
        seconds = UNKNOWN_RETRY_S if rate is None else self.waiting / rate
        return min(max(seconds, LEAST_RETRY_S), MOST_RETRY_S)


class Queues(dict[str, ModelQueue]):
    """Holds the queues of all models. One is made when it is asked for, so only a name that is known should be. Those
    that are idle go then, because adapters come and go for ever."""

    def __missing__(self, name: str) -> ModelQueue:
        for idle in [other for other, queue in self.items() if queue.is_idle]:
            del self[idle]
        self[name] = ModelQueue(name)
        return self[name]
