"""Stages are made of equal cards, and no other choice of cards has roomier ones."""

from collections.abc import Sequence
from itertools import combinations, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.planning.pipeline.card_groups import Card, groups_of
from serve_app.planning.pipeline.stage import Rooms

GIB = 2**30


def card(number: int, total: int, room: int | None = None, name: str = "card") -> Card:
    """A card of so many GiB."""
    free = (total if room is None else room) * GIB
    return Card(f"n1:{number}", name, total * GIB, Rooms(free, free, free - GIB), bandwidth=total * 10)


def ids(cards: Sequence[Card], size: int, stages: int) -> list[list[str]]:
    """The cards of each stage, by their numbers, of each way."""
    return [
        ["+".join(each.removeprefix("n1:") for each in group.ids) for group in way]
        for way in groups_of(cards, size, stages)
    ]


def test_two_pairs_of_equal_cards_are_two_stages_of_two() -> None:
    """24+24+16+16, in whatever order they are built in."""
    assert ids([card(0, 24), card(1, 24), card(2, 16), card(3, 16)], 2, 2) == [["0+1", "2+3"]]
    assert ids([card(0, 24), card(1, 16), card(2, 24), card(3, 16)], 2, 2) == [["0+2", "1+3"]]


def test_cards_of_one_size_and_two_names_are_not_equal() -> None:
    """Each rank of a tensor parallel group would wait for the slower card."""
    assert ids([card(0, 24, name="a"), card(1, 24, name="b")], 2, 1) == []
    assert ids([card(0, 24, name="a"), card(1, 24, name="b")], 1, 2) == [["0", "1"]]


def test_ways_differ_in_how_many_stages_each_kind_makes() -> None:
    """Most of the first kind come first. What no way can make has none."""
    cards = [card(0, 24), card(1, 24), card(2, 24), card(3, 16), card(4, 16)]
    assert ids(cards, 1, 3) == [["0", "1", "2"], ["0", "1", "3"], ["0", "3", "4"]]
    assert ids(cards, 2, 2) == [["0+1", "3+4"]]
    assert ids(cards, 2, 3) == ids(cards, 4, 1) == []


def test_the_roomiest_cards_of_a_kind_stand_together() -> None:
    """A group has the room of its fullest card."""
    cards = [card(0, 24, room=10), card(1, 24, room=22), card(2, 24, room=11), card(3, 24, room=20)]
    (way,) = groups_of(cards, 2, 2)
    assert [(group.ids, group.rooms.middle // GIB, group.rooms.last // GIB) for group in way] == [
        (("n1:0", "n1:2"), 10, 9),
        (("n1:1", "n1:3"), 20, 19),
    ]
    assert way[0].bandwidth == 240
    assert ids(cards, 2, 1) == [["1+3"]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 24), min_size=2, max_size=7), st.integers(1, 3), st.integers(1, 3))
def test_no_other_groups_of_a_kind_are_roomier(rooms: list[int], size: int, stages: int) -> None:
    """Place by place, when both are sorted: against every choice of disjoint groups."""
    cards = [card(number, 24, room) for number, room in enumerate(rooms)]
    ways = list(groups_of(cards, size, stages))
    assert len(ways) == (len(cards) >= size * stages)
    if not ways:
        return
    best = sorted((group.rooms.middle // GIB for group in ways[0]), reverse=True)
    for others in _disjoint(range(len(rooms)), size, stages):
        theirs = sorted((min(rooms[number] for number in group) for group in others), reverse=True)
        assert all(ours >= other for ours, other in zip(best, theirs, strict=True))


def _disjoint(numbers: Sequence[int], size: int, count: int) -> list[list[tuple[int, ...]]]:
    if count == 0:
        return [[]]
    return [
        [group, *rest]
        for group in combinations(numbers, size)
        for rest in _disjoint([each for each in numbers if each not in group and each > group[0]], size, count - 1)
    ]


@pytest.mark.parametrize("kinds", [40])
def test_many_ways_come_one_by_one(kinds: int) -> None:
    """There are 137,846,528,820 of them here, and who takes some waits for no others."""
    cards = [card(number, number + 8) for number in range(kinds)]
    assert len(list(islice(groups_of(cards, 1, kinds // 2), 3))) == 3
