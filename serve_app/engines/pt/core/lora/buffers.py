"""Has the slots of adapters beside the modules of a model: tensors, and which slots change what.

Modules that are given the same input, such as the projections of queries, keys and values, are siblings. Their first
factors lie in one tensor, so one product computes the first half of all of them.
"""

import torch

from serve_app.engines.pt.core.lora.adapter import Factors


class Siblings:
    """Has the first factors of `count` modules with the same input: `a` of shape (slots, rank, modules, inputs).

    The modules come after the rank, so those of a smaller rank lie together for all of them.
    """

    def __init__(self, count: int, inputs: int, slots: int, rank: int, dtype: torch.dtype, device: torch.device):
        self.a = torch.zeros(slots, rank, count, inputs, dtype=dtype, device=device)
        self.targets: list[Target] = []

    def add(self, outputs: int) -> "Target":
        """Returns the buffers of the next module."""
        target = Target(self, len(self.targets), outputs)
        self.targets.append(target)
        return target


class Target:
    """Has the second factors of one module: `b` of shape (slots, rank, outputs). `members` has the bits of the slots
    whose adapters change the module."""

    def __init__(self, siblings: Siblings, place: int, outputs: int):
        slots, rank = siblings.a.shape[:2]
        self.siblings, self.place, self.inputs = siblings, place, siblings.a.shape[3]
        self.sums_up = siblings.a.device.type == "cpu"  # On GPUs it was not measured, so they batch.
        self.a = siblings.a[:, :, place]
        self.b = siblings.a.new_zeros(slots, rank, outputs)
        self.members = 0

    def write(self, slot: int, factors: Factors | None) -> None:
        """Puts the factors of an adapter, or none, into a slot. What they leave of its rank becomes zeros."""
        self.members &= ~(1 << slot)
        if factors is None:
            self.a[slot].zero_()  # Siblings may be computed for this slot, and this module then adds zeros.
            self.b[slot].zero_()
            return
        for buffer, factor in zip((self.a, self.b), factors, strict=True):
            rank = factor.shape[0]
            buffer[slot, :rank].copy_(factor, non_blocking=True)
            buffer[slot, rank:].zero_()
        self.members |= 1 << slot
