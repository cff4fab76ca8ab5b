"""vLLM's memory settings for the GPUs that a replica sees: those of the plan, so that vLLM measures nothing itself.

vLLM's own profiling looks at the whole card, and is wrong beside another process that grows or shrinks meanwhile.
"""

import logging
from collections.abc import Sequence

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, EngineError
from serve_app.facts.checkpoint import read_checkpoint
from serve_app.facts.gpus import Gpu, local_gpus, visible_gpus
from serve_app.facts.inventory import Device
from serve_app.planning.fit import ModelRequest, Shortage, fit_vllm
from serve_app.planning.settle import vllm_memory

logger = logging.getLogger("ray.serve")


def with_planned_memory(config: ModelConfig, gpus: Sequence[Gpu]) -> ModelConfig:
    """The config with explicit bytes of KV cache for these GPUs, by what is free on them now.

    Unchanged on the CPU, where the config says all of it already, and for a model that the plan does not know: vLLM
    measures then. Raises EngineError, in the plan's words, where it does not fit beside what others hold.
    """
    is_told = config.kv_cache_memory_bytes is not None and "gpu_memory_utilization" in config.vllm_args
    if config.device == "cpu" or is_told or not gpus:
        return config
    try:
        checkpoint = read_checkpoint(config.model, config.revision)
    except ConfigError as error:
        logger.warning("vLLM measures its memory by itself: %s", error)
        return config
    request = ModelRequest("model", config, checkpoint.architecture, checkpoint.tensors)
    reason = request.unplanned
    if not checkpoint.architecture.is_known_to_vllm:
        reason = "the plan has no formulas for this architecture."
    if reason:
        logger.warning("vLLM measures its memory by itself: %s", reason)
        return config
    seats = [(Device("GPU", gpu.index, gpu.name, gpu.total_bytes, gpu.free_bytes), gpu.free_bytes) for gpu in gpus]
    fit = fit_vllm(request, seats[: config.tensor_parallel_size or 1], ())
    if isinstance(fit, Shortage):
        raise EngineError(fit.message)
    return config.model_copy(update=vllm_memory(fit))


def planned_here(config: ModelConfig) -> ModelConfig:
    """`with_planned_memory` for the GPUs of this process."""
    return with_planned_memory(config, [] if config.device == "cpu" else visible_gpus(local_gpus()))
