"""Computes by formulas how vLLM lays out a model of a known type, as `RankFacts`: the same value that vLLM's own code
gives for any type. `tests/planning/test_vllm_memory.py` compares the two to the byte.
"""

from collections import defaultdict
from collections.abc import Iterable, Set

from serve_app.facts.architecture import Architecture
from serve_app.facts.engine_facts import BesideLayers, CacheKind, CacheLayer, RankFacts
from serve_app.facts.weights import Tensor
from serve_app.planning.layer_map import known_block
from serve_app.planning.memory import linear_state_bytes, loaded, rank_bytes, rank_bytes_in_fp8

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

# Of these, only the first stage of a pipeline has the embedding, and only the last one has norm and head, and a tied
# embedding. The others that the plan knows build all of it on every stage.
_ENDS_APART = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite", "starcoder2", "deepseek_v2", "deepseek_v3"}
)
# vLLM starts a stage of these only if it has a layer with experts.
_NEEDS_EXPERTS = frozenset({"qwen3_moe"})

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
    in_fp8: bool = False,
) -> RankFacts:
    """Returns one of `tp` equal ranks of vLLM. `element_bytes` is of a weight, and `kv_element_bytes` of an element of
    KV cache. `on_cpu` gives the blocks of vLLM's CPU build to a model with a plain cache. `in_fp8` says that vLLM
    rounds the weights while it loads them, for which they are guesses with a margin."""
    weigh = rank_bytes_in_fp8 if in_fp8 else rank_bytes
    is_cpus = on_cpu and has_plain_cache(architecture)
    blocks: dict[int, int] = defaultdict(int)
    with_experts: set[int] = set()
    for tensor in loaded(tensors, architecture):
        number = known_block(tensor.name, architecture)
        blocks[number] += weigh(tensor, architecture, tp, element_bytes)
        if ".experts." in tensor.name:
            with_experts.add(number)
    count = len(architecture.layers)
    return RankFacts(
        layers=tuple(blocks[number] for number in range(count)),
        before=blocks[-1],
        after=blocks[count],
        buffers=architecture.rotary_elements * element_bytes,
        cache=cache_layers(architecture, tp, element_bytes, kv_element_bytes, is_cpus),
        steps=CPU_STEPS if is_cpus else CONCURRENT_STEPS,
        beside=_beside(architecture, blocks[-1], blocks[count]),
        dependent=_dependent(architecture, with_experts),
    )


def _beside(architecture: Architecture, before: int, after: int) -> BesideLayers | None:
    """Returns what the stages of a pipeline have beside their layers, or None where each has all of it."""
    if architecture.model_type not in _ENDS_APART:
        return None
    return BesideLayers(before, 0, after + (before if architecture.tied else 0))


def _dependent(architecture: Architecture, with_experts: Set[int]) -> tuple[int, ...]:
    """Returns the layers of which a stage cannot consist alone. vLLM pads the states of linear attention only where a
    stage has full attention too."""
    if architecture.model_type in _NEEDS_EXPERTS:
        return tuple(number for number in range(len(architecture.layers)) if number not in with_experts)
    return tuple(number for number, kind in enumerate(architecture.layers) if kind == "linear")


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
