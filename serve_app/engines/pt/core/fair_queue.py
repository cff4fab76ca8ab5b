"""Decides who is admitted next: the owners of waiting sequences take turns, and each owner's own wait in order.

Its law is that between two sequences of one owner, every other owner that waits is served once. So a request of a
hundred choices delays a request of one choice by one turn and not by a hundred.
"""

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from typing import Generic, Protocol, TypeVar


class Owned(Protocol):
    """Is what waits: a sequence, or an input that is computed at once."""

    @property
    def owner(self) -> object:
        """Returns whose it is, by which all that is of one owner waits in one line."""
        ...


Item = TypeVar("Item", bound=Owned)


class FairQueue(Generic[Item]):
    """Holds sequences that wait, in the order in which they will be admitted."""

    def __init__(self) -> None:
        self._lines: OrderedDict[object, deque[Item]] = OrderedDict()  # The owner whose turn it is comes first.

    def add(self, sequence: Item) -> None:
        """Puts a sequence at the end of its owner's line. A new owner's turn comes after all others'."""
        self._lines.setdefault(sequence.owner, deque()).append(sequence)

    def put_back(self, sequences: Collection[Item], *, first: bool) -> None:
        """Puts sequences, in order, at the head of their owners' lines. If they are `first`, their turns come before
        all others'. Otherwise their owners keep their turns, or take the last ones as new owners do."""
        for sequence in sequences:
            self._lines.setdefault(sequence.owner, deque())
        for sequence in reversed(list(sequences)):
            self._lines[sequence.owner].appendleft(sequence)
            if first:
                self._lines.move_to_end(sequence.owner, last=False)

    def head(self) -> Item | None:
        """Returns the next sequence, or None if none waits."""
        return next((line[0] for line in self._lines.values()), None)

    def turns(self) -> Iterator[Item]:
        """Yields the head of each line in turn, once. A head may be taken before the next one is asked for, and then
        the next of its owner comes after all others. Nothing else may change meanwhile."""
        owners = deque(self._lines)
        while owners:
            owner = owners.popleft()
            head = self._lines[owner][0]
            yield head
            left = self._lines.get(owner)
            if left is not None and left[0] is not head:
                owners.append(owner)

    def take(self, sequence: Item) -> None:
        """Removes the first of its owner's line, whose next turn then comes after all others'."""
        line = self._lines.pop(sequence.owner)
        line.popleft()
        if line:
            self._lines[sequence.owner] = line

    def remove(self, gone: Collection[Item]) -> None:
        """Removes sequences, and ignores those that do not wait here."""
        for owner in {sequence.owner for sequence in gone} & self._lines.keys():
            line = deque(sequence for sequence in self._lines[owner] if sequence not in gone)
            if line:
                self._lines[owner] = line
            else:
                del self._lines[owner]

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Item]:
        lines = [deque(line) for line in self._lines.values()]
        while lines:
            for line in lines:
                yield line.popleft()
            lines = [line for line in lines if line]
