"""Computes what an engine's buffers for LoRA adapters take in each part of a model."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from serve_app.facts.adapter import AdapterFacts
from serve_app.facts.architecture import Architecture
from serve_app.facts.engine_facts import BesideLayers, RankAdapters, RankFacts
from serve_app.facts.weights import Tensor
from serve_app.planning.adapters import AdapterRoom, buffer_bytes, buffered_modules, ends_in
from serve_app.planning.layer_map import known_block
from serve_app.planning.memory import is_linear, is_vocabulary, loaded, rank_elements


def pt_adapter_bytes(
    wanted: Collection[str] | None,
    adapters: Iterable[AdapterFacts],
    tensors: Iterable[Tensor],
    room: AdapterRoom,
    element_bytes: int,
    block_of: Callable[[str], int],
    hidden: int = 0,
) -> dict[int, int]:
    """Returns the bytes of pt's buffers for adapters by the number of the block, which `block_of` tells of a module.
    The others are as for `buffered_modules`."""
    blocks: dict[int, dict[str, tuple[int, int]]] = defaultdict(dict)
    for name, shape in buffered_modules(wanted, adapters, tensors, hidden).items():
        blocks[block_of(name)][name] = shape
    return {number: buffer_bytes(modules, room, element_bytes) for number, modules in blocks.items()}


def rank_adapters_by_formula(
    tensors: Iterable[Tensor],
    architecture: Architecture,
    tp: int,
    element_bytes: int,
    wanted: Collection[str] | None,
) -> RankAdapters:
    """Returns what vLLM's buffers for one adapter take on one of `tp` ranks for each unit of its rank: two factors for
    each linear layer, of which one is split as the layer is. It is a guess, because vLLM's own code knows which of its
    layers take adapters."""
    blocks: dict[int, int] = defaultdict(int)
    for tensor in loaded(tensors, architecture):
        name = tensor.name.removesuffix(".weight")
        takes = is_linear(tensor) or is_vocabulary(tensor)
        if name == tensor.name or not takes or (wanted is not None and not ends_in(name, wanted)):
            continue
        blocks[known_block(name, architecture)] += rank_elements(tensor, architecture, tp) * element_bytes
    count = len(architecture.layers)
    before, after = blocks[-1], blocks[count]
    layers = tuple(blocks[number] for number in range(count))
    beside = BesideLayers(before, 0, after + (before if architecture.tied else 0))
    return RankAdapters(layers, before + after, beside)


def with_adapters(facts: RankFacts, own: RankAdapters, scale: float) -> RankFacts:
    """Returns a rank whose layers, and what is beside them, have their buffers for adapters among their weights.
    `scale` times the bytes of a unit of rank are those of all adapters."""

    def more(size: int) -> int:
        return int(size * scale)

    beside = facts.beside
    if beside is not None:
        its = own.beside or BesideLayers(own.whole, own.whole, own.whole)
        beside = BesideLayers(
            beside.first + more(its.first), beside.middle + more(its.middle), beside.last + more(its.last)
        )
    layers = own.layers if len(own.layers) == len(facts.layers) else _spread(own, len(facts.layers))
    return replace(
        facts,
        layers=tuple(size + more(extra) for size, extra in zip(facts.layers, layers, strict=True)),
        before=facts.before + more(own.whole),
        beside=beside,
    )


def stage_unit(own: RankAdapters, start: int, end: int, count: int) -> int:
    """Returns the bytes of a unit of rank of the stage of a pipeline that has the layers from `start` to before `end`
    of so many, as `with_adapters` counts them."""
    layers = own.layers if len(own.layers) == count else _spread(own, count)
    its = own.beside or BesideLayers(own.whole, own.whole, own.whole)
    return sum(layers[start:end]) + its.at(is_first=start == 0, is_last=end == count)


def _spread(own: RankAdapters, count: int) -> tuple[int, ...]:
    """Returns the buffers of all layers as if all layers were alike."""
    return (-(-sum(own.layers) // max(1, count)),) * count
