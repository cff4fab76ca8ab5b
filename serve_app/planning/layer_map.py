"""Decides which layers of a model go on which device, in order, with the KV cache that they bring along.

The rule is accelerate's: blocks in the model's order fill one device after the other. This module adds that each
layer's KV cache counts where the layer is. If layers are left over for the CPU or the disk, the first GPU keeps room
for the largest of them, since they are computed there.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from serve_app.facts.architecture import Architecture
from serve_app.facts.engine_facts import BlockNames, PtFacts
from serve_app.facts.weights import FLOATS, Tensor
from serve_app.planning.memory import (
    LAYER,
    loaded,
    pt_kv_bytes_in_8_bits,
    pt_kv_bytes_per_token,
    pt_state_bytes,
)
from serve_app.planning.quantization import BNB_SCALES, loading_bytes, quantized_tensor

_FIRST = re.compile(r"(?:^|\.)(?:embed_tokens|wte|wpe|word_embeddings\w*)(?:\.|$)")


@dataclass(frozen=True)
class Block:
    """This is a part that cannot be split: the embedding (number -1), a layer, or the norm and head (after the last
    layer).

    `kv` is bytes of cache for a token, and `state` is bytes of cache for a sequence. `read` is what a token of a cache
    in 8 bits takes in the model's type, which each layer has while it is computed, and 0 for a cache in that type.
    Of `weights`, `values` are quantised, and `scales` belong to these. `unpacked` is what its largest quantised weight
    takes whole, and `loading` what it takes while it is quantised. `adapters` are the buffers for LoRA adapters, which
    are where the block is computed.
    """

    number: int
    weights: int
    kv: int = 0
    state: int = 0
    values: int = 0
    scales: int = 0
    unpacked: int = 0
    loading: int = 0
    read: int = 0
    adapters: int = 0

    @property
    def transient(self) -> int:
        """Returns the most that its cache takes for a token beside `kv` for a moment: a copy of it while its buffers
        are moved, or what is read of it."""
        return max(self.kv, self.read)


def block_number(name: str, names: BlockNames) -> int:
    """Returns the block of a parameter or module of a model, by its own name and those of the model's blocks."""
    for path in names.layers:
        if name.startswith(f"{path}."):
            return int(name[len(path) + 1 :].partition(".")[0])
    return -1 if any(f"{name}.".startswith(f"{part}.") for part in names.before) else names.count


def stored_block(name: str, names: BlockNames) -> int:
    """Returns the block of a tensor by its name in the checkpoint, where the first parts of a model's names may be
    missing or others. A layer after the last one has its own number plus one, so that it is no block."""
    for path in names.layers:
        match = re.search(rf"(?:^|\.){re.escape(path.rpartition('.')[2])}\.(\d+)\.", name)
        if match:
            number = int(match[1])
            return number if number < names.count else number + 1
    endings = (part.split(".", skipped)[-1] for part in names.before for skipped in range(part.count(".") + 1))
    return -1 if any(f".{ending}." in f".{name}." for ending in endings) else names.count


def known_block(name: str, architecture: Architecture) -> int:
    """Returns the block of a tensor of an architecture with formulas, by its name in the checkpoint. A tied head lies
    with the embedding."""
    match = LAYER.search(f"{name}.")
    if match:
        return int(match[1])
    is_tied_head = architecture.tied and re.search(r"(?:^|\.)lm_head(?:\.|$)", name)
    return -1 if is_tied_head or _FIRST.search(name) else len(architecture.layers)


@dataclass(frozen=True)
class BlockGroup:
    """Holds the blocks that share a device."""

    blocks: tuple[Block, ...]

    @property
    def weights(self) -> int:
        """Returns the bytes of the blocks' weights."""
        return sum(block.weights for block in self.blocks)

    @property
    def adapters(self) -> int:
        """Returns the bytes of the blocks' buffers for LoRA adapters."""
        return sum(block.adapters for block in self.blocks)

    def cache(self, tokens: int, rows: int) -> int:
        """Returns the bytes of cache, with what one layer takes for a moment while it is moved or read."""
        return cache_bytes(self.blocks, tokens, rows)


