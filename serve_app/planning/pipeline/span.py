"""Counts what consecutive layers of a model take as one stage of vLLM's pipeline, on each of its equal ranks.

The groups of the KV cache are those of the whole model. A stage has the part of each group that its layers are in, so
its blocks have the bytes of the widest part. The rules are those of `_project_kv_cache_groups_to_worker` and
`_get_kv_cache_bytes_per_block` in `vllm.v1.core.kv_cache_utils` of vLLM 0.32.

Each stage has an anchor, which is a layer that can be a stage by itself. vLLM divides by the bytes of a block, so a
layer without a KV cache is none, unless no layer of the model has a cache. Neither are the layers of
`RankFacts.dependent`: vLLM builds some models only if a stage has a layer with experts, and it pads the states of a
hybrid model only where a stage has attention.
"""

from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm

from serve_app.facts.engine_facts import BesideLayers, RankFacts
from serve_app.planning.kv_groups import Group, bytes_per_block, cache_groups, kv_bytes_per_request
from serve_app.planning.pipeline.stage import Demand


@dataclass(frozen=True)
class Span:
    """These are the layers from `start` to before `end`. Sizes are in bytes.

    `weights` includes what the stage has beside its layers, and `read` is what a token's forward pass reads of them:
    not the embedding, of which a token takes one row, and not what every stage has. `block_bytes` is as for `Stage`.
    """

    start: int
    end: int
    weights: int
    read: int
    block_bytes: int


@dataclass(frozen=True)
class PipelineModel:
    """This is a model as the stages of a pipeline see it. `spans` has every stage that is possible, by its start and
    end. All of the model's `buffers` count in each stage, which is the most that a stage has. A request of
    `max_model_len` takes `blocks_per_request`, which is 0 for a model without a KV cache. All stages together have at
    least `least_weights`, and a block takes at least `block_bytes` in all of them."""

    layers: int
    anchors: int
    buffers: int
    blocks_per_request: int
    least_weights: int
    block_bytes: int
    spans: dict[tuple[int, int], Span]


# A search plans one model on many cards. A model of 126 layers has 8,001 stages.
@lru_cache(maxsize=8)
def pipeline_model(facts: RankFacts, stages: int, demand: Demand) -> PipelineModel:
    """Returns a model for a pipeline of so many stages.

    Raises ValueError for caches that vLLM cannot arrange in one pool, and for those that belong to none of its layers.
    """
    groups = cache_groups(facts.cache, facts.packs_blocks)
    if outside := [layer for group in groups for layer in group if not 0 <= layer.layer < len(facts.layers)]:
        raise ValueError(f"{len(outside)} of its KV caches belong to none of its layers, so no stage can have them")
    cached = {layer.layer for group in groups for layer in group}
    everything = set(range(len(facts.layers)))
    anchors = everything if stages == 1 else (cached or everything) - set(facts.dependent)
    return PipelineModel(
        layers=len(facts.layers),
        anchors=len(anchors),
        buffers=facts.buffers,
        blocks_per_request=blocks_per_request(facts, stages, demand),
        least_weights=sum(facts.layers) + _least_beside(facts, stages),
        block_bytes=max((sum(layer.page_bytes for layer in group) for group in groups), default=0),
        spans=_spans(facts, groups, stages, anchors),
    )


def blocks_per_request(facts: RankFacts, stages: int, demand: Demand) -> int:
    """Returns the blocks of KV cache that a request of `max_model_len` takes, which is 0 for a model without a cache.

    A pipeline has a step on its way in each stage, where a single stage has one, so windows keep more tokens. Source:
    `VllmConfig.max_concurrent_batches` in vLLM 0.32.
    """
    groups = cache_groups(facts.cache, facts.packs_blocks)
    if not groups:
        return 0
    in_flight = replace(facts, steps=facts.steps - 1 + stages)
    size = kv_bytes_per_request(in_flight, demand.max_model_len, demand.max_num_batched_tokens)
    return size // bytes_per_block(groups, facts.packs_blocks)


def _least_beside(facts: RankFacts, stages: int) -> int:
    """Returns what all stages together have beside their layers."""
    beside = beside_layers(facts, stages)
    return beside.first + beside.last + (stages - 2) * beside.middle if stages > 1 else beside.first


def _spans(facts: RankFacts, groups: Sequence[Group], stages: int, anchors: Set[int]) -> dict[tuple[int, int], Span]:
    """Returns the possible stages. Each sum is taken from the sum of one layer less."""
    pages: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for number, group in enumerate(groups):
        for layer in group:
            pages[layer.layer].append((number, layer.page_bytes, layer.alignment))
    count, beside = len(facts.layers), beside_layers(facts, stages)
    head = max(facts.after, beside.last - beside.middle)  # A tied head is not in `after`.
    spans = {}
    for start in range(count):
        sums, alignment, weights, has_anchor = [0] * len(groups), 1, 0, False
        for end in range(start + 1, count + 1):
            weights += facts.layers[end - 1]
            has_anchor |= end - 1 in anchors
            for number, page_bytes, page_alignment in pages[end - 1]:
                sums[number] += page_bytes if facts.packs_blocks else _rounded(page_bytes, page_alignment)
                alignment = lcm(alignment, page_alignment)
            if has_anchor:
                block_bytes = _rounded(max(sums, default=0), alignment if facts.packs_blocks else 1)
                spans[start, end] = _span(start, end, weights, block_bytes, count, beside, head)
    return spans


def _span(start: int, end: int, weights: int, block_bytes: int, count: int, beside: BesideLayers, head: int) -> Span:
    extra = beside.at(is_first=start == 0, is_last=end == count)
    read = weights + (head if end == count else 0)
    return Span(start, end, weights + extra, read, block_bytes)


def beside_layers(facts: RankFacts, stages: int) -> BesideLayers:
    """Returns the weights of stages beside their layers. Without a word of the engine on pipelines, each stage counts
    with all of them, which is the most that it may have. A single stage has all of them, too."""
    everything = facts.before + facts.after
    if facts.beside is None or stages == 1:
        return BesideLayers(everything, everything, everything)
    return facts.beside


def _rounded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
