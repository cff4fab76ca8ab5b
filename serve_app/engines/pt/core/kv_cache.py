"""Keeps the KV cache of a batch whose rows come and go at every step.

All rows share one rectangle of rows r and columns c. Every row ends at the same column and starts where its length
says, so shorter rows are padded on the left. New tokens are written at `end`, a row that leaves is replaced by the last
one, and a row that joins is written so that it ends at `end`. So only the rows that come and go are copied, except when
the window reaches the edge of its buffers, which is at most once in `SLACK` steps.

The layers are part of a stock `DynamicCache`, so every model and every device map that works with it works with this.
"""

from collections.abc import Iterator
from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass
from typing import Any

import torch

from serve_app.engines.pt.transformers_internals import (
    GrowingLayer,
    cache_with,
    has_only_state,
    has_state,
    join_states,
    remove_state,
    states_of,
)
from serve_app.planning.pt_kv_buffers import SLACK, cells, row_capacity


@dataclass
class Window:
    """This is the part of the buffers in use, which is the first `rows` rows and columns `start` to `end`. All layers
    share it."""

    rows: int = 0
    start: int = 0
    end: int = 0
    row_capacity: int = 0
    column_capacity: int = 0

    @property
    def width(self) -> int:
        """Returns the number of tokens of the longest row."""
        return self.end - self.start


class RectangleLayer(GrowingLayer):
    """Keys and values of one layer, shape (row_capacity, heads, column_capacity, head size).

    It also replaces sliding-window layers: it keeps all tokens, and the model's mask hides those outside the window.
    """

    def __init__(self, window: Window):
        super().__init__()
        self.window = window
        self.key_buffer: torch.Tensor | None = None
        self.value_buffer: torch.Tensor | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Writes the new tokens after the window, and returns the window with them."""
        window = self.window
        if self.key_buffer is None or self.value_buffer is None:
            self.key_buffer, self.value_buffer = self.allocate(key_states), self.allocate(value_states)
        end = window.end + key_states.shape[-2]
        self.key_buffer[: window.rows, :, window.end : end] = key_states
        self.value_buffer[: window.rows, :, window.end : end] = value_states
        return (
            self.key_buffer[: window.rows, :, window.start : end],
            self.value_buffer[: window.rows, :, window.start : end],
        )

    def get_seq_length(self) -> int:
        """Returns the columns in use before the tokens of the running forward pass."""
        return self.window.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the length and offset of what `update` will return."""
        return self.window.width + query_length, 0

    def buffers(self) -> Iterator[torch.Tensor]:
        """Returns the allocated buffers."""
        return (buffer for buffer in (self.key_buffer, self.value_buffer) if buffer is not None)

    def allocate(self, states: torch.Tensor) -> torch.Tensor:
        """Returns a buffer of the window's capacity for states of shape (rows, heads, tokens, size)."""
        # The buffer must be zeros, since a masked column has weight 0, and 0 times a stray NaN would be NaN.
        _, heads, _, size = states.shape
        return states.new_zeros(self.window.row_capacity, heads, self.window.column_capacity, size)

    def move(self, target: Window) -> None:
        """Replaces the buffers by larger ones, or moves the window within new ones."""
        old = self.window
        moved = []
        for buffer in self.buffers():
            new = buffer.new_zeros(target.row_capacity, buffer.shape[1], target.column_capacity, buffer.shape[3])
            new[: old.rows, :, target.start : target.end] = buffer[: old.rows, :, old.start : old.end]
            moved.append(new)
        if moved:
            self.key_buffer, self.value_buffer = moved


