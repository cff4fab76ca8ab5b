"""Holds the slots of LoRA adapters beside the modules of a model, and adds to each row of a pass what its adapter says.

Laws:
- The buffers are made once: for each module that adapters may change, `count` slots of `rank` on the module's device.
  So what adapters take is known before any of them comes.
- A row's output does not depend on the other rows' adapters: rows without an adapter, and modules that a row's adapter
  does not change, are not touched. Adapters with numbers that are not finite are refused before they come here.
- A pass in which no row has an adapter computes what it would compute without this file.
- Weights stay as they are, so it works with any type of them, and with layers that accelerate brings at every pass.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from serve_app.engines.pt.core.lora.adapter import Adapter, Factors
from serve_app.engines.pt.core.lora.groups import Groups, groups_of
from serve_app.engines.pt.core.lora.slots import AdapterSlots
from serve_app.engines.torch_internals import has_pre_hooks

# Steps compute a chunk of prompts and then the running rows, so passes alternate.
KEPT_PASSES = 4


class AdapterBank:
    """Has the buffers of one model for adapters. All of it is used on the engine's thread, except for `shapes`.

    `places` are the modules that adapters may change by their names, each with the device on which it computes.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[str, tuple[int, int, torch.device]],
        slots: AdapterSlots,
        rank: int,
        dtype: torch.dtype,
    ):
        self.slots = slots
        self.rank = rank
        self.dtype = dtype
        self.shapes = {name: (inputs, outputs) for name, (inputs, outputs, _) in places.items()}
        self._held: list[Adapter | None] = [None] * slots.count
        self._targets = {
            name: _Target(inputs, outputs, slots.count, rank, dtype, device)
            for name, (inputs, outputs, device) in places.items()
        }
        self._pass: _Pass | None = None
        # The last passes, by the slots of their rows.
        self._passes: OrderedDict[tuple[int | None, ...], _Pass] = OrderedDict()
        for name, target in self._targets.items():
            _attach(model.get_submodule(name), self._adder(target))

    @property
    def bytes_by_device(self) -> dict[torch.device, int]:
        """Returns the bytes of all buffers by device."""
        sizes: dict[torch.device, int] = {}
        for tensor in self.tensors():
            sizes[tensor.device] = sizes.get(tensor.device, 0) + tensor.nbytes
        return sizes

    def tensors(self) -> list[torch.Tensor]:
        """Returns all buffers."""
        return [tensor for target in self._targets.values() for tensor in (target.a, target.b)]

    @contextmanager
    def rows(self, adapters: Sequence[Adapter | None]) -> Iterator[None]:
        """Has the passes within the context compute each row with its adapter, which has been admitted to a slot. None
        stands for the base model."""
        if not any(adapters):
            yield
            return
        slots = tuple(None if adapter is None else self._loaded(adapter) for adapter in adapters)
        self._pass = self._passes.get(slots)
        if self._pass is None:
            rank = max(adapter.rank for adapter in adapters if adapter is not None)
            self._pass = self._passes[slots] = _Pass(slots, rank)
            if len(self._passes) > KEPT_PASSES:
                self._passes.popitem(last=False)
        try:
            yield
        finally:
            self._pass.forget_inputs()
            self._pass = None

    def remove(self, adapter: Adapter) -> None:
        """Forgets an adapter that no sequence will use again."""
        self.slots.remove(adapter)
        self._held = [None if held is adapter else held for held in self._held]

    def _loaded(self, adapter: Adapter) -> int:
        """Returns the slot of an adapter, whose factors are copied there if they are not there yet."""
        slot = self.slots.slot_of(adapter)
        if self._held[slot] is not adapter:
            self._held[slot] = None  # A copy that fails leaves nobody's factors.
            self._passes.clear()
            factors = adapter.factors
            assert factors is not None, "the host keeps the factors of adapters in use"
            for name, target in self._targets.items():
                target.write(slot, factors.get(name))
            self._held[slot] = adapter
        return slot

    def _adder(self, target: "_Target") -> "Adder":
        def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return y if self._pass is None else self._pass.add(target, x, y)

        return add


# This adds to an output, given with its input, what the adapters of the pass say.
Adder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Target:
    """Has the buffers of one module: `a` of shape (slots, rank, inputs) and `b` of shape (slots, rank, outputs).
    `members` has the bits of the slots whose adapters change the module."""

    def __init__(self, inputs: int, outputs: int, slots: int, rank: int, dtype: torch.dtype, device: torch.device):
        self.a = torch.zeros(slots, rank, inputs, dtype=dtype, device=device)
        self.b = torch.zeros(slots, rank, outputs, dtype=dtype, device=device)
        self.members = 0

    def write(self, slot: int, factors: Factors | None) -> None:
        """Puts the factors of an adapter, or none, into a slot. What they leave of its rank becomes zeros."""
        self.members &= ~(1 << slot)
        if factors is None:
            return
        for buffer, factor in zip((self.a, self.b), factors, strict=True):
            rank = factor.shape[0]
            buffer[slot, :rank].copy_(factor, non_blocking=True)
            buffer[slot, rank:].zero_()
        self.members |= 1 << slot


