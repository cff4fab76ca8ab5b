"""Says what a change costs the user. A fix of several changes costs their sum.

| price | change | what is lost |
|---|---|---|
| 1 | more cards: `tensor_parallel_size`, `num_gpus` | nothing, since the cards are idle |
| 1 | other cards: the numbers in `gpu_ids` or `max_memory` | nothing |
| 1 | no `pipeline_layers`, so that the plan finds the layers of each stage | nothing |
| 1 | the same stages on one node less: `nnodes` | nothing |
| 2 | a higher `max_memory`, or more cards in it | nothing that others use |
| 2 | a larger share: `num_gpus`, `gpu_memory_utilization` | nothing that others use |
| 2 | `kv_cache_memory_bytes`, `max_num_seqs` and `max_model_len` for what is asked for | nothing |
| 3 | no `gpu_ids`, share or `gpu_memory_utilization` | nothing that others use |
| 4 | no `max_memory` | its limits, but nothing that others use |
| 10 | `kv_cache_dtype: fp8`, with vLLM under `engine_args` | a little precision of the KV cache |
| 11 | a lower `max_num_seqs`, or `max_num_batched_tokens` of a model that pools | requests that run at once |
| 12 | a smaller share, limit or `kv_cache_memory_bytes` | KV cache, so requests that run at once |
| 13 | fewer cards | speed |
| 14 | no `accelerator_type` | the choice of the card |
| 15 | a share of a card instead of a whole one | KV cache, and speed while others use the card |
| 16 | stages on more nodes: `nnodes`, mostly with `pipeline_parallel_size` | time on the network for each token |
| 17 | no draft model: `speculative` | the speed that its drafts give |
| 18 | a lower `max_loras` | requests for different adapters that run at once |
| 19 | a lower `max_lora_rank` | adapters of a larger rank |
| 100 | `quantization: fp8`, or `bnb-int8` with pt | precision of the weights |
| 105 | `quantization: bnb-nf4` with pt | more precision of the weights |
| 110 | `max_model_len`, at least half of it | long requests |
| 120 | the other backend | speed, or fields of the first one |
| 130 | `max_model_len`, less than half of it | most of the context |
| 140 | fewer replicas | requests that run at once, and a spare when one is lost |
| 1000 | layers on the CPU, by `max_memory` | most of the speed |
| 1001 | `device: cpu`, where there is no GPU | most of the speed |
| 10000 | one more card, a larger one, or a set of equal ones | money |

Prices below 10 lose nothing, those below 100 little, those below 1000 quality or length, and those below 10000 most of
the speed. A fix with a cheaper worst loss comes first, and so do single changes before pairs with the same worst loss.
Pairs are tried only where nothing with the same worst loss or less helps alone, and where no fix so far keeps the
length and the number of requests: then the cheapest pair that keeps both is one of the fixes.
"""

MORE_CARDS = OTHER_CARDS = OWN_LAYERS = FEWER_NODES = 1
LIMIT = SHARE = OWN = 2
NO_LIMIT = 3
NO_MAX_MEMORY = 4
KV_IN_8_BITS, FEWER_SEQUENCES, LESS_CACHE, FEWER_CARDS, ANY_CARD, PART_OF_A_CARD, MORE_NODES = (
    10,
    11,
    12,
    13,
    14,
    15,
    16,
)
WEIGHTS_IN_8_BITS, WEIGHTS_IN_4_BITS = 100, 105
NO_DRAFT = 17
FEWER_ADAPTERS, SMALLER_ADAPTERS = 18, 19
SHORTER, OTHER_BACKEND, MUCH_SHORTER, FEWER_REPLICAS = 110, 120, 130, 140
SPILL, ON_CPU = 1000, 1001
CARD = 10_000

# With these changes, requests are shorter or fewer run at once.
FEWER_REQUESTS = frozenset({FEWER_SEQUENCES, LESS_CACHE, PART_OF_A_CARD, SHORTER, MUCH_SHORTER, FEWER_REPLICAS})
# The worst losses, in their order: the prices of each are below these.
TIERS = (10, 100, 1000, 10_000)


def tier_of(price: int) -> int:
    """Returns the worst loss of one change of this price, from 0 for none to 4 for a card."""
    return sum(price >= bound for bound in TIERS)
