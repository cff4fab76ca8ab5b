"""Finds which models of a pool can hold its memory at one time.

A set of models fits if each has one of its leases so that no device is leased beyond its budget. A set is maximal if no
other model fits beside it. The search is bounded: where devices are many and models alike, it may end before it has
found all sets, and says so. Every set that it returns fits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# These are bytes by the `id` of a device.
Bytes = Mapping[str, int]

MOST_SHOWN = 10
# The search looks at so many partial sets, and keeps so many ways to spread one over the devices.
MOST_STEPS, MOST_WAYS = 20_000, 64

# This is the room that is left on each device, in the order of the budget's devices.
_Room = tuple[int, ...]


@dataclass(frozen=True)
class ResidentSets:
    """These are the maximal sets, those of most models first, and of these the one that takes most bytes. `more` were
    found beside those `shown`, and `is_cut` says that there may be others."""

    shown: tuple[tuple[str, ...], ...]
    more: int = 0
    is_cut: bool = False

    @property
    def are_all_together(self) -> bool:
        """Returns whether one set holds all models, so that none has to leave."""
        return len(self.shown) == 1 and not self.more and not self.is_cut


def resident_sets(leases: Mapping[str, Sequence[Bytes]], budget: Bytes) -> ResidentSets:
    """Returns the maximal sets of models that fit into the budget together. `leases` has the ways in which each model
    can be resident, the best first. A model that does not fit alone is in no set."""
    search = _Search(leases, budget)
    search.run()
    found = sorted(search.found, key=lambda names: (-len(names), -search.size(names), names))
    return ResidentSets(tuple(found[:MOST_SHOWN]), max(0, len(found) - MOST_SHOWN), search.is_cut)


class _Search:
    """Looks at the models from the smallest to the largest, and with each at first, so that the largest sets are found
    before the bound is reached."""

    def __init__(self, leases: Mapping[str, Sequence[Bytes]], budget: Bytes):
        self._devices = tuple(budget)
        self._options = {
            name: [self._row(option) for option in options if option.keys() <= budget.keys()]
            for name, options in leases.items()
        }
        whole = frozenset({self._row(budget)})
        alone = [name for name in leases if self._with(whole, name)]
        self._names = sorted(alone, key=lambda name: (self._least(name), name))
        self._whole = whole
        self._steps = 0
        self.found: list[tuple[str, ...]] = []
        self.is_cut = False

    def run(self) -> None:
        """Fills `found`."""
        if self._names:
            self._extend(0, (), (), self._whole)

    def size(self, names: Sequence[str]) -> int:
        """Returns the bytes that models take by their best leases."""
        return sum(sum(self._options[name][0]) for name in names)

    def _extend(self, at: int, chosen: tuple[str, ...], left: tuple[str, ...], ways: frozenset[_Room]) -> None:
        self._steps += 1
        if self._steps > MOST_STEPS:
            self.is_cut = True
            return
        if at == len(self._names):
            if not any(self._with(ways, name) for name in left):
                self.found.append(tuple(sorted(chosen)))
            return
        name = self._names[at]
        if more := self._with(ways, name):
            self._extend(at + 1, (*chosen, name), left, more)
        if more and self._fit(more, self._names[at + 1 :]):
            return  # It fits beside whatever comes, so no maximal set is without it.
        self._extend(at + 1, chosen, (*left, name), ways)

    def _fit(self, ways: frozenset[_Room], names: Sequence[str]) -> bool:
        for name in names:
            ways = self._with(ways, name)
            if not ways:
                return False
        return True

    def _with(self, ways: frozenset[_Room], name: str) -> frozenset[_Room]:
        """Returns the room that is left if a model comes too, for each way in which it can."""
        found = {
            tuple(room - size for room, size in zip(way, option, strict=True))
            for way in ways
            for option in self._options[name]
            if all(size <= room for room, size in zip(way, option, strict=True))
        }
        if len(found) > MOST_WAYS:
            self.is_cut = True
        return frozenset(sorted(found, reverse=True)[:MOST_WAYS])

    def _row(self, lease: Bytes) -> _Room:
        return tuple(lease.get(device, 0) for device in self._devices)

    def _least(self, name: str) -> int:
        return min(map(sum, self._options[name]))
