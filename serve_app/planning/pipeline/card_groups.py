"""Makes stages of equal cards. A tensor parallel group waits for its slowest card and has the room of its smallest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from serve_app.planning.pipeline.stage import Rooms, StageCards


@dataclass(frozen=True)
class Card:
    """This is one card of a node. Cards are equal if their `name` and `total_bytes` are. `rooms` and `bandwidth` are as
    for `StageCards`."""

    id: str
    name: str
    total_bytes: int
    rooms: Rooms
    bandwidth: int | None = None


def groups_of(cards: Sequence[Card], size: int, stages: int) -> Iterator[tuple[StageCards, ...]]:
    """Returns the ways to make so many stages of `size` equal cards each, out of the cards of a node.

    Ways differ in how many stages each kind of card makes. They come one by one, those with the most stages of the
    first kind first, since there can be many. Of the cards of a kind, the roomiest are taken and the next to each other
    in room stand together, because no other choice has a stage with more room for the first, the second and so on.
    Stages come in the order of their first cards.
    """
    kinds: dict[tuple[str, int], list[Card]] = {}
    for card in cards:
        kinds.setdefault((card.name, card.total_bytes), []).append(card)
    order = {card.id: number for number, card in enumerate(cards)}
    groups = [_groups(of_kind, size) for of_kind in kinds.values()]
    for counts in counts_of_kinds([len(each) for each in groups], stages):
        chosen = [group for each, count in zip(groups, counts, strict=True) for group in each[:count]]
        yield tuple(sorted(chosen, key=lambda group: min(order[card] for card in group.ids)))


def _groups(cards: Sequence[Card], size: int) -> list[StageCards]:
    """Returns as many groups of equal cards as there are, the roomiest first."""
    roomiest = sorted(cards, key=lambda card: -card.rooms.middle)
    order = {card.id: number for number, card in enumerate(cards)}
    groups = [roomiest[first : first + size] for first in range(0, len(cards) - len(cards) % size, size)]
    return [group_of(sorted(members, key=lambda card: order[card.id])) for members in groups]


def group_of(members: Sequence[Card]) -> StageCards:
    """Returns equal cards as one stage, which has the room of its smallest."""
    rooms = Rooms(
        min(card.rooms.first for card in members),
        min(card.rooms.middle for card in members),
        min(card.rooms.last for card in members),
        max(card.rooms.layer for card in members),
    )
    return StageCards(tuple(card.id for card in members), rooms, members[0].bandwidth)


def counts_of_kinds(most: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """Returns the ways to take `total` things of kinds of which there are at most so many, most of the first first."""
    if not most:
        if total == 0:
            yield ()
        return
    for count in range(min(most[0], total), max(total - sum(most[1:]), 0) - 1, -1):
        for rest in counts_of_kinds(most[1:], total - count):
            yield (count, *rest)
