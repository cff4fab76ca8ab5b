"""Says how large vLLM's KV cache is, of how many blocks it is made, and how many requests these allow."""

from serve_app.planning.memory import MIB, vllm_batch
from serve_app.planning.plan import ModelPlan


def cache_bytes(model: ModelPlan) -> int:
    """Returns the bytes of KV cache in whole MiB, unless one request of full length would no longer fit beside the
    block that vLLM keeps empty. Of a pipeline it is what the widest stage has, to the byte, of which vLLM makes the
    planned number of blocks."""
    cache = max(rank.kv_cache.bytes for rank in model.ranks)
    if model.pipeline_layers:
        return cache
    rounded = cache // MIB * MIB
    return rounded if rounded >= model.kv_bytes_per_request + model.kv_block_bytes else cache


def kv_blocks(model: ModelPlan) -> int | None:
    """Returns how many blocks vLLM is to make of its KV cache, or None if the plan does not know the size of one on
    these cards."""
    return cache_bytes(model) // model.kv_block_bytes if model.kv_block_bytes and model.knows_blocks else None


def lowered_rows(model: ModelPlan) -> int | None:
    """Returns the `max_num_seqs` with which vLLM starts where it would refuse that of the config or its own, and None
    where it takes it.

    Each request has at least one block of its own in layers that keep states, so no more requests than blocks ever run
    at once. vLLM refuses to capture CUDA graphs for more of them.
    """
    is_captured = model.ranks[0].device.is_gpu and not model.config.vllm_args.get("enforce_eager")
    if not model.has_states or not model.kv_block_bytes or not is_captured:
        return None
    blocks = cache_bytes(model) // model.kv_block_bytes
    _, rows = vllm_batch(model.config, (rank.device for rank in model.ranks))
    return blocks if blocks < rows else None
