"""Finds the cheapest way to cut layers into stages, and the cheapest order of their cards, by dynamic programming.

A state is how many layers are placed and which kinds of cards are left. Cards of one kind can change places without an
effect, so a state has a multiset of kinds and not an order. The cheapest way to a state extends to the cheapest way
to the end, because `max` and `+` never turn a cheaper beginning into a dearer whole. So each state keeps one way, and
the work is at most states × kinds × layers² / 2 extensions. Costs are whole numbers from 0, so equal ways cost the
same.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

# A cost for each (start, end) that a stage of a kind may have. What is missing is not possible.
Costs = Mapping[tuple[int, int], int]
Kinds = tuple[int, ...]
# The ends of stages with their costs, for each start.
Edges = list[list[tuple[int, int]]]
# Joins the cost of a path and of its next stage: `max` or `operator.add`.
Fold = Callable[[int, int], int]


@dataclass(frozen=True)
class Path:
    """This is a way from the first layer to the last: the kind of each stage, and the layer at which each ends."""

    cost: int
    kinds: Kinds
    ends: tuple[int, ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Returns the first layer of each stage and the one after its last."""
        return list(zip((0, *self.ends[:-1]), self.ends, strict=True))


class _Step(NamedTuple):
    """This is the cheapest way to a state: its cost, and the stage that comes last on it."""

    cost: int
    kind: int
    start: int
    left_before: Kinds


def cheapest_path(
    costs: Sequence[Costs], kinds: Kinds, layers: int, fold: Fold, may_reorder: bool
) -> tuple[Path | None, int]:
    """Returns the cheapest path over all layers that has every stage, or None, and how many extensions were compared.

    `costs` has a table for each kind, and `kinds` has the kind of each stage. Of equal paths, the first that was found
    stays.
    """
    edges = [_edges_by_start(table, layers) for table in costs]
    first = tuple(sorted(kinds)) if may_reorder else kinds
    found: dict[Kinds, dict[int, _Step]] = {first: {0: _Step(0, -1, 0, ())}}
    level, compared = [first], 0
    for _ in kinds:
        longer: dict[Kinds, None] = {}
        for left in level:
            for kind, rest in _next_kinds(left, may_reorder):
                steps = found.setdefault(rest, {})
                compared += _extend(steps, found[left], kind, left, edges[kind][not rest], fold)
                longer[rest] = None
        level = list(longer)
    return (_traced(found, layers) if layers in found[()] else None), compared


def most_compared(kinds: Sequence[int], layers: int) -> int:
    """Returns the most extensions that a search over every order of these kinds compares."""
    counts = Counter(kinds)
    states = prod(count + 1 for count in counts.values())
    return states * len(counts) * layers * (layers + 1) // 2


def _edges_by_start(table: Costs, layers: int) -> tuple[Edges, Edges]:
    """Returns the stages by their start, each with its end and cost: those that are not the last one, and the last."""
    inner: Edges = [[] for _ in range(layers)]
    last: Edges = [[] for _ in range(layers)]
    for (start, end), cost in table.items():
        (last if end == layers else inner)[start].append((end, cost))
    return inner, last


def _next_kinds(left: Kinds, may_reorder: bool) -> Iterator[tuple[int, Kinds]]:
    """Returns each kind that may come next, with the kinds that are left then."""
    for number, kind in enumerate(left):
        if number == 0 or (may_reorder and kind != left[number - 1]):
            yield kind, left[:number] + left[number + 1 :]


def _extend(
    steps: dict[int, _Step], before: Mapping[int, _Step], kind: int, left: Kinds, edges: Edges, fold: Fold
) -> int:
    """Adds one stage to every way of a state, keeps the cheapest to each end, and returns how many were compared."""
    compared = 0
    for start, step in before.items():
        if start == len(edges):
            continue
        compared += len(edges[start])
        for end, cost in edges[start]:
            total = fold(step.cost, cost)
            if end not in steps or total < steps[end].cost:
                steps[end] = _Step(total, kind, start, left)
    return compared


def _traced(found: Mapping[Kinds, Mapping[int, _Step]], layers: int) -> Path:
    """Returns the path to the end, found from its end."""
    left: Kinds = ()
    end, kinds, ends = layers, [], []
    cost = found[left][end].cost
    while end:
        step = found[left][end]
        kinds.append(step.kind)
        ends.append(end)
        left, end = step.left_before, step.start
    return Path(cost, tuple(reversed(kinds)), tuple(reversed(ends)))
