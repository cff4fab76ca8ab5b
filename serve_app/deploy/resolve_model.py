"""Resolves one model in a cluster to its config with all that the plan chose, and to what its replica asks of Ray."""

from collections.abc import Sequence
from dataclasses import replace

from serve_app.config import ModelConfig
from serve_app.engines.model_requests import answered, read_request
from serve_app.errors import ConfigError, PlacementError
from serve_app.facts.checkpoint import with_absolute_paths
from serve_app.facts.engine_facts import NO_FACTS
from serve_app.facts.inventory import Inventory
from serve_app.facts.nodes import Node
from serve_app.planning.fit import ModelRequest
from serve_app.planning.resolve import UNPLANNED_LIMITS, Resolved, resolve, resolve_on_cpu
from serve_app.planning.resource_demand import Demand, require_replicas, require_room
from serve_app.terminal import notify


def needs_devices(config: ModelConfig) -> bool:
    """Returns whether the model is planned before it starts: its place depends on the sizes of GPUs, or vLLM splits it
    over ranks on the CPU, which vLLM may refuse."""
    return config.device != "cpu" or config.infer_backend == "auto" or _is_split_on_cpu(config)


def _is_split_on_cpu(config: ModelConfig) -> bool:
    is_split = config.ranks > 1 or config.pipeline_layers is not None
    return config.device == "cpu" and config.infer_backend == "vllm" and is_split


def resolve_model(
    config: ModelConfig, nodes: Sequence[Node], inventory: Inventory | None, unclaimed: Inventory | None = None
) -> Resolved:
    """Resolves a model by the plan and by Ray's own books.

    If the plan cannot decide (there is no `inventory`, the architecture is unknown, or NVML does not see the GPUs),
    a config that names its backend stays as it is, and the engine finds out. Raises ConfigError or PlacementError.
    """
    resolved = _planned(config, inventory, unclaimed)
    if resolved is None and config.infer_backend == "vllm" and config.max_memory is not None:
        raise PlacementError(f"max_memory: {UNPLANNED_LIMITS}")
    chosen = config if resolved is None else resolved.config
    demand = require_room(chosen, nodes, None if resolved is None else resolved.demand)
    # A model that was read and could not be planned has no facts, and its replica must not plan it either.
    none = NO_FACTS if _needs_plan(config, inventory) else None
    return Resolved(with_absolute_paths(chosen), demand, none if resolved is None else resolved.facts)


def require_all_replicas(
    config: ModelConfig, count: int, demand: Demand, nodes: Sequence[Node], inventory: Inventory
) -> None:
    """Raises PlacementError if the cluster could not hold `count` replicas of a model, each with this demand, even if
    it were empty: by Ray's own books, or by the plan, if the plan has room for one."""
    require_replicas(demand, count, nodes)
    if count == 1:
        return
    try:
        request = _request(config)
        if request.unplanned:
            return
        resolve(request, inventory)
    except (ConfigError, PlacementError):  # The plan does not know this model or this cluster, so it refuses nothing.
        return
    resolve(replace(request, replicas=count), inventory)


def _planned(config: ModelConfig, inventory: Inventory | None, unclaimed: Inventory | None) -> Resolved | None:
    is_auto = config.infer_backend == "auto"
    if inventory is None or not _needs_plan(config, inventory):
        return None
    try:
        request = _request(config)
    except ConfigError:
        if is_auto:
            raise
        return None
    if request.unplanned and not is_auto:
        return None
    return resolve_on_cpu(request, inventory) if _is_split_on_cpu(config) else resolve(request, inventory, unclaimed)


def _needs_plan(config: ModelConfig, inventory: Inventory | None) -> bool:
    """Returns whether the model is planned: its place depends on GPUs, and these are known, or it is split on the
    CPU."""
    if inventory is None or not needs_devices(config):
        return False
    return bool(inventory.gpus) or config.infer_backend == "auto" or _is_split_on_cpu(config)


def _request(config: ModelConfig) -> ModelRequest:
    """Returns the model with the facts of its checkpoint, and of the engines if they are installed here. Raises
    ConfigError."""
    return answered([read_request("model", config)], lambda text: notify(f"{config.model}: {text}"))[0]
