"""Resolves one model in a cluster to its config with all that the plan chose, and to what its replica asks of Ray."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from serve_app.config import ModelConfig
from serve_app.engines.model_requests import Unanswered, answered, cards_of, read_request
from serve_app.errors import ConfigError, PlacementError
from serve_app.facts.checkpoint import with_absolute_paths
from serve_app.facts.engine_facts import NO_FACTS
from serve_app.facts.inventory import Inventory, as_empty
from serve_app.facts.nodes import Node
from serve_app.model_fields import AUTO_QUANTIZATION
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.resolve import UNPLANNED_LIMITS, Resolved, resolve, resolve_on_cpu
from serve_app.planning.resource_demand import Demand, require_replicas, require_room
from serve_app.planning.unplanned import unplanned
from serve_app.residency.pool_backend import with_backend
from serve_app.residency.rooms import rooms_of
from serve_app.terminal import notify

# This is why a field that leaves a choice to the plan needs one.
NO_PLAN = (
    "is chosen by the memory plan, and there is no plan of this model here, because the devices of the cluster are not "
    "known. Name the method (bnb-int8 or bnb-nf4), or leave quantization out."
)
# It reads a model for the cards of an inventory, or gives the request that was made of it. It may raise ConfigError.
RequestOf = Callable[[ModelConfig, Inventory], ModelRequest]


def needs_devices(config: ModelConfig) -> bool:
    """Returns whether the model is planned before it starts: its place depends on the sizes of GPUs, the plan chooses
    its backend or its quantization, or vLLM splits it over ranks on the CPU, which vLLM may refuse."""
    return config.device != "cpu" or _plan_chooses(config) or _is_split_on_cpu(config)


def _plan_chooses(config: ModelConfig) -> bool:
    """Returns whether a field leaves a choice to the plan, without which there is no start."""
    return config.infer_backend == "auto" or config.quantization == AUTO_QUANTIZATION


def _is_split_on_cpu(config: ModelConfig) -> bool:
    is_split = config.ranks > 1 or config.pipeline_layers is not None
    return config.device == "cpu" and config.infer_backend == "vllm" and is_split


def requests_of(configs: Sequence[ModelConfig], inventory: Inventory) -> RequestOf:
    """Returns what gives the requests of these models and of others. Engines are asked about all of these in one
    process, whereas each `resolve_model` without it would start its own."""
    read: dict[str, Unanswered] = {}
    for config in configs:
        if _needs_plan(config, inventory):
            with suppress(ConfigError):  # Whoever resolves this model reads it again, and gets the error.
                read[str(config)] = read_request("model", config, cards=cards_of(inventory))
    found: dict[str, ModelRequest] = {}
    with suppress(ConfigError):
        found = dict(zip(read, answered(list(read.values()), lambda text: notify(f"the models: {text}")), strict=True))

    def request_of(config: ModelConfig, inventory: Inventory) -> ModelRequest:
        return found[str(config)] if str(config) in found else _request(config, inventory)

    return request_of


def resolve_model(
    config: ModelConfig,
    nodes: Sequence[Node],
    inventory: Inventory | None,
    unclaimed: Inventory | None = None,
    request_of: RequestOf | None = None,
) -> Resolved:
    """Resolves a model by the plan and by Ray's own books. `request_of` is that of `requests_of` for several models.

    If the plan cannot decide (there is no `inventory`, the architecture is unknown, or NVML does not see the GPUs),
    a config that names its backend stays as it is, and the engine finds out. Raises ConfigError or PlacementError.
    """
    if config.swaps is not None:
        return _in_pool(config, nodes, inventory, request_of or _request)
    resolved = _planned(config, inventory, unclaimed, request_of or _request)
    if resolved is None and config.infer_backend == "vllm" and config.max_memory is not None:
        raise PlacementError(f"max_memory: {UNPLANNED_LIMITS}")
    if resolved is None and config.quantization == AUTO_QUANTIZATION:
        raise PlacementError(f"quantization: auto {NO_PLAN}")
    chosen = config if resolved is None else resolved.config
    demand = require_room(chosen, nodes, None if resolved is None else resolved.demand)
    # A model that was read and could not be planned has no facts, and its replica must not plan it either.
    none = NO_FACTS if _needs_plan(config, inventory) else None
    return Resolved(with_absolute_paths(chosen), demand, none if resolved is None else resolved.facts)


def _in_pool(
    config: ModelConfig, nodes: Sequence[Node], inventory: Inventory | None, request_of: RequestOf
) -> Resolved:
    """Returns a model that shares the memory of a pool. Its replica asks Ray for CPUs only, because the pool's keeper
    asks for the GPUs, once for all of its models."""
    if config.device != "cpu" and config.accelerator_type is None:
        for node in nodes:
            if not node.gpus and not node.vram_gib:
                raise PlacementError(
                    f"residency: the replica asks Ray for no GPU of its own, so it could come to {node.name}, which "
                    "has none. Set accelerator_type, which ties it to nodes with such GPUs."
                )
    facts, is_auto = None, config.infer_backend == "auto"
    if inventory is not None and _needs_plan(config, inventory):
        try:
            request = request_of(config, inventory)
        except ConfigError:  # The replica cannot plan it either, and says why.
            if is_auto:
                raise
        else:
            facts = request.engine_facts
            config = _with_backend_of_pool(request, inventory) if is_auto else config
    demand = require_room(config, nodes, Demand(config.num_cpus))
    return Resolved(with_absolute_paths(config), demand, facts)


def _with_backend_of_pool(request: ModelRequest, inventory: Inventory) -> ModelConfig:
    """Returns the config of a model that swaps with the backend that `auto` means on all nodes."""
    config = request.config
    assert config.swaps is not None, "it is in a pool"
    rooms = rooms_of(config.swaps, config.device == "cpu", as_empty(inventory).devices)
    found, problem = with_backend(request, rooms)
    if problem:
        raise PlacementError(problem)
    if found.config.infer_backend == "auto":
        raise PlacementError(
            f"infer_backend: auto finds no node on which the model fits into the pool '{config.swaps.pool}', even "
            "alone. `serve-app plan` says what it needs."
        )
    return found.config


def require_all_replicas(
    config: ModelConfig,
    count: int,
    demand: Demand,
    nodes: Sequence[Node],
    inventory: Inventory,
    request_of: RequestOf | None = None,
) -> None:
    """Raises PlacementError if the cluster could not hold `count` replicas of a model, each with this demand, even if
    it were empty: by Ray's own books, or by the plan, if the plan has room for one."""
    require_replicas(demand, count, nodes)
    if count == 1:
        return
    try:
        request = (request_of or _request)(config, inventory)
        if unplanned(request):
            return
        resolve(request, inventory)
    except (ConfigError, PlacementError):  # The plan does not know this model or this cluster, so it refuses nothing.
        return
    resolve(replace(request, replicas=count), inventory)


