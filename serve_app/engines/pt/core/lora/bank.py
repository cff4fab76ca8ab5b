"""Holds the slots of LoRA adapters beside the modules of a model, and adds to each row of a pass what its adapter says.

Laws:
- The buffers are made once: for each module that adapters may change, `count` slots of `rank` on the module's device.
  So what adapters take is known before any of them comes.
- A row's output does not depend on the other rows' adapters: rows without an adapter, and modules that a row's adapter
  does not change, are not touched. Adapters with numbers that are not finite are refused before they come here.
- A pass in which no row has an adapter computes what it would compute without this file.
- Weights stay as they are, so it works with any type of them, and with layers that accelerate brings at every pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from serve_app.engines.pt.core.lora.adapter import Adapter
from serve_app.engines.pt.core.lora.groups import Groups, groups_of
from serve_app.engines.pt.core.lora.slots import AdapterSlots
from serve_app.engines.torch_internals import has_pre_hooks


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
        self._last = _Pass([], 0)
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
        slots = [None if adapter is None else self._loaded(adapter) for adapter in adapters]
        if slots != self._last.slots:
            self._last = _Pass(slots, max(adapter.rank for adapter in adapters if adapter is not None))
        self._pass = self._last
        try:
            yield
        finally:
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
            self._last = _Pass([], 0)
            factors = adapter.factors
            assert factors is not None, "the host keeps the factors of adapters in use"
            for name, target in self._targets.items():
                target.write(slot, factors.get(name))
            self._held[slot] = adapter
        return slot

    def _adder(self, target: "_Target") -> "Adder":
        def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            now = self._pass
            if now is None:
                return y
            used = now.used & target.members
            return target.add(x, y, now, used) if used else y

        return add


# This adds to an output, given with its input, what the adapters of the pass say.
Adder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Pass:
    """Is one pass, or several with the same rows. `slots` are those of its rows, and `rank` is the largest rank."""

    def __init__(self, slots: Sequence[int | None], rank: int):
        self.slots = list(slots)
        self.rank = rank
        self.used = 0
        for slot in slots:
            self.used |= 0 if slot is None else 1 << slot
        self._groups: dict[tuple[int, torch.device], _Indices] = {}

    def groups(self, used: int, device: torch.device) -> "_Indices":
        """Returns the groups of the rows whose slots are among the bits of `used`."""
        found = self._groups.get((used, device))
        if found is None:
            found = self._groups[used, device] = _Indices(groups_of(self.slots, used), device)
        return found


class _Indices:
    """Has the numbers of some groups on a device."""

    def __init__(self, groups: Groups, device: torch.device):
        first, last = groups.slots[0], groups.slots[-1]
        self.count = len(groups.slots)
        self.range = slice(first, last + 1) if groups.is_range else None
        self.slots, self.take, self.put, self.rows = (
            None if numbers is None else torch.tensor(numbers, device=device)
            for numbers in (groups.slots, groups.take, groups.put, groups.rows)
        )


class _Target:
    """Has the buffers of one module: `a` of shape (slots, rank, inputs) and `b` of shape (slots, rank, outputs).
    `members` has the bits of the slots whose adapters change the module."""

    def __init__(self, inputs: int, outputs: int, slots: int, rank: int, dtype: torch.dtype, device: torch.device):
        self.a = torch.zeros(slots, rank, inputs, dtype=dtype, device=device)
        self.b = torch.zeros(slots, rank, outputs, dtype=dtype, device=device)
        self.members = 0

    def write(self, slot: int, factors: Any) -> None:
        """Puts the factors of an adapter, or none, into a slot. What they leave of its rank becomes zeros."""
        self.members &= ~(1 << slot)
        if factors is None:
            return
        for buffer, factor in zip((self.a, self.b), factors, strict=True):
            rank = factor.shape[0]
            buffer[slot, :rank].copy_(factor, non_blocking=True)
            buffer[slot, rank:].zero_()
        self.members |= 1 << slot

    def add(self, x: torch.Tensor, y: torch.Tensor, now: _Pass, used: int) -> torch.Tensor:
        """Returns the output `y` of the module for `x` with what the adapters of the slots in `used` add to it. Both
        have the rows of the pass first, each with all its tokens."""
        groups, count = now.groups(used, self.a.device), len(now.slots)
        if groups.range is not None:
            a, b = self.a[groups.range, : now.rank], self.b[groups.range, : now.rank]
        else:
            a, b = (factor[:, : now.rank].index_select(0, groups.slots) for factor in (self.a, self.b))
        inputs = x.to(device=a.device, dtype=a.dtype).reshape(count, -1)
        if groups.take is not None:
            inputs = inputs.index_select(0, groups.take)
        inner = torch.bmm(inputs.view(groups.count, -1, a.shape[2]), a.transpose(1, 2))
        added = torch.bmm(inner, b).view(inputs.shape[0], -1)
        if groups.put is not None:
            added = added.index_select(0, groups.put)
        added = added.to(device=y.device, dtype=y.dtype)
        y = y.contiguous()
        if groups.rows is None:
            y.view(count, -1).add_(added)
        else:
            y.view(count, -1).index_add_(0, groups.rows.to(y.device), added)
        return y


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
