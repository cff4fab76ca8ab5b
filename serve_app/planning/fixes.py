"""Finds fixes for what does not fit by planning again, the smallest change first.

A cure is offered only when the plan with it places the model and breaks no other. Lowering the tensor parallel size is
never offered, because it raises what each GPU must hold.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from serve_app.config import ONLY_VLLM, ModelConfig
from serve_app.facts.inventory import Device, Inventory
from serve_app.planning.fit import ModelRequest
from serve_app.planning.memory import GIB, MIB, RESERVE_SHARE
from serve_app.planning.plan import Fix, Plan, Problem
from serve_app.planning.planner import make_plan

# Requests shorter than this are of little use, so no shorter one is offered.
LEAST_MODEL_LEN = 1024
MODEL_LEN_STEP = 256
# The search for cures makes so many plans with so many tries, since a user waits. Problems left then show no cure.
MOST_PLANS = 100
MOST_TRIES = 20
# All of them may together try this many placements, as models × GPUs, since a plan of many models takes longer.
MOST_WORK = 10_000
# These sizes in GiB of one more GPU on each node are tried beside the sizes that are there.
GPU_SIZES = (16, 24, 48, 80, 141)
# A limit of max_memory is raised in steps of so many bytes, as the YAML has them.
CAP_STEP = 500_000_000
# A limit may be this share of a GPU's free memory. The rest is the plan's reserve.
CAP_SHARE = 1 - RESERVE_SHARE
UTILIZATION = "gpu_memory_utilization"


@dataclass(frozen=True)
class Candidate:
    """This is a changed request, or a changed inventory, and the line that a user would write for it."""

    field: str
    value: Any
    request: ModelRequest
    inventory: Inventory


def with_fixes(plan: Plan, requests: Sequence[ModelRequest], inventory: Inventory) -> Plan:
    """Returns the plan with a fix for each problem that has one."""
    units = sum(max(1, request.replicas) for request in requests)
    budget = Budget(min(MOST_PLANS, MOST_WORK // (units * max(1, len(inventory.devices)))))
    problems = tuple(_with_fix(problem, plan, requests, inventory, budget) for problem in plan.problems)
    return replace(plan, problems=problems)


def apply(fix: Fix, request: ModelRequest, inventory: Inventory) -> tuple[ModelRequest, Inventory]:
    """Returns the request and the inventory with a fix, as a user who writes its line would have them."""
    if fix.field == "gpus":
        return request, _with_gpu(inventory, int(float(fix.value.removesuffix("GiB")) * GIB))
    if fix.field == "num_replicas":
        return replace(request, replicas=fix.value), inventory
    return _changed(request, fix.field, fix.value), inventory


@dataclass
class Budget:
    """This is the number of plans that may still be made."""

    left: int


def _with_fix(
    problem: Problem, plan: Plan, requests: Sequence[ModelRequest], inventory: Inventory, budget: Budget
) -> Problem:
    request = next(request for request in requests if request.name == problem.model)
    others = {other.model for other in plan.problems if other.model != problem.model}

    def helps(candidate: Candidate) -> bool:
        budget.left -= 1
        if budget.left < 0:
            return False
        changed = [candidate.request if item.name == request.name else item for item in requests]
        after = make_plan(changed, candidate.inventory, MOST_TRIES)
        return {item.model for item in after.problems} <= others

    for candidate in _candidates(problem, request, inventory, helps):
        if helps(candidate):
            return replace(problem, fix=Fix(candidate.field, candidate.value, _saved(request, candidate, problem)))
    return problem


def _saved(request: ModelRequest, candidate: Candidate, problem: Problem) -> int:
    """Returns the bytes that a change takes off the fullest rank: all of them for quantised weights, and otherwise at
    least what was missing."""
    if candidate.field == "quantization":
        tp = request.config.tensor_parallel_size or 1
        return request.rank_weights(tp).bytes - candidate.request.rank_weights(tp).bytes
    return problem.missing_bytes


def _candidates(problem: Problem, request: ModelRequest, inventory: Inventory, helps: Any) -> Iterator[Candidate]:
    """Yields candidates, those first that take least away from the user."""
    config = request.config

    def change(field: str, value: Any) -> Candidate:
        return Candidate(field, value, _changed(request, field, value), inventory)

    if problem.code == "tensor_parallel":
        valid = request.valid_tensor_parallel_sizes()
        wanted = config.tensor_parallel_size or 1
        for size in sorted(valid, key=lambda size: (size < wanted, abs(size - wanted))):
            yield change("tensor_parallel_size", size)
    if (
        problem.code in ("tensor_parallel", "no_device", "facts_missing", "vllm_refuses")
        and config.infer_backend == "vllm"
    ):
        yield change("infer_backend", "pt")
    if problem.code == "utilization":
        percents = range(int(config.vllm_args["gpu_memory_utilization"] * 100) - 1, 0, -1)
        yield from (change("engine_args", _with_utilization(config, percent / 100)) for percent in percents)
    if problem.code == "max_model_len":
        yield change("max_model_len", request.own_length)
    if problem.code == "max_memory":
        yield from (change("max_memory", caps) for caps in _lower_caps(request, inventory))
    if problem.code == "small_cache":
        needed = (config.kv_cache_memory_bytes or 0) + problem.missing_bytes
        yield change("kv_cache_memory_bytes", f"{-(-needed // MIB)}MiB")
    if problem.code == "over_commit":
        yield from _smaller(request, inventory, change, helps)
    if request.replicas > 1:
        for count in range(request.replicas - 1, 0, -1):
            yield Candidate("num_replicas", count, replace(request, replicas=count), inventory)
    if config.device == "cuda" and inventory.gpus:
        sizes = {gpu.total_bytes for gpu in inventory.gpus} | {size * GIB for size in GPU_SIZES}
        for size in sorted(sizes):
            yield Candidate("gpus", f"{size / GIB:g}GiB", request, _with_gpu(inventory, size))


def _smaller(request: ModelRequest, inventory: Inventory, change: Any, helps: Any) -> Iterator[Candidate]:
    config = request.config
    length = _longest(request, lambda tokens: helps(change("max_model_len", tokens)))
    if length is not None:
        yield change("max_model_len", length)
    for count in (64, 16, 4, 1):
        if count < (config.max_num_seqs or (256 if config.infer_backend == "vllm" else 32)):
            yield change("max_num_seqs", count)
    if config.infer_backend == "vllm" and request.kv_element_bytes > 1:
        arguments = {**config.engine_args, "kv_cache_dtype": "fp8"}
        yield change("engine_args", arguments)
    if config.infer_backend == "vllm" and config.device == "cuda":
        for size in request.valid_tensor_parallel_sizes():
            if size > (config.tensor_parallel_size or 1):
                yield change("tensor_parallel_size", size)
    if config.infer_backend == "vllm" and config.device == "cuda" and request.is_quantizable:
        yield change("quantization", "fp8")
    if config.infer_backend == "pt" and config.max_memory:
        caps = _higher_caps(request, inventory, lambda caps: helps(change("max_memory", caps)))
        yield from (change("max_memory", value) for value in caps)
    if config.share is not None:
        most = (1.0,) if config.infer_backend == "pt" else ()
        yield from (change("num_gpus", share) for share in (0.25, 0.5, 0.75, *most) if share > config.share)
    if (utilization := config.vllm_args.get("gpu_memory_utilization")) is not None:
        for percent in range(int(utilization * 100) + 5, 93, 5):
            yield change("engine_args", _with_utilization(config, percent / 100))


def _with_utilization(config: ModelConfig, share: float) -> dict[str, Any]:
    """Returns vLLM's arguments with another share of the card."""
    others = {name: item for name, item in config.engine_args.items() if name.replace("-", "_") != UTILIZATION}
    return {**others, UTILIZATION: share}


