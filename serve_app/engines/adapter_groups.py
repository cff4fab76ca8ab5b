"""Decides how the rows of a pass are multiplied with the adapters in the slots. It is pure, without torch.

Rows of one slot form a group, and all groups are multiplied in one batched product, for which they are filled up to one
size. If the slots in use lie side by side and fill up well, the product reads them where they are. Otherwise large
groups are split, and the factors of each group are gathered first.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

# Rows may be filled up to this many times as many before the groups are split.
MOST_FILLED = 2.0


@dataclass(frozen=True)
class Groups:
    """Says how to multiply. Row `take[i]` of the pass is row i of the groups, `size` of which belong to each of
    `slots`, and row i of the product is added to row `take[i]` of the output. Where `filled[i]` is true, the row only
    fills a group up, and its product counts as zeros.

    `take` and `filled` are None where they would change nothing. `is_range` says that the slots are consecutive.
    """

    slots: tuple[int, ...]
    size: int
    take: tuple[int, ...] | None
    filled: tuple[bool, ...] | None
    is_range: bool

    def place_of(self, count: int) -> dict[int, int]:
        """Returns for the rows of a pass of `count` rows that have a group which row of the groups each is."""
        if self.take is None:
            return {row: row for row in range(count)}
        filled = self.filled or [False] * len(self.take)
        return {row: place for place, (row, fills) in enumerate(zip(self.take, filled, strict=True)) if not fills}


def groups_of(slots: Sequence[int | None], used: int) -> Groups:
    """Returns the groups of a pass whose rows have these slots, or None for the base model. `used` has the bits of the
    slots that count, of which one at least has a row."""
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, slot in enumerate(slots):
        if slot is not None and used >> slot & 1:
            rows_of[slot].append(row)
    first, last = min(rows_of), max(rows_of)
    size, real = max(map(len, rows_of.values())), sum(map(len, rows_of.values()))
    if (last - first + 1) * size <= MOST_FILLED * real:
        return _filled([(slot, rows_of.get(slot, [])) for slot in range(first, last + 1)], size, len(slots), True)
    size = -(-real // len(rows_of))
    parts = [
        (slot, rows[begin : begin + size])
        for slot, rows in sorted(rows_of.items())
        for begin in range(0, len(rows), size)
    ]
    return _filled(parts, size, len(slots), False)


def _filled(parts: Sequence[tuple[int, Sequence[int]]], size: int, count: int, is_range: bool) -> Groups:
    take: list[int] = []
    filled: list[bool] = []
    for _, members in parts:
        missing = size - len(members)
        take += [*members, *[0] * missing]
        filled += [*[False] * len(members), *[True] * missing]
    return Groups(
        tuple(slot for slot, _ in parts),
        size,
        take=None if take == list(range(count)) and not any(filled) else tuple(take),
        filled=tuple(filled) if any(filled) else None,
        is_range=is_range,
    )
