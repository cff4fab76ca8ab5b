"""Turns a plan into the config of a replica: it writes down what was chosen, and refuses what cannot fit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any

from serve_app.config import ModelConfig
from serve_app.errors import PlacementError
from serve_app.facts.card_capability import Capability, card_capability
from serve_app.facts.engine_facts import EngineFacts
from serve_app.facts.inventory import Inventory, as_empty
from serve_app.model_fields import AUTO_QUANTIZATION
from serve_app.planning.backend import QUANTIZATIONS
from serve_app.planning.fixes import with_fixes
from serve_app.planning.memory import MIB, vllm_batch, vllm_defaults
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Fix, ModelPlan, Plan
from serve_app.planning.planner import make_plan
from serve_app.planning.resource_demand import Demand, demands_of, planned_demand
from serve_app.planning.vllm_blocks import cache_bytes, lowered_rows

# This is why limits on cards need a plan.
UNPLANNED_LIMITS = (
    "vLLM has no limits for each card, so the memory plan cuts the model to them, and there is no plan of this model "
    "here. Leave max_memory out, or use infer_backend: pt."
)
# vLLM takes bfloat16 on cards from this compute capability on.
LEAST_BFLOAT16: Capability = (8, 0)
# vLLM refuses to start if less than this share of the card is free.
_GATE = "gpu_memory_utilization"


@dataclass(frozen=True)
class Resolved:
    """This is a config that says all that its replica needs, what the replica asks of Ray, and what engines said of its
    model, so that the replica plans by the same facts. `facts` is None where no plan was made."""

    config: ModelConfig
    demand: Demand
    facts: EngineFacts | None = None


def resolve(request: ModelRequest, inventory: Inventory, unclaimed: Inventory | None = None) -> Resolved:
    """Returns the config with its backend chosen. It is judged by the devices as if they were empty, because what runs
    there now may be what is about to be replaced. If Ray counts memory by index, its GPUs are chosen among those that
    are `unclaimed`.

    Raises PlacementError with the plan's words and its cure for a model that no device can hold.
    """
    empty = as_empty(inventory)
    plan = with_fixes(make_plan([request], empty), [request], empty)
    if not plan.fits:
        raise PlacementError(problem_text(plan))
    model = plan.models[0]
    if unclaimed is not None and model.ranks[0].device.by_index:
        beside = make_plan([replace(request, config=model.config)], unclaimed)
        model = beside.models[0] if beside.fits else model
    return Resolved(_with_gpus(model), planned_demand(model, empty), request.engine_facts)


def resolve_on_cpu(request: ModelRequest, inventory: Inventory) -> Resolved:
    """Returns the config of a model on the CPU as it is. Memory of a host is never quite free nor quite taken, so a
    shortage of it refuses nothing here, and the replica tells of it. `quantization: auto` becomes what the plan chose,
    or the method with the smallest weights if nothing fits.

    Raises PlacementError if vLLM cannot split the model over ranks in this way.
    """
    plan = make_plan([request], as_empty(inventory))
    if any(problem.is_of_split for problem in plan.problems):
        raise PlacementError(problem_text(plan))
    config = request.config
    if config.quantization == AUTO_QUANTIZATION:
        method = plan.models[0].config.quantization if plan.fits else QUANTIZATIONS[-1]
        config = config.model_copy(update={"quantization": method})
    (demand,) = demands_of(config, [])
    return Resolved(config, demand, request.engine_facts)


def _with_gpus(model: ModelPlan) -> ModelConfig:
    """Returns the config with the GPUs and bytes that were chosen, if Ray counts them by index."""
    if not model.ranks[0].device.by_index or model.config.max_memory:
        return model.config
    return model.config.model_copy(update=_shares(model))


def _shares(model: ModelPlan) -> dict[str, Any]:
    """Returns the fields that hold a replica to its share of each GPU."""
    if model.backend == "pt":
        caps = {rank.device.index: rank.share.bytes for rank in model.ranks}
        return {"max_memory": caps, "num_gpus": None}
    indices = tuple(rank.device.index for rank in model.ranks)
    cache = {"kv_cache_memory_bytes": cache_bytes(model), "engine_args": _without_gate(model.config)}
    fields = {"gpu_ids": indices, "num_gpus": None, "tensor_parallel_size": model.tensor_parallel_size, **cache}
    return fields | pipeline_fields(model)


def pipeline_fields(model: ModelPlan) -> dict[str, Any]:
    """Returns the number of stages and the layers of each, which is nothing without a pipeline."""
    if not model.pipeline_layers:
        return {}
    return {"pipeline_parallel_size": model.pipeline_parallel_size, "pipeline_layers": model.pipeline_layers}


def vllm_memory(model: ModelPlan) -> dict[str, Any]:
    """Returns the bytes of KV cache, so that vLLM measures nothing beside others, and the share of the card that it
    wants to find free at its start: what weights, adapters and KV cache take.

    vLLM looks when the CUDA context and the buffers between ranks are there, and the share does nothing else then. The
    replica has compared its whole plan with what is free already, so activations and graphs are left out: a context
    that is larger than planned must not stop a start. It has one share for all cards, so the smallest is set.
    """
    fields: dict[str, Any] = {"kv_cache_memory_bytes": cache_bytes(model)}
    if model.ranks[0].device.is_gpu:
        held = [(rank.weights + rank.adapters + rank.kv_cache).bytes for rank in model.ranks]
        shares = [size / rank.device.total_bytes for size, rank in zip(held, model.ranks, strict=True)]
        gate = max(1, floor(min(shares) * 1000)) / 1000
        fields["engine_args"] = {**_without_gate(model.config), _GATE: gate}
    return _with_batch(model, fields) | fewer_rows(model)


def fewer_rows(model: ModelPlan) -> dict[str, Any]:
    """Returns the `max_num_seqs` that vLLM takes where it would refuse a larger one, and otherwise nothing."""
    rows = lowered_rows(model)
    return {} if rows is None else {"max_num_seqs": rows}


def _with_batch(model: ModelPlan, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields with the batch that was planned if the cards differ in their defaults, because vLLM would take
    those of the card of its first rank. Over several nodes it would take those of any card of the replica's node, and
    its type for "auto" too, so bfloat16 becomes what the oldest card computes."""
    cards = [rank.device for rank in model.ranks]
    over_nodes = model.config.nodes > 1 and cards[0].is_gpu
    if over_nodes and model.config.dtype == "auto" and model.architecture.dtype == "bfloat16":
        known = (card_capability(card.name) for card in cards)
        if any(capability is not None and capability < LEAST_BFLOAT16 for capability in known):
            fields = fields | {"dtype": "float16"}
    if not over_nodes and len({vllm_defaults(card.total_bytes, card.name) for card in cards if card.is_gpu}) < 2:
        return fields
    batched, rows = vllm_batch(model.config, cards)
    arguments = {**fields["engine_args"], "max_num_batched_tokens": batched}
    return fields | {"max_num_seqs": rows, "engine_args": arguments}


