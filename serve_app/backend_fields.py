"""Says why the fields of a model contradict its backend, its device or each other.

Nothing is accepted and then ignored: a field that the chosen backend cannot honour is refused, with the reason and the
field to use instead.
"""

import re
from collections.abc import Mapping
from typing import Any

from serve_app.byte_sizes import token_count
from serve_app.errors import nearest
from serve_app.model_fields import AUTO_QUANTIZATION, PT_CACHE_DTYPES, PT_QUANTIZATIONS, ModelFields

# These are accelerate's ways to spread layers over the GPUs by itself.
DEVICE_MAP_NAMES = ("auto", "balanced", "balanced_low_0", "sequential")

# These arguments of vLLM take more GPUs than tensor_parallel_size and pipeline_parallel_size say.
UNPLACED = frozenset(
    {
        "data_parallel_size",
        "data_parallel_size_local",
        "prefill_context_parallel_size",
        "distributed_executor_backend",
    }
)
# These arguments of vLLM follow from the adapters.
ADAPTER_ARGS = frozenset({"enable_lora", "lora_modules"})
# These arguments are for vLLM's own HTTP server, which does not run here, since Ray Serve's does.
SERVER_ARGS = re.compile(r"host|port|uds|ssl_.*|uvicorn_.*|api_server_count|headless|root_path|grpc.*|config|api_key")


def backend_problem(config: ModelFields) -> str | None:
    """Returns why the fields of a model contradict its backend, its device or each other, or None if they agree."""
    of_backend = {"vllm": _vllm_problem, "pt": _pt_problem, "auto": _auto_problem}[config.infer_backend]
    return of_backend(config) or _device_problem(config) or _residency_problem(config) or _adapters_problem(config)


def _vllm_problem(config: ModelFields) -> str | None:
    if "quantization" in config.values_of_pt:
        return (
            f"quantization: {config.quantization} is a method of pt. Use infer_backend: pt, or a method of vLLM such "
            "as fp8."
        )
    if "kv_cache_dtype" in config.values_of_pt:
        return (
            f"kv_cache_dtype: {config.kv_cache_dtype} is a type of pt's. Use infer_backend: pt, or a type of vLLM's "
            "such as fp8."
        )
    if config.speculative is not None and config.speculative.quantization in PT_QUANTIZATIONS:
        return (
            f"speculative.quantization: {config.speculative.quantization} is a method of pt. Use infer_backend: pt, or "
            "a method of vLLM such as fp8."
        )
    if (problem := _vllm_limits_problem(config)) is not None:
        return problem
    if config.device_map is not None:
        return (
            "device_map: vLLM has no device map. Use tensor_parallel_size, which splits every layer over equal GPUs, "
            "or pipeline_layers, which says how many whole layers each GPU has, or infer_backend: pt."
        )
    if config.max_queued_requests is not None:
        return "max_queued_requests: vLLM's queue cannot be bounded. Set Serve's own under 'deployments:' instead."
    if config.max_num_batched_tokens is not None:
        return "max_num_batched_tokens is a field of pt. With vllm, write it under engine_args."
    if config.prompt_cache_memory is not None:
        return (
            "prompt_cache_memory works with pt only. vLLM keeps the beginnings of prompts in its KV cache "
            "(engine_args: {enable_prefix_caching: true}, which is its default)."
        )
    if config.step_timeout_s is not None:
        return (
            "step_timeout_s works with pt only. For vLLM, set VLLM_ENGINE_ITERATION_TIMEOUT_S under runtime_env "
            "instead."
        )
    if (problem := _pipeline_problem(config)) is not None:
        return problem
    if config.num_gpus is not None and (config.num_gpus >= 1 or config.ranks > 1):
        return (
            "num_gpus: vLLM takes tensor_parallel_size whole GPUs for each of its pipeline_parallel_size stages. Set "
            "these fields instead. Below 1, num_gpus is a share of one GPU, without these fields."
        )
    if config.gpu_ids is not None and len(set(config.gpu_ids)) != config.ranks:
        both = config.stages > 1
        field = "tensor_parallel_size times pipeline_parallel_size" if both else "tensor_parallel_size"
        return f"gpu_ids names {len(set(config.gpu_ids))} GPUs, but {field} is {config.ranks}. The two must be equal."
    if (problem := _vllm_number_problem(config.vllm_args)) is not None:
        return problem
    named = set(config.vllm_args)
    for field in sorted(named & UNPLACED):
        return (
            f"engine_args.{field} changes the GPUs or processes that Ray counts. Use tensor_parallel_size or "
            "pipeline_parallel_size."
        )
    if config.speculative is not None and "speculative_config" in named:
        return "engine_args.speculative_config says the same as the field speculative. Leave one of the two out."
    if config.kv_cache_dtype is not None and "kv_cache_dtype" in named:
        return "engine_args.kv_cache_dtype says the same as the field kv_cache_dtype. Leave one of the two out."
    for field in sorted(named & ADAPTER_ARGS):
        return f"engine_args.{field}: name the adapters under the field adapters, which sets what vLLM needs for them."
    for field in sorted(named):
        if SERVER_ARGS.fullmatch(field):
            return f"engine_args.{field} belongs to vLLM's own HTTP server, which does not run here. Leave it out."
    own = (ModelFields.model_fields.keys() | {"served_model_name"}) - {"kv_cache_dtype", "max_num_batched_tokens"}
    for field in sorted(named & own):
        place = "is the application's name" if field == "served_model_name" else "has a field of its own"
        return f"engine_args.{field} {place}. Set it there, not under engine_args."
    return None


