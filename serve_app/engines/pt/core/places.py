"""Counts the places of one model: how many sequences may run or wait at once, and who holds them.

A request takes its places before anything is built for it, and all at once. So requests that arrive together cannot
pass the bound together. All of this is used on one event loop.

A request of several sequences leaves the last places to requests of one, unless it is alone. Otherwise a client that
sends many prompts at once would fill the queue to the last place, and others would be refused.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Self

from serve_app.engines.pt.core.lora.registry import Lease
from serve_app.errors import InvalidRequest, Overloaded

# The times of this many returned places give the rate.
RATE_WINDOW = 32
# This share of the places is left to requests of one sequence.
SHARE_OF_SINGLES = 1 / 8


class Places:
    """All places of the model `name`. `most` is their number, and `clock` returns seconds."""

    def __init__(self, name: str, most: int, clock: Callable[[], float] = time.monotonic):
        self._name = name
        self.most = most
        self.taken = 0
        self._clock = clock
        self._returns: deque[float] = deque(maxlen=RATE_WINDOW)

    def reserve(self, count: int, lease: Callable[[], Lease] | None = None) -> "Reservation":
        """Takes `count` places. Use the reservation as a context manager, whose end gives back what is left of it.
        `lease` takes the request's adapter, if it has one, for as long as it has places.

        Raises Overloaded, with the time that the queue needs at the measured rate, if so many are not free now, and
        InvalidRequest if they can never be.
        """
        if count > self.most:
            raise InvalidRequest(
                f"The request asks for {count} sequences (prompts times n), but the model takes at most {self.most} at "
                "once. Send several requests."
            )
        left = int(self.most * SHARE_OF_SINGLES) if count > 1 and self.taken else 0
        over = self.taken + count - (self.most - left)
        if over > 0:
            raise Overloaded(
                f"The model '{self._name}' has {self.taken} sequences already and takes at most {self.most}"
                + (f", of which the last {left} are for requests of one." if left else "."),
                retry_after_s=self._seconds_per_place() * over,
            )
        held = None if lease is None else lease()
        self.taken += count
        return Reservation(self, count, held)

    def give_back(self, count: int) -> None:
        """Frees places. Only a reservation calls this."""
        self.taken -= count
        self._returns += [self._clock()] * min(count, RATE_WINDOW)
        if not self.taken:
            self._returns.clear()  # The rate is measured while busy, and idle time does not count.

    def _seconds_per_place(self) -> float:
        if len(self._returns) < 2:
            return 1.0
        return (self._returns[-1] - self._returns[0]) / (len(self._returns) - 1)


class Reservation:
    """Holds the places of one request, and the lease of its adapter, which is None for the base model."""

    def __init__(self, places: Places, count: int, lease: Lease | None = None):
        self._places = places
        self._left = count
        self.lease = lease

    @property
    def adapter_name(self) -> str | None:
        """Returns the name of the request's adapter, also if it was removed meanwhile, or None for the base model."""
        return None if self.lease is None else self.lease.entry.adapter.name

    def release(self, count: int = 1) -> None:
        """Gives `count` places back for sequences that have ended before the others, but no more than are left."""
        count = min(count, self._left)
        if count:
            self._left -= count
            self._places.give_back(count)
        if not self._left and self.lease is not None:
            self.lease.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release(self._left)
