"""Who is admitted next: the owners of waiting sequences take turns, and each owner's own wait in order.

Law: between two sequences of one owner, every other owner that waits is served once. So a request of a hundred choices
delays a request of one by one turn, not by a hundred.
"""

from collections import deque
from collections.abc import Collection, Iterator

from serve_app.engines.pt.core.sequence import Sequence


class FairQueue:
    """Sequences that wait, in the order in which they will be admitted."""

    def __init__(self) -> None:
        self._first: deque[Sequence] = deque()
        self._lines: dict[object, deque[Sequence]] = {}  # The owner whose turn it is comes first.

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of its owner's line. A new owner's turn comes after all others'."""
        self._lines.setdefault(sequence.owner, deque()).append(sequence)

    def put_back(self, sequences: Collection[Sequence]) -> None:
        """Puts sequences, in order, before all that wait: they were admitted once."""
        self._first.extendleft(reversed(list(sequences)))

    @property
    def head(self) -> Sequence | None:
        """The next one; None where nobody waits."""
        if self._first:
            return self._first[0]
        return next(iter(self._lines.values()))[0] if self._lines else None

    def pop(self) -> Sequence:
        """Takes the head out; its owner's next turn comes after everybody else's. Raises IndexError when empty."""
        if self._first or not self._lines:
            return self._first.popleft()
        owner, line = next(iter(self._lines.items()))
        del self._lines[owner]
        sequence = line.popleft()
        if line:
            self._lines[owner] = line
        return sequence

    def remove(self, gone: Collection[Sequence]) -> None:
        """Takes sequences out; those that do not wait here are left alone."""
        if any(sequence in gone for sequence in self._first):
            self._first = deque(sequence for sequence in self._first if sequence not in gone)
        for owner in {sequence.owner for sequence in gone} & self._lines.keys():
            line = deque(sequence for sequence in self._lines[owner] if sequence not in gone)
            if line:
                self._lines[owner] = line
            else:
                del self._lines[owner]

    def __len__(self) -> int:
        return len(self._first) + sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._first
        lines = [deque(line) for line in self._lines.values()]
        while lines:
            for line in lines:
                yield line.popleft()
            lines = [line for line in lines if line]