def cache_bytes(blocks: Iterable[Block], tokens: int, rows: int) -> int:
    """Returns what `BlockGroup.cache` does, for any blocks."""
    blocks = tuple(blocks)
    largest = max((block.transient for block in blocks), default=0)
    return tokens * (sum(block.kv for block in blocks) + largest) + rows * sum(block.state for block in blocks)


def blocks_of(
    tensors: Iterable[Tensor],
    architecture: Architecture,
    element_bytes: int,
    facts: PtFacts | None = None,
    copies_tied: bool = False,
    quantization: str | None = None,
    in_8_bits: bool = False,
) -> list[Block]:
    """Returns the blocks of a model in their order, by what transformers says of it, or else by this project's formulas
    over the tensors of its checkpoint. A tied head lies with the embedding, or, with `copies_tied`, is a copy.

    With `facts`, the cache is always theirs. The weights are theirs too, because a checkpoint may hold what is not
    loaded. Only a quantised checkpoint says itself how large its weights are, because `facts` are of a model whose
    weights have one type. `quantization` is the method by which whole weights are quantised while they load; `facts`
    are of a model that is quantised so. With `in_8_bits`, the cache is kept in 8 bits, as that of `facts` must be then.
    """
    rounded: dict[int, _Rounded] = {}
    if facts is None:
        tensors = loaded(tensors, architecture)
        weights = _sums(((known_block(t.name, architecture), t) for t in tensors), len(architecture.layers),
                        element_bytes)  # fmt: skip
        if quantization is not None:
            rounded = _rounded(quantization, tensors, architecture, element_bytes)
        whole = pt_kv_bytes_per_token(architecture, element_bytes)
        kv = pt_kv_bytes_in_8_bits(architecture, element_bytes) if in_8_bits else whole
        read = whole if in_8_bits else {}
        state = pt_state_bytes(architecture, element_bytes)
        head = architecture.vocabulary * architecture.hidden_size * element_bytes if architecture.tied else 0
    else:
        weights = _weights(facts, tensors, element_bytes)
        kv, state, head = dict(enumerate(facts.kv)), dict(enumerate(facts.state)), facts.tied_head
        read = dict(enumerate(facts.read))
    if copies_tied:  # `packed_linear.py` orders the head's weights anew.
        weights[len(weights) - 2] += head
    return [
        replace(
            _block(number, size, kv.get(number, 0), state.get(number, 0), rounded.get(number, _Rounded())),
            read=read.get(number, 0),
        )
        for number, size in weights.items()
    ]


@dataclass
class _Rounded:
    """Sums what the quantised weights of a block take, and what they would take whole."""

    whole: int = 0
    values: int = 0
    scales: int = 0
    unpacked: int = 0
    loading: int = 0


def _rounded(
    method: str, tensors: Iterable[Tensor], architecture: Architecture, element_bytes: int
) -> dict[int, _Rounded]:
    sums: dict[int, _Rounded] = {}
    for tensor in tensors:
        size = quantized_tensor(method, tensor, architecture)
        if size is None:
            continue
        block = sums.setdefault(known_block(tensor.name, architecture), _Rounded())
        block.whole += tensor.bytes_as(element_bytes)
        block.values += size.values
        block.scales += size.scales
        block.unpacked = max(block.unpacked, tensor.bytes_as(element_bytes))
        block.loading = max(block.loading, loading_bytes(method, tensor.elements, element_bytes))
    return sums


def _block(number: int, weights: int, kv: int, state: int, rounded: _Rounded) -> Block:
    weights += rounded.values + rounded.scales - rounded.whole
    return Block(number, weights, kv, state, rounded.values, rounded.scales, rounded.unpacked, rounded.loading)


def _weights(facts: PtFacts, tensors: Iterable[Tensor], element_bytes: int) -> dict[int, int]:
    """Returns the bytes of each block, with what the model makes itself beside its weights."""
    stored = [tensor for tensor in tensors if not _is_dropped(tensor.name, facts)]
    if any(tensor.dtype not in FLOATS for tensor in stored):
        weights = _sums(
            ((stored_block(tensor.name, facts.names), tensor) for tensor in stored), facts.names.count, element_bytes
        )
    else:
        weights = dict(enumerate((facts.before, *facts.layers, facts.after), -1))
    return {number: size + facts.buffers[number + 1] for number, size in weights.items()}


