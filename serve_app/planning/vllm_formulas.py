"""Computes by formulas how vLLM lays out a model of a known type, as `RankFacts`: the same value that vLLM's own code
gives for any type. `tests/planning/test_vllm_memory.py` compares the two to the byte.
"""

from collections import defaultdict
from collections.abc import Iterable

from serve_app.facts.architecture import Architecture
from serve_app.facts.engine_facts import CacheKind, CacheLayer, RankFacts
from serve_app.facts.weights import Tensor
from serve_app.planning.layer_map import known_block
from serve_app.planning.memory import linear_state_bytes, loaded, rank_bytes

# A block of KV cache has this many tokens on CUDA. MLA's kernel for fp8 takes 64. On the CPU, only the blocks of plain
# attention do not depend on the machine.
BLOCK_TOKENS = 16
CPU_BLOCK_TOKENS = 128
MLA_FP8_BLOCK_TOKENS = 64
# A linear attention layer has two pages for each sequence, because prefix caching, the default, keeps one more.
STATE_PAGES = 2
# With asynchronous scheduling, vLLM's default on GPUs, two steps' tokens may be on their way at once.
CONCURRENT_STEPS = 2
CPU_STEPS = 1

_KINDS: dict[str, CacheKind] = {"full": "full", "sliding": "sliding", "mla": "mla", "linear": "state"}


def has_plain_cache(architecture: Architecture) -> bool:
    """Returns whether all layers are attention with keys and values, windows or not."""
    return {"full", "sliding"}.issuperset(architecture.layers)


def rank_by_formula(
    architecture: Architecture,
    tensors: Iterable[Tensor],
    tp: int,
    element_bytes: int,
    kv_element_bytes: int,
    on_cpu: bool = False,
) -> RankFacts:
    """Returns one of `tp` equal ranks of vLLM. `element_bytes` is of a weight, and `kv_element_bytes` of an element of
    KV cache. `on_cpu` gives the blocks of vLLM's CPU build to a model with a plain cache."""
    is_cpus = on_cpu and has_plain_cache(architecture)
    blocks: dict[int, int] = defaultdict(int)
    for tensor in loaded(tensors, architecture):
        blocks[known_block(tensor.name, architecture)] += rank_bytes(tensor, architecture, tp, element_bytes)
    count = len(architecture.layers)
    return RankFacts(
        layers=tuple(blocks[number] for number in range(count)),
        before=blocks[-1],
        after=blocks[count],
        buffers=architecture.rotary_elements * element_bytes,
        cache=cache_layers(architecture, tp, element_bytes, kv_element_bytes, is_cpus),
        steps=CPU_STEPS if is_cpus else CONCURRENT_STEPS,
    )


def cache_layers(
    architecture: Architecture, tp: int, element_bytes: int, kv_element_bytes: int, is_cpus: bool = False
) -> tuple[CacheLayer, ...]:
    """Returns the cache of each layer on one of `tp` ranks. `is_cpus` is for a plain cache of vLLM's CPU build."""
    tokens, size = _page(architecture, tp, element_bytes, kv_element_bytes)
    if is_cpus:
        tokens, size = CPU_BLOCK_TOKENS, size // BLOCK_TOKENS * CPU_BLOCK_TOKENS
    return tuple(
        CacheLayer(
            layer=number,
            kind=_KINDS[kind],
            block_tokens=tokens,
            page_bytes=size,
            window=architecture.sliding_window or 1 if kind == "sliding" else 0,
            pages=STATE_PAGES if kind == "linear" else 0,
            form=list(_KINDS).index(kind),
        )
        for number, kind in enumerate(architecture.layers)
    )


def _page(architecture: Architecture, tp: int, element_bytes: int, kv_element_bytes: int) -> tuple[int, int]:
    """Returns the page of one layer: the tokens of a block, and its bytes. Hybrids have one page for all layers."""
    if "mla" in architecture.layers:  # The compressed cache is the same on every rank.
        tokens = MLA_FP8_BLOCK_TOKENS if kv_element_bytes == 1 else BLOCK_TOKENS
        return tokens, tokens * (architecture.latent_size + architecture.rope_size) * kv_element_bytes
    per_token = 2 * max(1, architecture.kv_heads // tp) * architecture.head_size * kv_element_bytes
    tokens = BLOCK_TOKENS
    if "linear" in architecture.layers:  # Blocks are so long that a page holds a state.
        state = linear_state_bytes(architecture, tp, element_bytes)
        tokens = max(BLOCK_TOKENS, -(-state // (BLOCK_TOKENS * per_token)) * BLOCK_TOKENS)
    return tokens, tokens * per_token