class BatchCache:
    """This is a `DynamicCache` whose rows can be joined, removed and extended."""

    def __init__(self, config: Any):
        self.window = Window()
        self.cache = cache_with(config, lambda: RectangleLayer(self.window))
        self.has_states = any(map(has_state, self.cache.layers))
        self.has_keys = any(isinstance(layer, RectangleLayer) for layer in self.cache.layers)

    @property
    def is_joinable(self) -> bool:
        """Returns whether every layer is of a kind that is known here."""
        return all(isinstance(layer, RectangleLayer) or has_only_state(layer) for layer in self.cache.layers)

    @property
    def can_roll_back(self) -> bool:
        """Returns whether the last tokens of a row can be taken back. A state has all tokens in it for good."""
        return self.is_joinable and not self.has_states

    @property
    def bytes_by_device(self) -> dict[torch.device, int]:
        """Returns the bytes of all key and value buffers by device."""
        sizes: dict[torch.device, int] = {}
        for layer in self._rectangles():
            for buffer in layer.buffers():
                sizes[buffer.device] = sizes.get(buffer.device, 0) + buffer.nbytes
        return sizes

    @property
    def buffer_bytes(self) -> int:
        """Returns the bytes of all key and value buffers."""
        return sum(self.bytes_by_device.values())

    @property
    def state_bytes(self) -> int:
        """Returns the bytes of all states of rows."""
        return sum(tensor.nbytes for layer in self.cache.layers if has_state(layer) for tensor in states_of(layer))

    @property
    def largest_layer_bytes(self) -> dict[torch.device, int]:
        """Returns the bytes of the largest layer's buffers by device."""
        sizes: dict[torch.device, int] = {}
        for layer in self._rectangles():
            for device, size in ((buffer.device, 2 * buffer.nbytes) for buffer in layer.buffers()):
                sizes[device] = max(size, sizes.get(device, 0))
        return sizes

    def reserve(self, rows: int, columns: int, left: int = 0) -> None:
        """Makes room for `rows` rows, `columns` more tokens at the end, and rows of up to `left` tokens."""
        window = self.window
        grow_left = max(0, left - window.width)
        if rows <= window.row_capacity and window.end + columns <= window.column_capacity and grow_left <= window.start:
            return
        target = Window(rows=window.rows)
        target.row_capacity = row_capacity(max(rows, window.rows))
        target.column_capacity = window.width + grow_left + columns + SLACK
        target.start = grow_left
        target.end = grow_left + window.width
        self._move(target)

    @property
    def cells(self) -> int:
        """Returns the number of tokens for which the buffers have room."""
        return self.window.row_capacity * self.window.column_capacity

    def compact(self) -> None:
        """Gives back what the buffers have beyond their rows, since there may have been more or longer rows before."""
        window = self.window
        if cells(window.rows, window.width) < self.cells:
            capacity = window.width + SLACK
            self._move(Window(window.rows, 0, window.width, row_capacity(window.rows), capacity))

    def advance(self, columns: int) -> None:
        """Extends the window by what the last forward pass wrote."""
        self.window.end += columns

    def roll_back(self, tokens: ReadOnlySequence[int], lengths: ReadOnlySequence[int]) -> None:
        """Takes back the last tokens of each row, whose number may differ by row. `lengths` are the tokens that each
        row keeps.

        All rows must end at one column, so a row that takes back more than another one moves to the right. Only one
        row of one layer's buffer is copied at a time. A cache without rows has nothing to take back.
        """
        window, least = self.window, min(tokens, default=0)
        window.end -= least
        for row, (taken, length) in enumerate(zip(tokens, lengths, strict=True)):
            by = taken - least
            if not by:
                continue
            source, target = slice(window.end - by - length, window.end - by), slice(window.end - length, window.end)
            for layer in self._rectangles():
                for buffer in layer.buffers():  # The two places overlap, so the tokens are copied before.
                    buffer[row, :, target] = buffer[row, :, source].clone()

    def join(self, other: "BatchCache") -> None:
        """Appends the rows of `other`, which ends at its own end. `other` is of no use afterwards."""
        window, width = self.window, other.window.width
        if window.rows == 0:
            self._adopt(other)
            return
        self.reserve(window.rows + other.window.rows, columns=1, left=width)
        rows = slice(window.rows, window.rows + other.window.rows)
        columns = slice(window.end - width, window.end)
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            if isinstance(mine, RectangleLayer):
                _copy_rows(mine, theirs, rows, columns)
            else:
                join_states(mine, theirs)
        window.rows = rows.stop
        window.start = min(window.start, columns.start)

    def remove(self, row: int) -> None:
        """Removes one row. The last row takes its number."""
        window = self.window
        last = window.rows - 1
        for layer in self.cache.layers:
            if isinstance(layer, RectangleLayer):
                if row != last:
                    for buffer in layer.buffers():
                        columns = slice(window.start, window.end)
                        buffer[row, :, columns] = buffer[last, :, columns]
            else:
                remove_state(layer, row, last)
        window.rows = last
        if last == 0:
            self._free()

    def shrink(self, width: int) -> None:
        """Forgets the columns on the left that no row uses any more. `width` is the longest row's length."""
        self.window.start = self.window.end - width

    def _move(self, target: Window) -> None:
        """Moves layer by layer, so that old and new buffers exist together for one layer only."""
        for layer in self._rectangles():
            layer.move(target)
        vars(self.window).update(vars(target))

    def _adopt(self, other: "BatchCache") -> None:
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            if isinstance(mine, RectangleLayer):
                mine.key_buffer, mine.value_buffer = theirs.key_buffer, theirs.value_buffer
            else:
                join_states(mine, theirs)
        vars(self.window).update(vars(other.window))

    def _free(self) -> None:
        for layer in self._rectangles():
            layer.key_buffer = layer.value_buffer = None
        vars(self.window).update(vars(Window()))

    def _rectangles(self) -> Iterator[RectangleLayer]:
        return (layer for layer in self.cache.layers if isinstance(layer, RectangleLayer))


def _copy_rows(mine: RectangleLayer, theirs: RectangleLayer, rows: slice, columns: slice) -> None:
    source = theirs.window
    if theirs.key_buffer is None or theirs.value_buffer is None:
        return
    if mine.key_buffer is None or mine.value_buffer is None:
        mine.key_buffer, mine.value_buffer = mine.allocate(theirs.key_buffer), mine.allocate(theirs.value_buffer)
    for target, buffer in ((mine.key_buffer, theirs.key_buffer), (mine.value_buffer, theirs.value_buffer)):
        target[rows, :, columns] = buffer[: source.rows, :, source.start : source.end]