def _is_dropped(name: str, facts: PtFacts) -> bool:
    """Returns whether a stored tensor is a copy of the tied head, or of a layer after the model's last one."""
    is_head = facts.tied_head > 0 and re.search(r"(?:^|\.)lm_head(?:\.|$)", name) is not None
    return is_head or stored_block(name, facts.names) > facts.names.count


# transformers keeps this in float32 whatever the model's type is.
_FLOAT32 = re.compile(rf"(?:^|\.)e_score_correction_bias$|{BNB_SCALES.pattern}")


def _sums(numbered: Iterable[tuple[int, Tensor]], layers: int, element_bytes: int) -> dict[int, int]:
    weights = dict.fromkeys(range(-1, layers + 1), 0)
    for number, tensor in numbered:
        weights[number] += tensor.bytes_as(4 if _FLOAT32.search(tensor.name) else element_bytes)
    return weights


@dataclass(frozen=True)
class LayerMap:
    """These are the blocks of each device, in the order of the given limits, and those that are left over."""

    parts: tuple[BlockGroup, ...]
    rest: BlockGroup


def map_layers(
    blocks: Sequence[Block],
    limits: Sequence[int],
    tokens: int,
    rows: int,
    spills: bool,
    beside: Mapping[int, BlockGroup] | None = None,
) -> LayerMap | None:
    """Fills the devices in turn, each to its limit in bytes for weights and cache. `beside` is what lies on a device
    anyway, by the device's number, such as a draft model.

    Without `spills` all blocks must find a place, or there is no map. With it, what is left over is computed on the
    first device, which keeps its cache and its adapters and has room for the largest left-over block.
    """
    beside = beside or {}
    if any(group.weights + group.cache(tokens, rows) > limits[device] for device, group in beside.items()):
        return None
    mapped = _fill(blocks, limits, tokens, rows, beside)
    if not mapped.rest.blocks:
        return mapped
    if not spills:
        return None
    own = beside[0].weights + beside[0].cache(tokens, rows) if 0 in beside else 0
    while True:  # Room kept on the first device may leave more blocks over, so it repeats until nothing changes.
        rest = mapped.rest
        kept = max(block.weights for block in rest.blocks) + rest.adapters + rest.cache(tokens, rows)
        if kept + own > limits[0]:
            return None
        mapped = _fill(blocks, [limits[0] - kept, *limits[1:]], tokens, rows, beside)
        if len(mapped.rest.blocks) <= len(rest.blocks):
            return mapped


def _fill(
    blocks: Sequence[Block], limits: Sequence[int], tokens: int, rows: int, beside: Mapping[int, BlockGroup]
) -> LayerMap:
    parts: list[list[Block]] = [[] for _ in limits]
    device, position = 0, 0
    # These are sums over what lies on the present device, adapters among the weights, and its largest `transient`.
    weights, largest, kv, state = _sums_of(beside.get(0))
    while position < len(blocks) and device < len(limits):
        block = blocks[position]
        cache = tokens * (kv + block.kv + max(largest, block.transient)) + rows * (state + block.state)
        held = weights + block.weights + block.adapters
        if held + cache <= limits[device]:
            weights, kv, state = held, kv + block.kv, state + block.state
            largest = max(largest, block.transient)
            parts[device].append(block)
            position += 1
        else:
            device += 1
            weights, largest, kv, state = _sums_of(beside.get(device))
    return LayerMap(tuple(BlockGroup(tuple(part)) for part in parts), BlockGroup(tuple(blocks[position:])))


def _sums_of(group: BlockGroup | None) -> tuple[int, int, int, int]:
    """Returns the weights of a group, and the largest `transient`, the `kv` and the `state` of its blocks."""
    if group is None:
        return 0, 0, 0, 0
    blocks = group.blocks
    largest = max((block.transient for block in blocks), default=0)
    return group.weights, largest, sum(block.kv for block in blocks), sum(block.state for block in blocks)
