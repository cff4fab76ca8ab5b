"""Makes the one plan of a replica, for the devices that its process sees and by what is free on them now.

It is made once. The engine places the model by it, and what the engine holds is compared with it.

The builder planned the model on empty devices, since what ran there may have been about to end. Here the model is about
to start, so it can use only what is free. If that is too little, the error has the plan's figures and names the
processes that hold the memory.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import floor

import psutil

from serve_app.config import ModelConfig
from serve_app.engines.model_requests import answered, read_request
from serve_app.errors import ConfigError, EngineError
from serve_app.facts.engine_facts import EngineFacts
from serve_app.facts.gpus import Gpu
from serve_app.facts.inventory import Device, Inventory
from serve_app.facts.packages import facts_version
from serve_app.facts.process_memory import held_by_others
from serve_app.planning.memory import VLLM_UTILIZATION, reserve
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import STAGES, ModelPlan
from serve_app.planning.planner import make_plan
from serve_app.planning.resolve import UNPLANNED_LIMITS, fewer_rows, pipeline_fields, vllm_memory
from serve_app.planning.unplanned import unplanned
from serve_app.residency.pool_plan import plan_in_pool

logger = logging.getLogger("ray.serve")
NODE = "here"
PACKAGES = {"vllm": "vLLM", "pt": "transformers"}


def plan_replica(
    config: ModelConfig, gpus: Sequence[Gpu], by_index: bool = False, facts: EngineFacts | None = None
) -> ModelPlan | None:
    """Returns the plan for these GPUs or for the CPU, or None if the plan does not know the model or NVML shows no
    GPU.

    Its devices have the numbers of this process, which are their places in `gpus`. `by_index` means that the config
    names GPUs by the numbers of the machine, and otherwise it counts those of `gpus` from 0. Raises EngineError if less
    is free than the model takes. A GPU's reserve may have been used for its purpose by now, so it is not required
    again. `facts` are what engines told the builder, by which the replica plans too, so that both plan the same or
    neither does. Facts of another version of the engine than the one here are not used. They are None where the builder
    made no plan, and then what was kept on this node is used. No engine is asked here, because that takes as long as a
    start. On the CPU, where memory is never quite free nor quite taken, a shortage is only logged, and
    ranks that vLLM would refuse are an EngineError too.

    Calibrations are not used, because they raise what a builder asks for, and a replica must not refuse what was
    accepted.
    """
    if config.device != "cpu" and not gpus:
        return None
    devices = _devices(config, gpus, by_index)
    planned = plan_on(config, devices, facts, lambda: held_by_others(gpus))
    return None if planned is None else _in_own_numbers(planned, gpus)


def plan_on(
    config: ModelConfig, devices: Sequence[Device], facts: EngineFacts | None, why: Callable[[], str] = str
) -> ModelPlan | None:
    """Returns the plan for these devices as they are now, or None if the plan does not know the model. Everything else
    is as in `plan_replica`. `why` says who holds the memory that is missing."""
    if (request := _request(config, facts)) is None:
        return None
    plan = make_plan([request], Inventory(tuple(devices)))
    if plan.fits:
        return plan.models[0]
    message = plan.problems[0].message
    if plan.problems[0].is_of_split:
        raise EngineError(message)
    if config.device == "cpu":
        logger.warning("This model may need more memory than is available: %s", message)
        return None
    without_reserve = make_plan([request], Inventory(tuple(map(_without_reserve, devices))))
    if without_reserve.fits:
        logger.warning("This model takes a part of the reserve: %s", message)
        return without_reserve.models[0]
    raise EngineError(f"{message} {why()}".strip())


def plan_alone(config: ModelConfig, devices: Sequence[Device], facts: EngineFacts | None) -> ModelPlan:
    """Returns the plan of a model that may have all that is free on these devices when its turn comes.

    Raises EngineError if that is too little, or if the plan does not know the model, because nothing else says what it
    takes of the memory that it shares.
    """
    if (request := _request(config, facts)) is None:
        raise EngineError(
            "residency: the memory plan does not know this model, so it cannot share memory with others. Leave "
            "residency out."
        )
    plan = plan_in_pool(request, devices)
    if not plan.fits:
        raise EngineError(plan.problems[0].message)
    return plan.models[0]


def _without_reserve(device: Device) -> Device:
    return replace(device, free_bytes=device.free_bytes + reserve(device.total_bytes)) if device.is_gpu else device


def _devices(config: ModelConfig, gpus: Sequence[Gpu], by_index: bool) -> list[Device]:
    if config.device == "cpu":
        memory = psutil.virtual_memory()
        return [Device(NODE, None, "memory", memory.total, memory.available)]
    numbered = ((gpu.index if by_index else number, gpu) for number, gpu in enumerate(gpus))
    return [Device(NODE, index, gpu.name, gpu.total_bytes, gpu.free_bytes, by_index) for index, gpu in numbered]


def _in_own_numbers(plan: ModelPlan, gpus: Sequence[Gpu]) -> ModelPlan:
    numbers = {gpu.index: number for number, gpu in enumerate(gpus)}
    ranks = [
        replace(rank, device=replace(rank.device, index=numbers[rank.device.index], by_index=False))
        if rank.device.by_index and rank.device.index is not None
        else rank
        for rank in plan.ranks
    ]
    return replace(plan, ranks=tuple(ranks))


def visible_order(planned: ModelPlan | None, gpus: Sequence[Gpu]) -> dict[str, str]:
    """Returns the environment in which CUDA numbers the GPUs of a pipeline in the order of its ranks, by the plan of
    `plan_replica` for these `gpus`. It is empty without a pipeline on GPUs.

    vLLM puts its n-th rank on the n-th visible card, and the plan has chosen which card has which stage.
    """
    if planned is None or not planned.pipeline_layers or not planned.ranks[0].device.is_gpu:
        return {}
    places = [rank.device.index or 0 for rank in planned.ranks]
    return {"CUDA_VISIBLE_DEVICES": ",".join(str(gpus[place].index) for place in places)}


def split_line(planned: ModelPlan | None, gpus: Sequence[Gpu]) -> str:
    """Returns what the log says of vLLM's ranks at the start: their number, the layers of each stage as vLLM reads
    them, and their GPUs by the numbers of the machine. It is empty for one rank, by the plan of `plan_replica` for
    these `gpus`."""
    if planned is None or planned.backend != "vllm" or len(planned.ranks) == 1:
        return ""
    if planned.config.nodes > 1:
        names = dict.fromkeys(rank.device.node for rank in planned.ranks)
    else:
        places = [rank.device.index for rank in planned.ranks]
        names = dict.fromkeys("the CPU" if place is None else f"GPU {gpus[place].index}" for place in places)
    ranks = f"vLLM runs in {len(planned.ranks)} ranks on {', '.join(names)}"
    if not planned.pipeline_layers:
        return ranks
    layers = " + ".join(map(str, planned.pipeline_layers))
    return f"{ranks}: stages of {layers} layers ({STAGES}), with tensor_parallel_size {planned.tensor_parallel_size}"


def _within_share(config: ModelConfig) -> ModelConfig:
    """Returns the config of a model without a plan, in which vLLM takes no more than the model's share of a card. By
    itself it takes its share of the whole card, and so the memory of the models beside it."""
    if config.device == "cpu" or config.share is None or "gpu_memory_utilization" in config.vllm_args:
        return config
    own = max(1, floor(VLLM_UTILIZATION * config.share * 1000)) / 1000
    return config.model_copy(update={"engine_args": {**config.engine_args, "gpu_memory_utilization": own}})


def _request(config: ModelConfig, facts: EngineFacts | None) -> ModelRequest | None:
    try:
        # Ray names the type of the node's first GPU, which need not be this replica's.
        here = config.model_copy(update={"accelerator_type": None})
        unanswered = read_request("model", here)
        request = answered([unanswered], tell=None)[0]
    except ConfigError as error:
        logger.warning("This model is not planned: %s", error)
        return None
    if facts is not None:
        request = replace(request, engine_facts=facts)
    reason = unplanned(request) or _version_problem(request)
    if reason:
        logger.warning("This model is not planned: %s", reason)
        return None
    return request


def _version_problem(request: ModelRequest) -> str:
    """Returns why the builder's facts do not hold here, or an empty text if they do or are not needed."""
    engine = request.config.infer_backend
    told, own = request.engine_facts.version(engine), facts_version(engine)
    if not request.uses_engine_facts or told == own:
        return ""
    return (
        f"infer_backend: {engine}: the model was planned by what {PACKAGES[engine]} {told} says of it, and version "
        f"{own} is installed in the replica. Install the same version where the application is built and where it runs."
    )


def with_planned_memory(config: ModelConfig, planned: ModelPlan | None) -> ModelConfig:
    """Returns vLLM's config with explicit bytes of KV cache and its share of the card, so that vLLM measures nothing
    itself.

    Its own profiling looks at the whole card, and is wrong beside another process that grows or shrinks meanwhile.
    A pipeline gets the layers of each stage too. It is unchanged for pt, and if the config says all of it already. A
    model that is not planned measures by itself, within its share of a card. On the CPU, only the stages are set.
    Raises EngineError for limits on cards without a plan, since vLLM has none of its own.
    """
    if config.infer_backend != "vllm":
        return config
    if planned is None:
        if config.max_memory is not None:
            raise EngineError(f"max_memory: {UNPLANNED_LIMITS}")
        return _within_share(config)
    stages = pipeline_fields(planned)
    is_told = config.kv_cache_memory_bytes is not None and "gpu_memory_utilization" in config.vllm_args
    if config.device == "cpu" or (is_told and not config.max_memory):
        stages |= fewer_rows(planned)
        return config.model_copy(update=stages) if stages else config
    return config.model_copy(update=vllm_memory(planned) | stages)
