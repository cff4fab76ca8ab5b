"""Which sequences run in the next step. Pure bookkeeping: no torch, no threads, no clock.

Law: first come, first served; a sequence that runs keeps its place until it ends; at most `max_num_seqs` run.
"""

from collections import deque

from serve_app.engines.pt.sequence import Sequence


class Scheduler:
    """A queue of waiting sequences, and those that run."""

    def __init__(self, max_num_seqs: int):
        self._max_num_seqs = max_num_seqs
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue."""
        self._waiting.append(sequence)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step, in the order in which they came."""
        while self._waiting and len(self._running) < self._max_num_seqs:
            self._running.append(self._waiting.popleft())
        return list(self._running)

    def remove(self, sequence: Sequence) -> bool:
        """Takes a sequence out, waiting or running; False when it is not here any more."""
        if sequence in self._running:
            self._running.remove(sequence)
            return True
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return True
        return False

    @property
    def sequences(self) -> list[Sequence]:
        """All of them, running first."""
        return [*self._running, *self._waiting]

    @property
    def running(self) -> int:
        """How many run."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)
