"""Holds the slots of LoRA adapters beside the modules of a model, and adds to each row of a pass what its adapter says.

Laws:
- The buffers are made once: for each module that adapters may change, `count` slots of `rank` on the module's device.
  So what adapters take is known before any of them comes.
- A row's output does not depend on the other rows' adapters. Rows without an adapter are not touched, and a module that
  a row's adapter does not change adds nothing to it, or zeros. Adapters with numbers that are not finite are refused
  before they come here.
- A pass in which no row has an adapter computes what it would compute without this file.
- Weights stay as they are, so it works with any type of them, and with layers that accelerate brings at every pass.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from serve_app.engines.pt.core.lora.adapter import Adapter
from serve_app.engines.pt.core.lora.buffers import Siblings, Target
from serve_app.engines.pt.core.lora.row_products import RowProducts
from serve_app.engines.pt.core.lora.slots import AdapterSlots
from serve_app.engines.torch_internals import has_pre_hooks

# Steps compute a chunk of prompts and then the running rows, so passes alternate.
KEPT_PASSES = 4


class AdapterBank:
    """Has the buffers of one model for adapters. All of it is used on the engine's thread, except for `shapes`.

    `places` are the modules that adapters may change by their names, each with the device on which it computes.
    `siblings` are the names of modules that are given the same input. Others are computed by themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[str, tuple[int, int, torch.device]],
        slots: AdapterSlots,
        rank: int,
        dtype: torch.dtype,
        siblings: Sequence[Sequence[str]] = (),
    ):
        self.slots = slots
        self.rank = rank
        self.dtype = dtype
        self.shapes = {name: (inputs, outputs) for name, (inputs, outputs, _) in places.items()}
        self._held: list[Adapter | None] = [None] * slots.count
        self._targets = _targets(places, siblings, slots.count, rank, dtype)
        self._pass: RowProducts | None = None
        # The last passes, by the adapters of their rows. All are forgotten before a slot is written.
        self._passes: OrderedDict[tuple[Adapter | None, ...], RowProducts] = OrderedDict()
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
        siblings = dict.fromkeys(target.siblings for target in self._targets.values())
        return [each.a for each in siblings] + [target.b for target in self._targets.values()]

    @contextmanager
    def rows(self, adapters: Sequence[Adapter | None]) -> Iterator[None]:
        """Has the passes within the context compute each row with its adapter, which has been admitted to a slot. None
        stands for the base model."""
        if not any(adapters):
            yield
            return
        asked = tuple(adapters)
        self._pass = self._passes.get(asked)
        if self._pass is None:
            slots = tuple(None if adapter is None else self._loaded(adapter) for adapter in asked)
            rank = max(adapter.rank for adapter in asked if adapter is not None)
            self._pass = self._passes[asked] = RowProducts(slots, rank)
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
        self._passes.clear()

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

    def _adder(self, target: Target) -> "Adder":
        def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return y if self._pass is None else self._pass.add(target, x, y)

        return add


# This adds to an output, given with its input, what the adapters of the pass say.
Adder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _targets(
    places: Mapping[str, tuple[int, int, torch.device]],
    siblings: Sequence[Sequence[str]],
    slots: int,
    rank: int,
    dtype: torch.dtype,
) -> dict[str, Target]:
    """Returns the buffers of all modules by name."""
    targets: dict[str, Target] = {}
    shared = {name for names in siblings for name in names}
    for names in [*siblings, *((name,) for name in places if name not in shared)]:
        inputs, _, device = places[names[0]]
        together = Siblings(len(names), inputs, slots, rank, dtype, device)
        targets |= {name: together.add(places[name][1]) for name in names}
    return targets


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
