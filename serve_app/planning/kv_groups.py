"""Computes the KV cache of one request from the caches of a model's layers, by vLLM's rules.

vLLM draws the blocks of all layers from one pool. It puts layers into groups that share a table of blocks, so a block
has the bytes of the widest group, and a request takes the blocks of each group. The rules are those of
`get_kv_cache_groups` and `_max_memory_usage_bytes_from_groups` in `vllm.v1.core.kv_cache_utils` of vLLM 0.32;
`tests/planning/vllm_survey.py` compares them for every architecture that vLLM knows.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import lcm

from serve_app.facts.engine_facts import CacheLayer, RankFacts

Group = tuple[CacheLayer, ...]

# Layers of these kinds have a block for every token, so vLLM puts them into one group if their blocks are equally long.
_GROWING = frozenset({"full", "mla"})
_CONSTANT = frozenset({"state", "ring"})
_WINDOWED = frozenset({"sliding", "sliding_mla"})


def kv_bytes_per_request(facts: RankFacts, tokens: int, batched: int) -> int:
    """Returns the bytes of cache on one rank for one sequence of `tokens` tokens, as vLLM checks it at its start.

    `batched` is `max_num_batched_tokens`. Raises ValueError for caches that vLLM cannot arrange in one pool.
    """
    groups = cache_groups(facts.cache, facts.packs_blocks)
    if not groups:
        return 0
    in_flight = facts.steps * batched
    blocks = sum(max(_blocks(layer, tokens, batched, in_flight) for layer in group) for group in groups)
    return blocks * bytes_per_block(groups, facts.packs_blocks)


def spare_bytes(facts: RankFacts) -> int:
    """Returns the bytes of the block that vLLM keeps empty, beside those of all requests."""
    groups = cache_groups(facts.cache, facts.packs_blocks)
    return bytes_per_block(groups, facts.packs_blocks) if groups else 0


def _blocks(layer: CacheLayer, tokens: int, batched: int, in_flight: int) -> int:
    """Returns the most blocks that a request has in a layer at one time."""
    held = tokens
    if layer.kind in _CONSTANT:
        return layer.pages
    if layer.kind == "cross":  # An encoder takes at most the tokens of a step.
        held = batched
    elif layer.kind == "chunked":
        held = min(layer.window + in_flight, tokens)
    elif layer.kind in _WINDOWED:  # The window comes before the tokens on their way, and its first block may be cut.
        return _ceil(min(layer.window - 1 + in_flight, tokens), layer.block_tokens) + 1
    return _ceil(held, layer.block_tokens)


def bytes_per_block(groups: Sequence[Group], packs_blocks: bool) -> int:
    """Returns the bytes that one block takes of the pool, which are those of the widest group."""
    if packs_blocks:
        widest = max(sum(layer.page_bytes for layer in group) for group in groups)
        return _rounded(widest, lcm(*(layer.alignment for group in groups for layer in group)))
    return max(sum(_rounded(layer.page_bytes, layer.alignment) for layer in group) for group in groups)


def cache_groups(cache: Iterable[CacheLayer], packs_blocks: bool) -> list[Group]:
    """Returns the layers in groups, each of which has one table of blocks. Raises ValueError as
    `kv_bytes_per_request` does."""
    layers = tuple(layer for layer in cache if layer.kind != "encoder")
    if not layers:
        return []
    if len({_sort(layer) for layer in layers}) == 1 or is_uniform(layers):
        return [layers]
    if packs_blocks and len({layer.page_bytes for layer in layers}) > 1:
        return _packed_groups(layers)
    unified = _with_one_page_size(layers)
    return [layers_as_growing(layers)] if unified is None else _equal_groups(unified)


def _sort(layer: CacheLayer) -> tuple[int, int, int]:
    return layer.form, layer.block_tokens, layer.page_bytes


def is_uniform(layers: Sequence[CacheLayer]) -> bool:
    """Returns whether all layers need the same number of blocks for any request, so that they can share a group."""
    return len({_family(layer) for layer in layers}) == 1


def _family(layer: CacheLayer) -> tuple[object, ...]:
    kind = "growing" if layer.kind in _GROWING else layer.kind
    size = layer.page_bytes if layer.kind == "state" else 0
    window = layer.window if layer.kind not in _GROWING else 0
    return kind, layer.block_tokens, window, layer.pages, size


def _with_one_page_size(layers: Group) -> Group | None:
    """Returns the layers with pages of the largest size: longer blocks where that is a multiple, and else padding.

    Returns None where pages of MLA stand beside windows that can be kept in full instead.
    """
    largest = max(layer.page_bytes for layer in layers)
    unified = []
    for layer in layers:
        if layer.page_bytes == largest or layer.kind == "state":
            unified.append(replace(layer, page_bytes=largest))
        elif largest % layer.page_bytes == 0:
            block = layer.block_tokens * (largest // layer.page_bytes)
            unified.append(replace(layer, page_bytes=largest, block_tokens=block))
        elif layer.kind != "mla":
            unified.append(replace(layer, page_bytes=largest))
        elif {other.kind for other in layers} == {"mla", "sliding"}:
            return None
        else:
            raise ValueError(f"layer {layer.layer}: its pages of {layer.page_bytes} bytes cannot be made {largest}")
    return tuple(unified)


def layers_as_growing(layers: Group) -> Group:
    """Returns the layers with a block for every token, windows or not, as vLLM keeps them where nothing else works.

    Raises ValueError if their blocks have different lengths.
    """
    growing = tuple(replace(layer, kind="full", window=0) if layer.kind in _WINDOWED else layer for layer in layers)
    if not is_uniform(growing):
        raise ValueError("the layers of its cache have blocks of different lengths, which cannot be made equal")
    return growing


def _equal_groups(layers: Group) -> list[Group]:
    """Returns groups of one number of layers, whose pages have one size. The last group of each kind may be smaller,
    and is padded: a block is as wide as the others."""
    buckets: dict[tuple[int, int, int], list[CacheLayer]] = {}
    for layer in layers:
        buckets.setdefault(_sort(layer), []).append(layer)
    fewest, most = min(map(len, buckets.values())), max(map(len, buckets.values()))
    size = most if most < 1.5 * fewest else fewest
    return [tuple(bucket[first :: _ceil(len(bucket), size)]) for bucket in buckets.values()
            for first in range(_ceil(len(bucket), size))]  # fmt: skip


def _packed_groups(layers: Group) -> list[Group]:
    """Returns groups for blocks in which pages of several sizes lie side by side.

    A bucket of uniform layers with equally many pages of each size repeats a pattern, so it can be split into groups of
    whole patterns. A bucket of states is split so far that none of its groups widens the block.
    """
    buckets: list[list[CacheLayer]] = []
    for layer in layers:
        home = next((bucket for bucket in buckets if is_uniform([*bucket, layer])), None)
        if home is None:
            buckets.append([layer])
        else:
            home.append(layer)
    repeats = _repeats_per_group(buckets)
    splits = [_ceil(_repeats(bucket), repeats) if repeats and _is_balanced(bucket) else 1 for bucket in buckets]

    def is_divisible(bucket: Sequence[CacheLayer]) -> bool:
        kind = bucket[0].kind
        return kind in _CONSTANT or (not repeats and kind in _WINDOWED)

    anchor = max(
        _widest(bucket, len(bucket) if is_divisible(bucket) else split)
        for bucket, split in zip(buckets, splits, strict=True)
    )
    groups: list[Group] = []
    for bucket, split in zip(buckets, splits, strict=True):
        if is_divisible(bucket):
            split = max(split, _ceil(len(bucket), max(anchor // bucket[0].page_bytes, 1)))
        groups += _split(bucket, split)
    return groups


def _pages_by_size(bucket: Iterable[CacheLayer]) -> dict[int, list[CacheLayer]]:
    sizes: dict[int, list[CacheLayer]] = {}
    for layer in bucket:
        sizes.setdefault(layer.page_bytes, []).append(layer)
    return sizes


def _is_balanced(bucket: Iterable[CacheLayer]) -> bool:
    return len(set(map(len, _pages_by_size(bucket).values()))) == 1


def _repeats(bucket: Iterable[CacheLayer]) -> int:
    return Counter(layer.page_bytes for layer in bucket).most_common(1)[0][1]


def _repeats_per_group(buckets: Sequence[Sequence[CacheLayer]]) -> int:
    """Returns how many patterns a group has, by which the fewest pages are padded, or 0 if no pattern has two sizes."""
    balanced = [bucket for bucket in buckets if _is_balanced(bucket)]
    least = max((_repeats(bucket) for bucket in balanced if len(_pages_by_size(bucket)) > 1), default=0)
    if not least:
        return 0
    counts = [_repeats(bucket) for bucket in balanced]
    return min(range(least, max(counts) + 1), key=lambda size: (sum(-count % size for count in counts), -size))


def _widest(bucket: Iterable[CacheLayer], split: int) -> int:
    return sum(_ceil(len(same), split) * page for page, same in _pages_by_size(bucket).items())


def _split(bucket: Sequence[CacheLayer], split: int) -> list[Group]:
    if split == 1:
        return [tuple(bucket)]
    patterns = list(zip(*_pages_by_size(bucket).values(), strict=True))
    return [tuple(layer for pattern in patterns[first::split] for layer in pattern) for first in range(split)]


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _rounded(size: int, alignment: int) -> int:
    return _ceil(size, alignment) * alignment