def _vllm_limits_problem(config: ModelFields) -> str | None:
    """Returns why vLLM cannot be held to `max_memory`, or None if it can. It is cut into stages that keep to it."""
    if config.max_memory is None:
        return None
    if config.device == "cpu":
        return "max_memory: with vllm it limits GPUs, and device is cpu. Use kv_cache_memory_bytes instead."
    if config.spill_tiers:
        tiers = " and ".join(sorted(config.spill_tiers))
        return (
            f"max_memory names {tiers}, but vLLM keeps all layers on GPUs. Leave {tiers} out, or use infer_backend: "
            "pt, which keeps layers there."
        )
    for field in ("gpu_ids", "num_gpus"):
        if getattr(config, field) is not None:
            return f"{field}: max_memory names the GPUs and how much each may give. Leave {field} out."
    return _named_gpus_problem(config, len(config.gpu_indices))


def _named_gpus_problem(config: ModelFields, named: int) -> str | None:
    """Returns why vLLM's stages do not take as many GPUs as `max_memory` names, or None if they do. It speaks of fields
    that were written."""
    if named in (0, config.ranks):
        return None
    size = config.tensor_parallel_size or 1
    start = f"max_memory names {named} GPUs, but "
    if not config.pipeline_layers and not config.pipeline_parallel_size:
        return (
            f"{start}tensor_parallel_size is {size}, and each stage has so many of them. Name {config.ranks} GPUs, or "
            f"{config.ranks + size}."
        )
    stages = "pipeline_layers has" if config.pipeline_layers else "pipeline_parallel_size sets"
    each = f" of {size} GPUs each (tensor_parallel_size)" if size > 1 else ""
    start += f"{stages} {config.stages} stage{'' if config.stages == 1 else 's'}{each}. Name {config.ranks} GPUs"
    if named % size:
        return f"{start}."
    if config.pipeline_layers is None:
        return f"{start}, or leave pipeline_parallel_size out, and there are {named // size} stages."
    out = "pipeline_layers and pipeline_parallel_size" if config.pipeline_parallel_size else "pipeline_layers"
    return f"{start}, or leave {out} out, and the plan cuts the layers into {named // size} stages."


def _pipeline_problem(config: ModelFields) -> str | None:
    """Returns why the number of stages and the layers of each contradict each other, or None if they agree."""
    layers, size = config.pipeline_layers, config.pipeline_parallel_size
    if layers is None or size in (None, len(layers)):
        return _nodes_problem(config)
    return (
        f"pipeline_layers has {len(layers)} stages, but pipeline_parallel_size is {size}. Give each stage its number "
        "of layers, or leave pipeline_parallel_size out."
    )


def _nodes_problem(config: ModelFields) -> str | None:
    """Returns why a replica cannot go over `nnodes` nodes, or None if it can. Each node has whole stages."""
    if config.nodes == 1:
        return None
    for field in ("gpu_ids", "max_memory"):
        if getattr(config, field) is not None:
            return f"{field} names GPUs of one node, and nnodes is {config.nnodes}. Leave one of the two out."
    if config.stages < config.nodes:
        return (
            f"nnodes is {config.nnodes}, and each node has at least one stage of the pipeline, but "
            f"pipeline_parallel_size is {config.stages}. Set pipeline_parallel_size: {config.nnodes} or more."
        )
    return None


