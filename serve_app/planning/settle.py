"""From a plan to the config of a replica: what was chosen is written down, and what cannot fit is refused."""

from math import ceil
from typing import Any

from serve_app.config import ModelConfig
from serve_app.errors import PlacementError
from serve_app.facts.inventory import Inventory, as_empty
from serve_app.planning.fit import ModelRequest
from serve_app.planning.fixes import with_fixes
from serve_app.planning.plan import ModelPlan, Plan
from serve_app.planning.planner import make_plan


def settle(request: ModelRequest, inventory: Inventory) -> ModelConfig:
    """The config with its backend chosen, judged by the devices as if they were empty.

    Raises PlacementError with the plan's words, and its cure, for a model that no device can hold.
    """
    empty = as_empty(inventory)
    plan = with_fixes(make_plan([request], empty), [request], empty)
    if not plan.fits:
        raise PlacementError(problem_text(plan))
    return plan.models[0].config


def problem_text(plan: Plan) -> str:
    """The problems of a plan with their cures, one line each."""
    lines = []
    for problem in plan.problems:
        cure = f" Smallest fix: {problem.fix.text}." if problem.fix is not None else ""
        lines.append(problem.message + cure)
    return "\n".join(lines)


def pinned(model: ModelPlan) -> dict[str, Any]:
    """The fields that a plan chose, to be written into the config: with them a start does exactly what was planned."""
    fields: dict[str, Any] = {"infer_backend": model.backend, "max_model_len": model.max_model_len}
    device = model.ranks[0].device
    if model.backend == "vllm":
        fields["tensor_parallel_size"] = model.tensor_parallel_size
        fields["kv_cache_memory_bytes"] = _mib(model.ranks[0].kv_cache.bytes)
        if device.is_gpu:  # vLLM refuses to start when less than this share of the card is free.
            rank = model.ranks[0]
            share = (rank.share.bytes - rank.context.bytes) / device.total_bytes
            fields["engine_args"] = {**model.config.engine_args, "gpu_memory_utilization": ceil(share * 1000) / 1000}
        return fields
    if model.config.num_gpus is not None:
        fields["num_gpus"] = model.config.num_gpus
    if model.config.max_memory is None and not device.is_gpu:
        fields["kv_cache_memory_bytes"] = _mib(sum(rank.kv_cache.bytes for rank in model.ranks))
    return fields


def _mib(size: int) -> str:
    """Rounded down to whole MiB, as the config reads it."""
    return f"{size // 2**20}MiB"
