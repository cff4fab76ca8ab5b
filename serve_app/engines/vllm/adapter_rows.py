"""Multiplies the rows of a step with the factors of their LoRA adapters, for vLLM on the CPU.

vLLM 0.32's own functions for the CPU take the last slot's adapter for rows without one, and copy an adapter's factors
for each row. Here the rows of one slot form a group, all groups are multiplied in batched products, and rows without an
adapter are not touched. Modules that no row's adapter changes are left out. Adapters with factors that are not finite
are refused when they are loaded.

Stacked first factors have the shape (slots, 1, rank, inputs), and second ones have (slots, 1, outputs, rank).
"""

from collections.abc import Sequence

import torch

from serve_app.engines.adapter_groups import groups_of

Stacked = Sequence[torch.Tensor]


class AdapterRows:
    """Has the rows whose slots are among `used`, given as bits. `slots` has one number for each row, and a negative one
    stands for no adapter. One row at least has a slot among them."""

    def __init__(self, slots: Sequence[int], used: int):
        groups = groups_of([None if slot < 0 else slot for slot in slots], used)
        self._count = len(groups.slots)
        self._range = slice(groups.slots[0], groups.slots[-1] + 1)
        self._slots = None if groups.is_range else torch.tensor(groups.slots)
        self._take = torch.tensor(range(len(slots)) if groups.take is None else groups.take)
        self._filled = None if groups.filled is None else torch.tensor(groups.filled)[:, None]

    def add(
        self, y: torch.Tensor, x: torch.Tensor, a: Stacked, b: Stacked, scale: float, widths: Sequence[int]
    ) -> None:
        """Adds to `y` what the adapters make of its rows `x`, times `scale`. The outputs of modules lie side by side
        in `y` and have these widths, of which factors may have more or fewer."""
        rows, begin = self._taken(x), 0
        if scale != 1:
            rows = rows * scale
        parts = [self._second(torch.bmm(rows, self._of(first).transpose(1, 2)), b[i]) for i, first in enumerate(a)]
        if [part.shape[2] for part in parts] == list(widths):  # One addition takes less time than several.
            parts, widths = [torch.cat(parts, 2)], [sum(widths)]
        for part, width in zip(parts, widths, strict=True):
            self._put(y[:, begin : begin + width], part)
            begin += width

    def expand(self, y: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> None:
        """Adds to `y` the second product of `x` of shape (rows, rank), which the first factors have made."""
        self._put(y, self._second(self._taken(x), b))

    def _taken(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the rows in groups. Those that only fill a group up are zeros."""
        rows = x.index_select(0, self._take)
        if self._filled is not None:
            rows.masked_fill_(self._filled, 0)
        return rows.view(self._count, -1, x.shape[1])

    def _of(self, stacked: torch.Tensor) -> torch.Tensor:
        """Returns the factors of each group."""
        return stacked[self._range, 0] if self._slots is None else stacked[:, 0].index_select(0, self._slots)

    def _second(self, inner: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.bmm(inner, self._of(b).transpose(1, 2))

    def _put(self, y: torch.Tensor, part: torch.Tensor) -> None:
        width = min(y.shape[1], part.shape[2])
        y[:, :width].index_add_(0, self._take, part.flatten(0, 1)[:, :width].to(y.dtype))


class StepRows:
    """Has the rows of a step by module. `slots` are those of all rows, where -1 stands for no adapter.

    `written` keeps, for the address of a module's second factors, the bits of the slots that have any. Whoever writes
    slots has to empty it.
    """

    def __init__(self, slots: torch.Tensor, written: dict[int, int]):
        self._slots: list[int] = slots.tolist()
        self._written = written
        self._rows: dict[tuple[int, int], AdapterRows | None] = {}

    def of(self, count: int, b: Stacked) -> AdapterRows | None:
        """Returns the first `count` rows for modules with these second factors, or None if nothing changes any."""
        address = b[0].data_ptr()
        if address not in self._written:
            self._written[address] = _slots_with_numbers(b)
        key = count, self._written[address]
        if key not in self._rows:
            slots = self._slots[:count]
            used = sum(1 << slot for slot in set(slots) if slot >= 0) & self._written[address]
            self._rows[key] = AdapterRows(slots, used) if used else None
        return self._rows[key]


def _slots_with_numbers(stacked: Stacked) -> int:
    """Returns the bits of the slots that are not all zeros in one at least of these."""
    used = 0
    for b in stacked:
        for slot, is_written in enumerate(b.flatten(1).any(1).tolist()):
            used |= int(is_written) << slot
    return used
