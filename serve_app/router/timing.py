"""Notes when a request came and was read, sent and answered. Times are those of `time.perf_counter`, in seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.router.upstream.protocol import NotOpen


class Timing:
    """Keeps the times of one request. A step that has not been reached has the time 0."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self.began = clock()
        self.read = self.sent = self.first = 0.0

    def was_read(self) -> None:
        """Notes that the whole body is here."""
        self.read = self._clock()

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Notes when a replica is sent the request. The last try counts. NotOpen means that nothing was sent."""
        before, self.sent = self.sent, self._clock()
        try:
            yield
        except NotOpen:
            self.sent = before
            raise

    def was_answered(self) -> None:
        """Notes that the first piece of the answer is here."""
        self.first = self._clock()

    @property
    def queued_s(self) -> float:
        """Returns the seconds from the body to the try that was answered."""
        return self.sent - self.read

    @property
    def to_first_s(self) -> float:
        """Returns the seconds from the request to the first piece of its answer."""
        return self.first - self.began

    @property
    def streamed_s(self) -> float:
        """Returns the seconds since the first piece."""
        return self._clock() - self.first

    @property
    def total_ms(self) -> float:
        """Returns the milliseconds since the request came."""
        return _milliseconds(self.began, self._clock())

    def header(self) -> str:
        """Returns `server-timing`: the milliseconds of reading the body, in the router's queue, and in the engine."""
        parts = {
            "router": _milliseconds(self.began, self.read),
            "queue": _milliseconds(self.read, self.sent),
            "engine": _milliseconds(self.sent, self._clock()),
        }
        return ", ".join(f"{name};dur={milliseconds:g}" for name, milliseconds in parts.items())


def _milliseconds(since: float, until: float) -> float:
    """Returns the milliseconds between two times, or 0 if one of them was not reached."""
    return round(1000 * (until - since), 1) if since and until else 0.0