def _without_gate(config: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in config.engine_args.items() if name.replace("-", "_") != _GATE}


def problem_text(plan: Plan) -> str:
    """Returns the problems of a plan, with a line for each and one for each of its fixes, and the joint fixes."""
    lines = [line for problem in plan.problems for line in (problem.message, *fix_lines(problem.fixes))]
    return "\n".join([*lines, *joint_lines(plan.joint_fixes)])


def fix_lines(fixes: Sequence[Fix]) -> list[str]:
    """Returns a line for each fix of a problem, with what it loses and gains."""
    return [f"{'Or' if number else 'Fix'}: {fix.text} ({fix.effect})." for number, fix in enumerate(fixes)]


def joint_lines(fixes: Sequence[Fix]) -> list[str]:
    """Returns the lines that say which fixes make all models fit together."""
    if not fixes:
        return []
    named = [f"{fix.model}: {fix.text}" if fix.model else fix.text for fix in fixes]
    return [f"All models fit with: {'; '.join(named)}."]


def pinned(model: ModelPlan) -> dict[str, Any]:
    """Returns the fields that a plan chose, as YAML has them. With them, a start does exactly what was planned."""
    config = model.config
    fields: dict[str, Any] = {"infer_backend": model.backend, "max_model_len": model.max_model_len}
    device = model.ranks[0].device
    if model.backend == "vllm":
        fields["tensor_parallel_size"] = model.tensor_parallel_size
        memory = vllm_memory(model)
        fields |= memory | {"kv_cache_memory_bytes": _size(memory["kv_cache_memory_bytes"])}
        return fields | _pinned_cards(model)
    if device.by_index and config.max_memory is None:
        fields["max_memory"] = {rank.device.index: f"{-(-rank.share.bytes // MIB)}MiB" for rank in model.ranks}
    elif config.num_gpus is not None:
        fields["num_gpus"] = config.num_gpus
    if config.max_memory is None and not device.is_gpu:
        fields["kv_cache_memory_bytes"] = _size(sum(rank.kv_cache.bytes for rank in model.ranks) // MIB * MIB)
    return fields


def _pinned_cards(model: ModelPlan) -> dict[str, Any]:
    """Returns the cards of vLLM's ranks in their order, if Ray counts them by index, and the layers of stages. Limits
    count cards that Ray gives whole by their places, so their stages are solved again for the cards that it gives."""
    by_index, caps = model.ranks[0].device.by_index, model.config.max_memory
    if not by_index and caps:
        return {}
    layers = {
        name: list(value) if isinstance(value, tuple) else value for name, value in pipeline_fields(model).items()
    }
    if not by_index:
        return layers
    indices = [rank.device.index or 0 for rank in model.ranks]
    if caps:
        return layers | {"max_memory": {index: _size(caps[index]) for index in indices}}
    return layers | {"gpu_ids": indices}


def _size(size: int) -> str:
    """Returns a size as the config reads it: whole MiB, or KB with three places, which are bytes."""
    return f"{size // MIB}MiB" if size % MIB == 0 else f"{size / 1000:.3f}KB"
