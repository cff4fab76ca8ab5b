"""Multiplies the rows of a pass with the factors of their adapters, in as few operations as it can.

For small models, an operation costs more than what it computes.

Siblings share the choice of rows and the first product. The second product is one of two, which come to the same:
- With several tokens of each row, the groups are multiplied in one batched product, which is added to their rows.
- With one token of each row, on the CPU, each row is a weighted sum of its adapter's second factors. It takes two
  thirds of the time, because nothing is filled up or gathered, and no factors of other slots are read.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from serve_app.engines.adapter_groups import Groups, groups_of
from serve_app.engines.pt.core.lora.bags import Bags, SiblingBags, bags_of
from serve_app.engines.pt.core.lora.buffers import Siblings, Target
from serve_app.engines.torch_internals import weighted_sums

# It adds to an output of shape (rows, tokens × outputs) what the second factors make of an inner product.
Add = Callable[[torch.Tensor, torch.Tensor], None]


class _Grouped:
    """Has the groups of some rows on a device. First factors `a` have the shape (slots, rank × modules, inputs), and
    second factors `b` have (slots, rank, outputs), of the slots in `range`."""

    def __init__(self, groups: Groups, rows: int, device: torch.device):
        first, last = groups.slots[0], groups.slots[-1]
        self.groups, self.rows, self.count = groups, rows, len(groups.slots)
        self.range = slice(first, last + 1) if groups.is_range else slice(None)
        self.slots = None if groups.is_range else torch.tensor(groups.slots, device=device)
        self.take = None if groups.take is None else torch.tensor(groups.take, device=device)
        self.filled = None
        if groups.filled is not None:
            self.filled = torch.tensor(groups.filled, device=device).view(self.count, 1, groups.size, 1)

    def inputs(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Returns the rows of an input in groups, of shape (groups, rows and tokens, inputs)."""
        if x.dtype != a.dtype or x.device != a.device:
            x = x.to(device=a.device, dtype=a.dtype)
        inputs = x.reshape(self.rows, -1)
        if self.take is not None:
            inputs = inputs.index_select(0, self.take)
        return inputs.view(self.count, -1, a.shape[2])

    def factors(self, held: torch.Tensor) -> torch.Tensor:
        """Returns the factors of each group, which are gathered if their slots do not lie side by side."""
        return held if self.slots is None else held.index_select(0, self.slots)

    def add(self, b: torch.Tensor, inner: torch.Tensor, y: torch.Tensor) -> None:
        """Adds to each row of `y` the product of its inner one, of shape (groups, rank, rows and tokens)."""
        added = torch.bmm(inner.transpose(1, 2), self.factors(b)).view(-1, y.shape[1])
        if self.take is None:
            y.add_(added)
        else:  # It does not convert types, as `add_` does.
            y.index_add_(0, self.take, added if added.dtype == y.dtype else added.to(y.dtype))


