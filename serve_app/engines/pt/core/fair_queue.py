"""Decides who is admitted next: the owners of waiting sequences take turns, and each owner's own wait in order.

Its law is that between two sequences of one owner, every other owner that waits is served once. So a request of a
hundred choices delays a request of one choice by one turn and not by a hundred.
"""

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator

from serve_app.engines.pt.core.sequence import Sequence


class FairQueue:
    """Holds sequences that wait, in the order in which they will be admitted."""

    def __init__(self) -> None:
        self._lines: OrderedDict[object, deque[Sequence]] = OrderedDict()  # The owner whose turn it is comes first.

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of its owner's line. A new owner's turn comes after all others'."""
        self._lines.setdefault(sequence.owner, deque()).append(sequence)

    def put_back(self, sequences: Collection[Sequence], *, first: bool) -> None:
        """Puts sequences, in order, at the head of their owners' lines. If they are `first`, their turns come before
        all others'. Otherwise their owners keep their turns, or take the last ones as new owners do."""
        for sequence in sequences:
            self._lines.setdefault(sequence.owner, deque())
        for sequence in reversed(list(sequences)):
            self._lines[sequence.owner].appendleft(sequence)
            if first:
                self._lines.move_to_end(sequence.owner, last=False)

    def head(self, skipped: Collection[object] = ()) -> Sequence | None:
        """Returns the next sequence of owners that are not `skipped`, or None if none waits."""
        return next((line[0] for owner, line in self._lines.items() if owner not in skipped), None)

    def take(self, sequence: Sequence) -> None:
        """Removes the first of its owner's line, whose next turn then comes after all others'."""
        line = self._lines.pop(sequence.owner)
        line.popleft()
        if line:
            self._lines[sequence.owner] = line

    def remove(self, gone: Collection[Sequence]) -> None:
        """Removes sequences, and ignores those that do not wait here."""
        for owner in {sequence.owner for sequence in gone} & self._lines.keys():
            line = deque(sequence for sequence in self._lines[owner] if sequence not in gone)
            if line:
                self._lines[owner] = line
            else:
                del self._lines[owner]

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        lines = [deque(line) for line in self._lines.values()]
        while lines:
            for line in lines:
                yield line.popleft()
            lines = [line for line in lines if line]