def _longest(request: ModelRequest, works: Any) -> int | None:
    """Returns the largest `max_model_len` below the present one that works, in steps of 256, or None if none does."""
    low, high = LEAST_MODEL_LEN // MODEL_LEN_STEP, (request.max_model_len - 1) // MODEL_LEN_STEP
    if low > high or not works(low * MODEL_LEN_STEP):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if works(middle * MODEL_LEN_STEP) else (low, middle - 1)
    return low * MODEL_LEN_STEP


def _higher_caps(request: ModelRequest, inventory: Inventory, works: Any) -> Iterator[dict[Any, str]]:
    """Yields the limits with more on as few GPUs as will do, those with most to give first, in steps of half a GB."""
    caps = dict(request.config.max_memory or {})
    for gpus in inventory.node_gpus().values():
        free = {gpu.index: gpu.free_bytes for gpu in gpus}
        if not all(index in free for index in request.config.gpu_indices):
            continue
        raised = dict(caps)
        for index in sorted(request.config.gpu_indices, key=lambda index: raised[index] - free[index]):
            low, high = -(-(raised[index] + 1) // CAP_STEP), int(free[index] * CAP_SHARE) // CAP_STEP
            if high < low or not works(_as_yaml({**raised, index: high * CAP_STEP})):
                raised[index] = max(raised[index], high * CAP_STEP)
                continue
            while low < high:
                middle = (low + high) // 2
                low, high = (
                    (low, middle) if works(_as_yaml({**raised, index: middle * CAP_STEP})) else (middle + 1, high)
                )
            yield _as_yaml({**raised, index: low * CAP_STEP})


def _lower_caps(request: ModelRequest, inventory: Inventory) -> Iterator[dict[Any, str]]:
    """Yields limits that a node has."""
    for gpus in inventory.node_gpus().values():
        most: dict[Any, int] = {gpu.index: int(gpu.free_bytes * CAP_SHARE) // CAP_STEP * CAP_STEP for gpu in gpus}
        caps = {key: min(size, most.get(key, size)) for key, size in (request.config.max_memory or {}).items()}
        yield _as_yaml(caps)


def _as_yaml(caps: Mapping[Any, int]) -> dict[Any, str]:
    return {key: f"{size / 1e9:g}GB" for key, size in caps.items()}


def _changed(request: ModelRequest, field: str, value: Any) -> ModelRequest:
    fields = request.config.model_dump(exclude_unset=True)
    if field == "infer_backend":  # The other backend's fields go with it.
        fields = {name: item for name, item in fields.items() if name not in ONLY_VLLM}
    if "max_memory" in fields and fields["max_memory"] is not None:
        fields["max_memory"] = {key: f"{size / 1000}KB" for key, size in fields["max_memory"].items()}
    if fields.get("kv_cache_memory_bytes") is not None:
        fields["kv_cache_memory_bytes"] = f"{fields['kv_cache_memory_bytes'] / 1000}KB"
    fields[field] = value
    try:
        config = ModelConfig.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError:
        return request  # A change that the config refuses changes nothing, so it will not help.
    return replace(request, config=config)


def _with_gpu(inventory: Inventory, size: int) -> Inventory:
    """Returns the inventory with one more GPU of so many bytes on each node that has any."""
    more = [
        Device(node, max(gpu.index or 0 for gpu in gpus) + 1, "GPU", size, size, gpus[0].by_index)
        for node, gpus in inventory.node_gpus().items()
    ]
    return replace(inventory, devices=(*inventory.devices, *more))