class _Batched:
    """Is the first product of siblings of whose rows several tokens are computed, or on a GPU."""

    def __init__(self, grouped: _Grouped, a: torch.Tensor):
        self.grouped, self._a, self._modules = grouped, a.flatten(1, 2), a.shape[2]

    def inner(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Returns for each module what `_Grouped.add` takes. Rows that only fill a group up are zeros."""
        grouped, a = self.grouped, self.grouped.factors(self._a)
        inner = torch.bmm(a, grouped.inputs(x, a).transpose(1, 2))
        if grouped.filled is not None:  # It is filled and not multiplied, because what it hides may not be finite.
            inner.view(grouped.count, a.shape[1], grouped.groups.size, -1).masked_fill_(grouped.filled, 0)
        parts: Sequence[torch.Tensor] = torch.unbind(inner.view(grouped.count, -1, self._modules, inner.shape[2]), 2)
        return parts


class _Summed:
    """Is the first product of siblings of whose rows one token is computed on the CPU."""

    def __init__(self, grouped: _Grouped, a: torch.Tensor, bags: SiblingBags):
        self._grouped, self._a, self._bags = grouped, a.flatten(1, 2), bags

    def inner(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Returns for each module the weights of its bags."""
        a = self._grouped.factors(self._a)
        inner = torch.bmm(self._grouped.inputs(x, a), a.transpose(1, 2))
        weights = inner.view(-1).index_select(0, self._bags.pick)
        if len(self._bags.sizes) == 1:
            return (weights,)
        parts: Sequence[torch.Tensor] = torch.split(weights, self._bags.sizes)
        return parts


def _add_sums(b: torch.Tensor, bags: Bags, weights: torch.Tensor, y: torch.Tensor) -> None:
    """Adds to each row of `y` the sum of its bag. `b` has the shape (slots × rank, outputs)."""
    y.add_(weighted_sums(b, bags.indices, bags.offsets, weights))


# This is how one module is multiplied: by number `int` of what the first product gives, and then by `Add`.
Product = tuple[_Batched | _Summed, int, Add]


class RowProducts:
    """Is for one pass, or several with the same rows. `slots` are those of its rows, and `rank` is the largest rank."""

    def __init__(self, slots: Sequence[int | None], rank: int):
        self._slots = slots
        self._rank = rank
        self._used = 0
        for slot in slots:
            self._used |= 0 if slot is None else 1 << slot
        # Layers that are alike share these, by the slots that change their modules.
        self._grouped: dict[tuple[int, torch.device], _Grouped] = {}
        self._bags: dict[tuple[int, ...], SiblingBags] = {}
        # How each module is multiplied, with several tokens of each row and with one. None stands for not at all.
        self._several: dict[Target, Product | None] = {}
        self._single: dict[Target, Product | None] = {}
        self._given: tuple[torch.Tensor, _Batched | _Summed] | None = None
        self._inner: Sequence[torch.Tensor] = ()

    def forget_inputs(self) -> None:
        """Lets go of the last input."""
        self._given, self._inner = None, ()

    def add(self, target: Target, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Returns the output `y` of the module for `x` with what the adapters add to it. Both have the rows of the pass
        first, each with all its tokens."""
        rows = len(self._slots)
        products = self._single if target.sums_up and x.numel() == rows * target.inputs else self._several
        if target not in products:
            self._prepare(target.siblings, products)
        product = products[target]
        if product is None:
            return y
        first, number, add = product
        if self._given is None or self._given[0] is not x or self._given[1] is not first:
            self._inner = first.inner(x)
            self._given = x, first
        y = y.contiguous()
        add(self._inner[number], y.view(rows, -1))
        return y

    def _prepare(self, siblings: Siblings, products: dict[Target, Product | None]) -> None:
        """Decides how siblings are multiplied. If several of them change, the first product is that of all."""
        products.update(dict.fromkeys(siblings.targets))
        changed = [target for target in siblings.targets if target.members & self._used]
        if not changed:
            return
        together = changed if len(changed) == 1 else siblings.targets
        members = tuple(target.members & self._used for target in together)
        grouped = self._groups(members, siblings.a.device)
        begin = together[0].place
        a = siblings.a[grouped.range, : self._rank, begin : begin + len(together)]
        bags = self._bags_of(members, grouped, siblings.a.shape[1]) if products is self._single else None
        first = _Batched(grouped, a) if bags is None else _Summed(grouped, a, bags)
        for number, target in enumerate(together):
            if target not in changed:
                continue
            if bags is None:
                add = partial(grouped.add, target.b[grouped.range, : self._rank])
            else:
                add = partial(_add_sums, target.b.flatten(0, 1), bags.bags[number])
            products[target] = first, number, add

    def _groups(self, members: Sequence[int], device: torch.device) -> _Grouped:
        used = 0
        for bits in members:
            used |= bits
        if (used, device) not in self._grouped:
            self._grouped[used, device] = _Grouped(groups_of(self._slots, used), len(self._slots), device)
        return self._grouped[used, device]

    def _bags_of(self, members: tuple[int, ...], grouped: _Grouped, held_rank: int) -> SiblingBags:
        if members not in self._bags:
            self._bags[members] = bags_of(self._slots, members, grouped.groups, self._rank, held_rank)
        return self._bags[members]
