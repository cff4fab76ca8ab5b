"""Defines what is parked: tensors of weights or KV cache that are needed together, and a copy of them.

Law: memory is freed and filled in place. No tensor, view, hook or quantisation state is replaced or told of it, so all
that shares a storage still shares it afterwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

# This is called after each piece that was moved, so that a move that hangs can be told from a long one.
Tick = Callable[[], None]


@dataclass(frozen=True)
class Part:
    """These are the tensors of a layer, or those outside of all layers. A pass reads them after it has called `module`,
    or at any time if that is None."""

    tensors: Sequence[torch.Tensor]
    module: nn.Module | None = None


class MemoryCopy(Protocol):
    """Is a copy of parts on the host. It is made once and serves again and again, since weights do not change."""

    @property
    def bytes(self) -> int:
        """Returns the bytes that the copy takes now."""
        ...

    def save(self, tick: Tick) -> None:
        """Makes the copy, unless it is there. Raises OSError, MemoryError or RuntimeError if it cannot be made."""
        ...

    def free(self) -> None:
        """Frees the memory that was copied."""
        ...

    def restore(self, tick: Tick) -> None:
        """Brings the memory back. Computing may begin when this returns, and waits for what is still on its way.
        Raises OSError, MemoryError or RuntimeError if it cannot be brought back."""
        ...

    def close(self) -> None:
        """Frees the copy."""
        ...
