"""Cures for what does not fit, found by solving again: the smallest change first.

A cure is offered only when the plan with it places the model and breaks no other. Lowering the tensor parallel size is
never offered: it raises what each GPU must hold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from serve_app.config import ONLY_VLLM, ModelConfig
from serve_app.facts.inventory import Device, Inventory
from serve_app.planning.fit import ModelRequest
from serve_app.planning.memory import GIB
from serve_app.planning.plan import Fix, Plan, Problem
from serve_app.planning.planner import make_plan

# Requests shorter than this are of little use, so no shorter one is offered.
LEAST_MODEL_LEN = 1024
MODEL_LEN_STEP = 256
# Plans that are made in search of cures, and tries of each: what is left then has no cure told. A user waits for it.
MOST_PLANS = 100
MOST_TRIES = 20
# Sizes of one more GPU on each node, in GiB, that are tried beside those that are there.
GPU_SIZES = (16, 24, 48, 80, 141)
# Steps in which a limit of max_memory is raised, in bytes as the YAML has them.
CAP_STEP = 500_000_000


@dataclass(frozen=True)
class Change:
    """A changed request, or a changed inventory, and how it is written."""

    field: str
    value: Any
    request: ModelRequest
    inventory: Inventory


def with_fixes(plan: Plan, requests: Sequence[ModelRequest], inventory: Inventory) -> Plan:
    """The plan with a cure for each problem that has one."""
    budget = Budget(MOST_PLANS)
    problems = tuple(_with_fix(problem, plan, requests, inventory, budget) for problem in plan.problems)
    return replace(plan, problems=problems)


def apply(fix: Fix, request: ModelRequest, inventory: Inventory) -> tuple[ModelRequest, Inventory]:
    """The request and the inventory with a cure: what a user who writes its line would have."""
    if fix.field == "gpus":
        return request, _with_gpu(inventory, int(float(fix.value.removesuffix("GiB")) * GIB))
    if fix.field == "num_replicas":
        return replace(request, replicas=fix.value), inventory
    return _changed(request, fix.field, fix.value), inventory


@dataclass
class Budget:
    """Plans that may still be made."""

    left: int


def _with_fix(
    problem: Problem, plan: Plan, requests: Sequence[ModelRequest], inventory: Inventory, budget: Budget
) -> Problem:
    request = next(request for request in requests if request.name == problem.model)
    others = {other.model for other in plan.problems if other.model != problem.model}

    def helps(change: Change) -> bool:
        budget.left -= 1
        if budget.left < 0:
            return False
        changed = [change.request if item.name == request.name else item for item in requests]
        after = make_plan(changed, change.inventory, MOST_TRIES)
        return {item.model for item in after.problems} <= others

    for change in _changes(problem, request, inventory, helps):
        if helps(change):
            return replace(problem, fix=Fix(change.field, change.value, _saved(request, change, problem)))
    return problem


def _saved(request: ModelRequest, change: Change, problem: Problem) -> int:
    """Bytes that a change takes off the fullest rank: all of them for quantised weights, else at least what lacked."""
    if change.field == "quantization":
        tp = request.config.tensor_parallel_size or 1
        return request.rank_weights(tp).bytes - change.request.rank_weights(tp).bytes
    return problem.missing_bytes


def _changes(problem: Problem, request: ModelRequest, inventory: Inventory, helps: Any) -> Iterator[Change]:
    """Candidates in the order of how much they take away from the user."""
    config = request.config

    def change(field: str, value: Any) -> Change:
        return Change(field, value, _changed(request, field, value), inventory)

    if problem.code == "tensor_parallel":
        valid = request.architecture.valid_tensor_parallel_sizes()
        wanted = config.tensor_parallel_size or 1
        for size in sorted(valid, key=lambda size: (size < wanted, abs(size - wanted))):
            yield change("tensor_parallel_size", size)
    if problem.code in ("tensor_parallel", "no_device", "unknown_architecture") and config.infer_backend == "vllm":
        yield change("infer_backend", "pt")
    if problem.code == "utilization":
        yield from (change("engine_args", arguments) for arguments in _lower_utilizations(config))
    if problem.code == "over_commit":
        yield from _smaller(request, inventory, change, helps)
    if request.replicas > 1:
        for count in range(request.replicas - 1, 0, -1):
            yield Change("num_replicas", count, replace(request, replicas=count), inventory)
    if config.device == "cuda" and inventory.gpus:
        sizes = {gpu.total_bytes for gpu in inventory.gpus} | {size * GIB for size in GPU_SIZES}
        for size in sorted(sizes):
            yield Change("gpus", f"{size / GIB:g}GiB", request, _with_gpu(inventory, size))


def _smaller(request: ModelRequest, inventory: Inventory, change: Any, helps: Any) -> Iterator[Change]:
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
        for size in request.architecture.valid_tensor_parallel_sizes():
            if size > (config.tensor_parallel_size or 1):
                yield change("tensor_parallel_size", size)
    if config.infer_backend == "vllm" and config.device == "cuda" and request.is_quantizable:
        yield change("quantization", "fp8")
    if config.infer_backend == "pt" and config.max_memory:
        yield from (change("max_memory", caps) for caps in _higher_caps(request, inventory))
    if config.infer_backend == "pt" and config.num_gpus is not None and config.num_gpus < 1:
        yield from (change("num_gpus", share) for share in (0.25, 0.5, 0.75, 1.0) if share > config.num_gpus)


def _lower_utilizations(config: ModelConfig) -> Iterator[dict[str, Any]]:
    """vLLM's arguments with less of the card, a hundredth each time."""
    name = next(name for name in config.engine_args if name.replace("-", "_") == "gpu_memory_utilization")
    for percent in range(int(float(config.engine_args[name]) * 100) - 1, 0, -1):
        yield {**config.engine_args, name: percent / 100}


def _longest(request: ModelRequest, works: Any) -> int | None:
    """The largest `max_model_len` below the present one that works, in steps of 256; None where none does."""
    low, high = LEAST_MODEL_LEN // MODEL_LEN_STEP, (request.max_model_len - 1) // MODEL_LEN_STEP
    if low > high or not works(low * MODEL_LEN_STEP):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if works(middle * MODEL_LEN_STEP) else (low, middle - 1)
    return low * MODEL_LEN_STEP


def _higher_caps(request: ModelRequest, inventory: Inventory) -> Iterator[dict[Any, str]]:
    """The limits with more on the GPU that has most to give, in steps of half a GB."""
    caps = dict(request.config.max_memory or {})
    totals = [{gpu.index: gpu.free_bytes for gpu in gpus} for gpus in inventory.node_gpus().values()]
    for free in totals:
        if not all(index in free for index in request.config.gpu_indices):
            continue
        raised = dict(caps)
        for index in sorted(request.config.gpu_indices, key=lambda index: raised[index] - free[index]):
            while raised[index] + CAP_STEP <= free[index]:
                raised[index] = -(-(raised[index] + 1) // CAP_STEP) * CAP_STEP
                yield {key: f"{size / 1e9:g}GB" for key, size in raised.items()}


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
    """One more GPU of so many bytes on each node that has any."""
    more = [
        Device(node, max(gpu.index or 0 for gpu in gpus) + 1, "GPU", size, size, gpus[0].by_index)
        for node, gpus in inventory.node_gpus().items()
    ]
    return Inventory((*inventory.devices, *more))
