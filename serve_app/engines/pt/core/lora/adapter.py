"""Defines an adapter in the host's memory, ready to be copied to a slot of the devices."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import torch

_versions = count(1)


class Factors(NamedTuple):
    """These are the two factors of one module: `a` of shape (rank, inputs), and `b` of shape (rank, outputs), which is
    multiplied by the adapter's scaling."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(eq=False)
class Adapter:
    """This is one adapter by the names of the modules that it changes. `rank` is the largest rank of these, and
    `digest` tells whether its files are the same as before.

    `version` differs for any two adapters of this process, also for two of one name. What is kept of a text, such as
    its keys and values, belongs to the version that it was computed with. `factors` is None while the host's memory
    does not keep them.
    """

    name: str
    factors: Mapping[str, Factors] | None
    rank: int = 0
    digest: str = ""
    version: int = field(default_factory=lambda: next(_versions))

    @property
    def bytes(self) -> int:
        """Returns the bytes that it takes of the host's memory."""
        return sum(factors.a.nbytes + factors.b.nbytes for factors in (self.factors or {}).values())
