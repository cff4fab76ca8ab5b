"""Groups of rows: whatever the slots of a pass are, each row is multiplied with its own slot's factors, once."""

import random

from serve_app.engines.adapter_groups import MOST_FILLED, Groups, groups_of


def added(groups: Groups, count: int) -> dict[int, int]:
    """The slot that is added to each row of the output, by walking through the numbers as the products do."""
    take = range(count) if groups.take is None else groups.take
    assert len(take) == len(groups.slots) * groups.size, "the groups have one size"
    filled = groups.filled or [False] * len(take)
    assert len(filled) == len(take)
    found: dict[int, int] = {}
    for place, row in enumerate(take):
        if not filled[place]:
            assert row not in found, "nothing is added twice"
            found[row] = groups.slots[place // groups.size]
    return found


def test_every_row_gets_its_own_slot_for_any_mix() -> None:
    """What is computed for nothing has a bound, too."""
    draw = random.Random(5)
    for _ in range(3000):
        slots = draw.choice((1, 2, 8, 16))
        weights = [draw.random() ** 4 for _ in range(slots + 1)]
        rows = draw.choices([None, *range(slots)], weights, k=draw.randint(1, 40))
        used = draw.getrandbits(slots) & sum(1 << slot for slot in set(rows) if slot is not None)
        if not used:
            continue
        groups = groups_of(rows, used)
        wanted = {row: slot for row, slot in enumerate(rows) if slot is not None and used >> slot & 1}
        assert added(groups, len(rows)) == wanted
        # What is computed for nothing has a bound, however many rows one adapter has.
        assert len(groups.slots) * groups.size <= max(
            MOST_FILLED * len(wanted), len(wanted) + 2 * len(set(wanted.values()))
        )
        if groups.is_range:
            assert list(groups.slots) == list(range(groups.slots[0], groups.slots[-1] + 1))


def test_rows_of_one_adapter_need_no_numbers() -> None:
    """Nothing is copied then."""
    assert groups_of([3, 3, 3], 1 << 3) == Groups((3,), 3, None, None, is_range=True)


def test_one_large_group_among_small_ones_is_split() -> None:
    """Small groups are not filled up to its size."""
    groups = groups_of([0] * 30 + list(range(1, 16)), 2**16 - 1)
    assert not groups.is_range
    assert len(groups.slots) * groups.size <= 75
