"""Has the numbers by which rows of one token are sums of second factors, weighted with what the first product gave.

The terms of a row are its bag: one for each rank of its adapter. A row without an adapter, or whose adapter does not
change the module, has an empty bag, whose sum is zeros.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from serve_app.engines.adapter_groups import Groups


class Bags(NamedTuple):
    """Is one module's. Term i is row `indices[i]` of the factors, which have the shape (slots × rank, outputs), and the
    terms of row r are those from `offsets[r]` to `offsets[r + 1]`."""

    indices: torch.Tensor
    offsets: torch.Tensor


class SiblingBags(NamedTuple):
    """Has the bags of modules with the same input, and where the weights of their terms are: at the numbers `pick` of
    the first product, `sizes[i]` of them for module i, one module after the other."""

    pick: torch.Tensor
    sizes: Sequence[int]
    bags: Sequence[Bags]


def bags_of(
    slots: Sequence[int | None], members: Sequence[int], groups: Groups, rank: int, held_rank: int
) -> SiblingBags:
    """Returns the bags of rows with these slots, for modules that the slots of these bits change.

    The first product has the shape (groups, rows, rank, modules), and `held_rank` is the rank of the buffers.
    """
    place_of = groups.place_of(len(slots))
    ranks = torch.arange(rank)
    picks, bags = [], []
    for number, bits in enumerate(members):
        rows = [row for row, slot in enumerate(slots) if slot is not None and bits >> slot & 1]
        places, held = (_numbers(found) for found in ([place_of[row] for row in rows], [slots[row] for row in rows]))
        counts = torch.zeros(len(slots) + 1, dtype=torch.long)
        counts[_numbers(rows) + 1] = rank
        picks.append(((places[:, None] * rank + ranks) * len(members) + number).flatten())
        bags.append(Bags((held[:, None] * held_rank + ranks).flatten(), counts.cumsum(0)))
    return SiblingBags(torch.cat(picks), [len(pick) for pick in picks], bags)


def _numbers(found: Sequence[int | None]) -> torch.Tensor:
    return torch.tensor(found, dtype=torch.long)