def _vllm_number_problem(arguments: Mapping[str, Any]) -> str | None:
    """Returns why a number that the memory plan needs is not usable, or None if all are."""
    share = arguments.get("gpu_memory_utilization")
    if share is not None and not (_is_number(share) and 0 < share <= 1):
        return f"engine_args.gpu_memory_utilization: {share!r} must be a number above 0 and at most 1, such as 0.9."
    try:
        token_count(arguments.get("max_num_batched_tokens", 1))
    except ValueError:
        given = arguments["max_num_batched_tokens"]
        return f"engine_args.max_num_batched_tokens: {given!r} must be a whole number above 0, such as 8192 or 8k."
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pt_problem(config: ModelFields) -> str | None:
    if config.tensor_parallel_size is not None:
        return (
            "tensor_parallel_size: pt places whole layers and has no tensor parallelism. Use max_memory to spread "
            "the layers over GPUs, such as {0: 3GB, 1: 10GB}, or infer_backend: vllm."
        )
    for field in ("pipeline_parallel_size", "pipeline_layers", "nnodes"):
        if getattr(config, field) is not None:
            return (
                f"{field}: pt places whole layers on one node by itself and has no stages. Use max_memory to spread "
                "the layers over GPUs, such as {0: 3GB, 1: 10GB}, or infer_backend: vllm."
            )
    if (problem := _device_map_problem(config)) is not None:
        return problem
    if config.gpu_ids is not None:
        return "gpu_ids: with pt, max_memory names the GPUs, such as {1: 10GB}. Write it there."
    if (problem := _pt_quantization_problem(config) or _pt_cache_problem(config)) is not None:
        return problem
    if config.engine_args:
        return "engine_args go to vLLM, and pt takes none. Leave them out, or use infer_backend: vllm."
    return None


def _pt_quantization_problem(config: ModelFields) -> str | None:
    """Returns why pt cannot quantise the weights as it loads them, or None. Quantised layers stay on the devices on
    which they were made."""
    method = config.quantization
    drafts = None if config.speculative is None else config.speculative.quantization
    known = (
        ("quantization", method, (*PT_QUANTIZATIONS, AUTO_QUANTIZATION), ", or by what the plan chooses (auto)"),
        ("speculative.quantization", drafts, PT_QUANTIZATIONS, ""),
    )
    for field, name, methods, beside in known:
        if name is not None and name not in methods:
            return (
                f"{field}: pt does not know '{name}'.{nearest(name, PT_QUANTIZATIONS)} It rounds weights by "
                f"{', '.join(PT_QUANTIZATIONS)} while it loads them{beside}. For a checkpoint that is quantised "
                "already, leave the field out, since pt reads its method from config.json. Methods of vLLM need "
                "infer_backend: vllm."
            )
    if method is None:
        return None
    mapped = config.device_map.values() if isinstance(config.device_map, dict) else ()
    places = {*(config.max_memory or {}), *mapped}
    tiers = {"disk"} if config.device == "cpu" else {"cpu", "disk"}
    for tier in sorted(tiers & places, key=str):
        field = "max_memory" if tier in (config.max_memory or {}) else "device_map"
        return (
            f"{field} names {tier}, but layers that are quantised by {method} cannot be moved to a GPU for each pass. "
            f"Leave {tier} out, or leave quantization out."
        )
    return None


def _pt_cache_problem(config: ModelFields) -> str | None:
    """Returns why pt has no KV cache of this type, or None if it has."""
    name = config.kv_cache_dtype
    if name in (None, "auto", *PT_CACHE_DTYPES):
        return None
    return (
        f"kv_cache_dtype: pt does not have '{name}'.{nearest(name or '', PT_CACHE_DTYPES)} It has auto (the model's "
        f"own type), {', '.join(PT_CACHE_DTYPES)}. Other types of vLLM's need infer_backend: vllm."
    )


def _auto_problem(config: ModelFields) -> str | None:
    """Returns why `auto` cannot choose. Fields of one backend decide for it, and fields of both contradict each
    other."""
    only_vllm = config.only_vllm
    only_pt = [name for name in config.only_pt if not (name == "max_memory" and only_vllm)]
    if only_vllm and only_pt:
        return (
            f"{only_pt[0]} works with pt only, and {only_vllm[0]} with vllm only. With infer_backend: auto, name only "
            "one backend's fields."
        )
    return _vllm_problem(config) if only_vllm else _pt_problem(config)


