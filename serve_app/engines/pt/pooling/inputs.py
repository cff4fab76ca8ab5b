"""Defines what a step computes: texts and pairs of texts as token ids."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Input:
    """This is one text, or a pair of texts, as the model reads it.

    `types` says which of the two texts each token is of, for models that ask for it. The first `skipped` tokens are
    computed and not pooled, and at least one token is. Inputs of one `owner` wait in one line.
    """

    ids: Ids
    owner: object
    types: Ids | None = None
    skipped: int = 0

    def __len__(self) -> int:
        return int(self.ids.size)