def _planned(
    config: ModelConfig, inventory: Inventory | None, unclaimed: Inventory | None, request_of: RequestOf
) -> Resolved | None:
    is_auto = _plan_chooses(config)
    if inventory is None or not _needs_plan(config, inventory):
        return None
    try:
        request = request_of(config, inventory)
    except ConfigError:
        if is_auto:
            raise
        return None
    if problem := unplanned(request):
        if not is_auto:
            return None
        if config.infer_backend != "auto":
            raise PlacementError(problem)
    is_on_cpu = config.device == "cpu" and config.infer_backend != "auto"
    return resolve_on_cpu(request, inventory) if is_on_cpu else resolve(request, inventory, unclaimed)


def _needs_plan(config: ModelConfig, inventory: Inventory | None) -> bool:
    """Returns whether the model is planned: its place depends on GPUs, and these are known, or the plan chooses for it,
    or it is split on the CPU."""
    if inventory is None or not needs_devices(config):
        return False
    return bool(inventory.gpus) or _plan_chooses(config) or _is_split_on_cpu(config)


def _request(config: ModelConfig, inventory: Inventory) -> ModelRequest:
    """Returns the model with the facts of its checkpoint, and of the engines if they are installed here. Raises
    ConfigError."""
    read = read_request("model", config, cards=cards_of(inventory))
    return answered([read], lambda text: notify(f"{config.model}: {text}"))[0]
