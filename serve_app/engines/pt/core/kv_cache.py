"""Keeps the KV cache of a batch whose rows come and go at every step.

All rows share one rectangle of rows r and columns c. Every row ends at the same column and starts where its length
says, so shorter rows are padded on the left. New tokens are written at `end`, a row that leaves is replaced by the last
one, and a row that joins is written so that it ends at `end`. So only the rows that come and go are copied, except when
the window reaches the edge of its buffers, which is at most once in `SLACK` steps.

The layers are part of a stock `DynamicCache`, so every model and every device map that works with it works with this.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass
from typing import Any

import torch

from serve_app.engines.pt.core.cache_codec import WHOLE, CacheCodec
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
    """Keys and values of one layer, each in buffers of shape (row_capacity, heads, column_capacity, size). In 8 bits,
    they have a buffer of scales too, whose size is 1.

    It also replaces sliding-window layers: it keeps all tokens, and the model's mask hides those outside the window.
    """

    def __init__(self, window: Window, codec: CacheCodec = WHOLE):
        super().__init__()
        self.window = window
        self.codec = codec
        self.key_buffers: tuple[torch.Tensor, ...] = ()
        self.value_buffers: tuple[torch.Tensor, ...] = ()
        # These are the first tokens of the only row, which are written when there are buffers on the right device.
        self.first_tokens: tuple[torch.Tensor, ...] = ()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Writes the new tokens after the window, and returns the window with them, as the model reads it."""
        keys, values = self.codec.encode(key_states), self.codec.encode(value_states)
        if not self.key_buffers:
            self.key_buffers, self.value_buffers = self.allocate(keys), self.allocate(values)
            self._write_first_tokens()
        window, end = self.window, self.window.end + key_states.shape[-2]
        for buffers, states in ((self.key_buffers, keys), (self.value_buffers, values)):
            for buffer, new in zip(buffers, states, strict=True):
                buffer[: window.rows, :, window.end : end] = new
        return self._read(self.key_buffers, end), self._read(self.value_buffers, end)

    def _read(self, buffers: tuple[torch.Tensor, ...], end: int) -> torch.Tensor:
        window = self.window
        return self.codec.decode([buffer[: window.rows, :, window.start : end] for buffer in buffers])

    def get_seq_length(self) -> int:
        """Returns the columns in use before the tokens of the running forward pass."""
        return self.window.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the length and offset of what `update` will return."""
        return self.window.width + query_length, 0

    def buffers(self) -> tuple[torch.Tensor, ...]:
        """Returns the allocated buffers."""
        return self.key_buffers + self.value_buffers

    @property
    def kept_bytes(self) -> int:
        """Returns the bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def read_bytes(self) -> int:
        """Returns the bytes that keys and values in 8 bits take in the model's type while they are read. It is 0 for
        those that are kept in that type."""
        return sum(map(self.codec.decoded_bytes, filter(None, (self.key_buffers, self.value_buffers))))

    @property
    def transient_bytes(self) -> int:
        """Returns the most bytes that this layer takes beside its buffers for a moment: copies of them while they are
        moved, or its keys and values in the model's type while they are read."""
        return max(self.kept_bytes, self.read_bytes)

    def allocate(self, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Returns buffers of the window's capacity for tensors of shape (rows, heads, tokens, size)."""
        # The buffers must be zeros, since a masked column has weight 0, and 0 times a stray NaN would be NaN.
        return tuple(_zeros(part, self.window) for part in states)

    def _write_first_tokens(self) -> None:
        for buffer, tokens in zip(self.buffers(), self.first_tokens, strict=False):
            buffer[0, :, : tokens.shape[1]] = tokens
        self.first_tokens = ()

    def move(self, target: Window) -> None:
        """Replaces the buffers by larger ones, or moves the window within new ones."""
        old = self.window
        keys = len(self.key_buffers)
        moved = []
        for buffer in self.buffers():
            new = _zeros(buffer, target)
            new[: old.rows, :, target.start : target.end] = buffer[: old.rows, :, old.start : old.end]
            moved.append(new)
        self.key_buffers, self.value_buffers = tuple(moved[:keys]), tuple(moved[keys:])


def _zeros(part: torch.Tensor, window: Window) -> torch.Tensor:
    return part.new_zeros(window.row_capacity, part.shape[1], window.column_capacity, part.shape[3])


class BatchCache:
    """This is a `DynamicCache` whose rows can be joined, removed and extended."""

    def __init__(self, config: Any, codec: CacheCodec = WHOLE):
        self.window = Window()
        self.cache = cache_with(config, lambda: RectangleLayer(self.window, codec))
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

    def tensors(self) -> list[torch.Tensor]:
        """Returns all that the cache holds: buffers of keys and values, and states."""
        buffers = [buffer for layer in self._rectangles() for buffer in layer.buffers()]
        return buffers + [state for layer in self.cache.layers if has_state(layer) for state in states_of(layer)]

    @property
    def buffer_bytes(self) -> int:
        """Returns the bytes of all key and value buffers."""
        return sum(self.bytes_by_device.values())

    @property
    def read_bytes(self) -> int:
        """Returns the bytes that the keys and values of all layers would take in the model's type, of which there is
        one layer at a time, if they are kept in 8 bits."""
        return sum(layer.read_bytes for layer in self._rectangles())

    @property
    def state_bytes(self) -> int:
        """Returns the bytes of all states of rows."""
        return sum(tensor.nbytes for layer in self.cache.layers if has_state(layer) for tensor in states_of(layer))

    @property
    def transient_bytes(self) -> dict[torch.device, int]:
        """Returns by device the most bytes that a layer takes beside its buffers for a moment. Layers are moved and
        read one after the other."""
        sizes: dict[torch.device, int] = {}
        for layer in self._rectangles():
            for device in {buffer.device for buffer in layer.buffers()}:
                sizes[device] = max(layer.transient_bytes, sizes.get(device, 0))
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

    def begin_with(self, layers: ReadOnlySequence[ReadOnlySequence[torch.Tensor]], tokens: int) -> None:
        """Gives the only row of an empty cache its first tokens. `layers` are what `row` returned of a row that begins
        with them. They are written in the next forward pass."""
        for layer, kept in zip(self._rectangles(), layers, strict=True):
            layer.first_tokens = tuple(tensor[:, :tokens] for tensor in kept)
        self.window.end = tokens

    def row(self, row: int, tokens: int) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Returns copies of the last `tokens` tokens of a row in the host's memory: for each layer with keys and values
        its tensors of shape (heads, tokens, size)."""
        columns = slice(self.window.end - tokens, self.window.end)
        return tuple(
            tuple(buffer[row, :, columns].to("cpu", copy=True) for buffer in layer.buffers())
            for layer in self._rectangles()
        )

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
        give_back_unused(self.bytes_by_device)

    def _adopt(self, other: "BatchCache") -> None:
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            if isinstance(mine, RectangleLayer):
                mine.key_buffers, mine.value_buffers = theirs.key_buffers, theirs.value_buffers
            else:
                join_states(mine, theirs)
        vars(self.window).update(vars(other.window))

    def _free(self) -> None:
        for layer in self._rectangles():
            layer.key_buffers = layer.value_buffers = ()
        vars(self.window).update(vars(Window()))

    def _rectangles(self) -> Iterator[RectangleLayer]:
        return (layer for layer in self.cache.layers if isinstance(layer, RectangleLayer))


def give_back_unused(devices: Iterable[torch.device]) -> None:
    """Gives the memory that torch keeps of freed buffers back to GPUs, where other processes may need it. The next
    buffers are larger, so few of them would fit into it. It does nothing on the CPU."""
    if any(device.type == "cuda" for device in devices):
        torch.cuda.empty_cache()


def _copy_rows(mine: RectangleLayer, theirs: RectangleLayer, rows: slice, columns: slice) -> None:
    source = theirs.window
    if not theirs.key_buffers:
        return
    if not mine.key_buffers:
        mine.key_buffers, mine.value_buffers = mine.allocate(theirs.key_buffers), mine.allocate(theirs.value_buffers)
    for target, buffer in zip(mine.buffers(), theirs.buffers(), strict=True):
        target[rows, :, columns] = buffer[: source.rows, :, source.start : source.end]
