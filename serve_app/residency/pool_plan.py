"""Plans a model that shares the memory of a pool, as if it had all of the pool to itself."""

from collections.abc import Sequence
from dataclasses import replace

from serve_app.facts.inventory import Device, Inventory
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import ModelPlan, Plan
from serve_app.planning.planner import make_plan

# A plan gives a KV cache all that is left, and then no other model would fit beside it. Without `kv_cache_memory_bytes`
# the cache of a model that swaps has what a request of full length needs, and at least this share of its weights.
KV_SHARE_OF_WEIGHTS = 0.25


def plan_in_pool(request: ModelRequest, devices: Sequence[Device]) -> Plan:
    """Returns the plan of one replica on these devices, of which everything that is free is the pool's. It has problems
    if the model does not fit even alone. The config of the planned model has the bytes of its KV cache."""
    plan = make_plan([request], Inventory(tuple(devices)))
    if not plan.fits or request.config.kv_cache_memory_bytes is not None:
        return plan
    size = cache_bytes(plan.models[0])
    config = request.config.model_copy(update={"kv_cache_memory_bytes": size})
    smaller = make_plan([replace(request, config=config)], Inventory(tuple(devices)))
    return smaller if smaller.fits else plan


def cache_bytes(planned: ModelPlan) -> int:
    """Returns the bytes of KV cache of a model that swaps: on each rank of vLLM, and on all devices of pt together."""
    together = max if planned.backend == "vllm" else sum
    weights = together(rank.weights.bytes for rank in planned.ranks)
    held = together(rank.kv_cache.bytes for rank in planned.ranks)
    return min(held, max(planned.kv_bytes_needed, int(KV_SHARE_OF_WEIGHTS * weights)))