def _device_map_problem(config: ModelFields) -> str | None:
    if config.device_map is None:
        return None
    if config.device_map == {}:
        return "device_map is empty. Leave it out."
    if config.device_map == "cpu":
        return "device_map: unknown 'cpu'. Write device: cpu instead."
    if isinstance(config.device_map, str):
        if config.device_map not in DEVICE_MAP_NAMES:
            names = ", ".join(DEVICE_MAP_NAMES)
            return f"device_map: unknown '{config.device_map}'. Use {names}, or a mapping of modules to devices."
        if config.device == "cpu":
            return "device_map: there is nothing to spread with device: cpu. Leave it out."
        return None
    for module, device in config.device_map.items():
        is_gpu = isinstance(device, int) and not isinstance(device, bool) and device >= 0
        if device not in ("cpu", "disk") and not is_gpu:
            return f"device_map: unknown device '{device}' for '{module}'. Use a GPU's number (0, 1, …), cpu or disk."
    if config.max_memory is not None:
        return "max_memory: a mapping in device_map places every module itself, so no limit applies. Leave one out."
    return None


def _device_problem(config: ModelFields) -> str | None:
    if config.device == "cpu":
        if config.gpu_indices:
            field = "max_memory" if config.max_memory else "gpu_ids" if config.gpu_ids else "device_map"
            return f"{field} names GPUs, but device is cpu. Remove them, or remove device: cpu."
        if config.num_gpus is not None:
            return "num_gpus is set, but device is cpu. Remove one of the two."
        if config.accelerator_type is not None:
            return "accelerator_type is set, but device is cpu. Remove one of the two."
        return None
    if config.max_memory is not None and not config.gpu_indices:
        return "max_memory names no GPU. Add one, such as {0: 3GB, cpu: 20GB}, or set device: cpu."
    if config.num_gpus is not None and config.num_gpus > 1 and config.num_gpus != int(config.num_gpus):
        return (
            f"num_gpus must be whole if it is above 1, but {config.num_gpus} is not. Ray cannot give shares of "
            "several GPUs."
        )
    if config.num_gpus is not None and len(config.gpu_indices) > max(1, config.num_gpus):
        return (
            f"num_gpus is {config.num_gpus:g}, but max_memory or device_map names {len(config.gpu_indices)} GPUs. "
            "Leave num_gpus out, and it follows them."
        )
    return None


def _residency_problem(config: ModelFields) -> str | None:
    """Returns why a model cannot share the memory of a pool, or None if it can or does not."""
    swaps = config.swaps
    if swaps is None:
        return None
    for field in ("nnodes", "num_gpus", "gpu_ids"):
        if getattr(config, field) is not None:
            return (
                f"{field}: a model with residency: {{policy: swap}} gets its devices from its pool, which is on one "
                f"node. Leave {field} out, and name the pool's devices in pool_memory."
            )
    memory = swaps.pool_memory or {}
    named = sorted(key for key in memory if isinstance(key, int))
    if config.device == "cpu":
        if "cpu" not in memory or named:
            return "residency.pool_memory: with device: cpu it says what resident models may take, such as {cpu: 8GB}."
        return None
    if swaps.pool_memory is not None and not named:
        return "residency.pool_memory names no GPU. Add one, such as {0: 20GB, cpu: 64GB}, or set device: cpu."
    if "disk" in memory:
        return "residency.pool_memory: parked models of GPUs are kept in the host's memory. Write cpu instead of disk."
    return None


def _adapters_problem(config: ModelFields) -> str | None:
    """Returns why the fields of adapters contradict each other, or None if they agree. Buffers are made at the start,
    so adapters that come later need to know their room."""
    room = ("max_loras", "max_lora_rank")
    if not config.adapters and config.adapters_folder is not None and not config.has_adapters:
        return (
            "adapters_folder: set max_loras and max_lora_rank, because the memory for adapters is reserved at the "
            "start. For example, max_loras: 4 and max_lora_rank: 16."
        )
    if config.has_adapters and config.nodes > 1:
        return (
            "adapters: vLLM reads the files of an adapter on each node, and with nnodes there is no folder that all of "
            "them have. Leave nnodes out, or merge the adapter into its base model."
        )
    given = [name for name in (*room, "max_cpu_loras", "lora_target_modules") if getattr(config, name) is not None]
    if not config.has_adapters and (given or config.allow_pickled_adapters):
        field = given[0] if given else "allow_pickled_adapters"
        return (
            f"{field}: there are no adapters. Name some under adapters, or set both max_loras and max_lora_rank to "
            "reserve memory for adapters that come later."
        )
    if config.max_cpu_loras is not None and config.max_cpu_loras < (config.max_loras or 1):
        return f"max_cpu_loras is {config.max_cpu_loras}, but max_loras is {config.max_loras}. It must not be smaller."
    return None