class _Indices:
    """Has the numbers of some groups on a device."""

    def __init__(self, groups: Groups, device: torch.device):
        first, last = groups.slots[0], groups.slots[-1]
        self.count = len(groups.slots)
        self.range = slice(first, last + 1) if groups.is_range else None
        self.slots, self.take, self.put = (
            None if numbers is None else torch.tensor(numbers, device=device)
            for numbers in (groups.slots, groups.take, groups.put)
        )
        self.skip = None if groups.skip is None else torch.tensor(groups.skip, device=device)[:, None]


class _Product(NamedTuple):
    """Is how one module's rows are multiplied: `a` of shape (groups, inputs, rank) and `b` of (groups, rank, outputs)
    are views of its buffers if the slots lie side by side, and else they are all slots, to be gathered each time."""

    indices: _Indices
    a: torch.Tensor
    b: torch.Tensor


class _Pass:
    """Is one pass, or several with the same rows. `slots` are those of its rows, and `rank` is the largest rank."""

    def __init__(self, slots: Sequence[int | None], rank: int):
        self._slots = slots
        self._rank = rank
        self._used = 0
        for slot in slots:
            self._used |= 0 if slot is None else 1 << slot
        self._indices: dict[tuple[int, torch.device], _Indices] = {}
        self._products: dict[_Target, _Product | None] = {}
        # Modules that follow each other often have the same input, whose rows are taken once.
        self._taken: tuple[torch.Tensor, _Indices, torch.Tensor] | None = None

    def forget_inputs(self) -> None:
        """Lets go of the last input."""
        self._taken = None

    def add(self, target: _Target, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Returns the output `y` of the module for `x` with what the adapters add to it. Both have the rows of the pass
        first, each with all its tokens."""
        if target not in self._products:
            self._products[target] = self._product(target)
        product = self._products[target]
        if product is None:
            return y
        indices, a, b = product
        if indices.range is None:
            a, b = a.index_select(0, indices.slots), b.index_select(0, indices.slots)
        inputs = self._inputs(x, indices, a)
        inner = torch.bmm(inputs, a)
        added = torch.bmm(inner, b)
        y, count = y.contiguous(), len(self._slots)
        flat = y.view(count, -1)
        added = added.view(-1, flat.shape[1])
        if indices.put is not None:
            added = added.index_select(0, indices.put)
        if indices.skip is not None:  # It is filled and not multiplied, because what it hides may not be finite.
            added.masked_fill_(indices.skip, 0)
        flat.add_(added)
        return y

    def _inputs(self, x: torch.Tensor, indices: _Indices, a: torch.Tensor) -> torch.Tensor:
        """Returns the rows of an input in groups, of shape (groups, rows and tokens, inputs)."""
        if self._taken is not None and self._taken[0] is x and self._taken[1] is indices:
            return self._taken[2]
        inputs = x.to(device=a.device, dtype=a.dtype).reshape(len(self._slots), -1)
        if indices.take is not None:
            inputs = inputs.index_select(0, indices.take)
        inputs = inputs.view(indices.count, -1, a.shape[1])
        self._taken = x, indices, inputs
        return inputs

    def _product(self, target: _Target) -> _Product | None:
        used, device = self._used & target.members, target.a.device
        if not used:
            return None
        indices = self._indices.get((used, device))
        if indices is None:
            indices = self._indices[used, device] = _Indices(groups_of(self._slots, used), device)
        slots = slice(None) if indices.range is None else indices.range
        return _Product(indices, target.a[slots, : self._rank].transpose(1, 2), target.b[slots, : self._rank])


def _attach(module: nn.Module, add: Adder) -> None:
    """Has a module pass its inputs and outputs to `add`. The weights, the hooks of others and the module's class stay
    as they are."""
    if not has_pre_hooks(module):
        forward = module.forward

        def with_adapters(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
            return add(x, forward(x, *rest, **options))

        module.forward = with_adapters
        return
    # Layers of 8 bits have hooks that take large inputs out, which an adapter needs.
    inputs: list[torch.Tensor] = []

    def keep(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        inputs[:] = given[:1]

    def after(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return add(inputs.pop(), output)

    module.register_forward_pre_hook(keep, prepend=True)
    module.register_forward_hook(after)
