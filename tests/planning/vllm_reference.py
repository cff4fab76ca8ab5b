"""Asks vLLM's own code how much memory a model takes on one of `tp` ranks: no GPU, no weights, only config.json.

    .venv/bin/python tests/planning/vllm_reference.py JOBS.json

prints one JSON list, an answer for each job. Tests call `answers` in a fork of `tests/warm_vllm.py`, which has imported
vLLM by the rules of "cpu".

A job has `config_dir`, `tp`, `max_model_len`, `dtype`, `kv_cache_dtype` and may have `block_size`, `quantization`,
`max_num_batched_tokens` and `rules`. With `rules` "cpu" (the default) the answer is what this CPU build of vLLM would
do on this very machine, and some of that depends on its instruction set. With "cuda" the choices that vLLM makes for
the CPU alone are taken back: block sizes, state types and overlapping steps are those of a Hopper or Ampere GPU.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.platforms.interface import Platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

# What a spec says of itself, where it has it.
SPEC_FIELDS = ("num_kv_heads", "head_size", "head_size_v", "dtype", "sliding_window", "shapes", "dtypes")


def main() -> None:
    """Reads the jobs, answers each, prints the answers. What vLLM prints goes to stderr."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    stdout = os.dup(1)
    os.dup2(2, 1)
    answered = answers(jobs)
    with os.fdopen(stdout, "w") as file:
        json.dump(answered, file)


def answers(jobs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of all jobs."""
    # vLLM looks at each new model class in a process of its own, to keep CUDA out of this one: 18 s each, for nothing.
    registry._run_in_subprocess = lambda inspect: inspect()
    with tempfile.TemporaryDirectory() as folder:
        start_process_group(folder)
        answered = [answer(job) for job in jobs]
        parallel_state.get_tp_group().world_size = 1
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
    return answered


def start_process_group(folder: str) -> None:
    """A group of one. vLLM makes the group of the experts where it has no model yet, so it is there for all jobs."""
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The figures of one job, or why vLLM refuses it."""
    start = time.perf_counter()
    try:
        figures = measure(job)
    except Exception as error:
        # An assertion without words is named by its source line.
        text = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or ""
        figures = {"error": f"{type(error).__name__}: {' '.join(text.split())}"}
    return figures | {"seconds": round(time.perf_counter() - start, 3)}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Builds the model of rank 0 without storage and asks its layers."""
    # Everything in vLLM that splits by rank asks this group for its size; nothing communicates while a model is built.
    parallel_state.get_tp_group().world_size = job["tp"]
    config = engine_config(job)
    with (
        set_current_vllm_config(config),
        set_default_torch_dtype(config.model_config.dtype),
        torch.device("meta"),
    ):
        model = initialize_model(config)
    if has_cuda_rules(job):
        use_cuda_backends(config)
        # The method of the base class, which CUDA inherits; the CPU has its own.
        Platform.update_block_size_for_backend.__func__(type(current_platform), config)
    else:
        current_platform.update_block_size_for_backend(config)
    with set_current_vllm_config(config):
        specs = get_kv_cache_spec(config)
    parameters = dict(model.named_parameters())  # a shared parameter is in it once
    return {
        "weights_bytes": size_of(parameters.values()),
        "buffer_bytes": size_of(model.buffers()),
        "parameters": {name: [list(p.shape), short(p.dtype), size_of([p])] for name, p in parameters.items()},
        "kv_layers": [kv_layer(name, spec, config) for name, spec in specs.items()],
        "kv_bytes_per_request": sum(spec.max_memory_usage_bytes(config) for spec in specs.values()),
        "kv_bytes_in_groups": kv_bytes_in_groups(specs, config),
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "max_in_flight_tokens": config.max_in_flight_tokens,
        "mamba_cache_mode": config.cache_config.mamba_cache_mode,
    }


def engine_config(job: dict[str, Any]) -> VllmConfig:
    """vLLM's configuration, with its own checks of `tp` against the model. Fresh: layers register in it by name."""
    names = ("block_size", "max_num_batched_tokens", "quantization")
    optional = {key: job[key] for key in names if job.get(key) is not None}
    arguments = EngineArgs(
        model=job["config_dir"],
        skip_tokenizer_init=True,
        tensor_parallel_size=job["tp"],
        max_model_len=job["max_model_len"],
        dtype=job["dtype"],
        kv_cache_dtype=job.get("kv_cache_dtype", "auto"),
        enforce_eager=True,
        **optional,
    )
    if not has_cuda_rules(job):
        return arguments.create_engine_config()
    # All that vLLM decides for the CPU alone is in this method: blocks of 128 tokens, float32 states, no step ahead.
    with patch.object(type(current_platform), "check_and_update_config"):
        return arguments.create_engine_config()


def has_cuda_rules(job: dict[str, Any]) -> bool:
    """Whether the answer is to be that of a GPU."""
    return job.get("rules", "cpu") == "cuda"


def use_cuda_backends(config: VllmConfig) -> None:
    """Lets vLLM choose the block size as it does for CUDA.

    The CUDA backends cannot run here, but what they say about blocks needs no GPU. The layers keep their CPU kernels
    and only name another backend. These are vLLM's first choices on Hopper: FlashAttention and its kind for MLA, which
    has no fp8 cache and leaves that to FlashMLA.
    """
    from vllm.v1.attention.backends import fa_utils

    for name in ("flash_attn_varlen_func", "get_scheduler_metadata"):
        vars(fa_utils).setdefault(name, None)  # Not in the CPU build; imported below and never called.
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    from vllm.v1.attention.backends.mla.flashattn_mla import FlashAttnMLABackend
    from vllm.v1.attention.backends.mla.flashmla import FlashMLABackend

    mla = FlashMLABackend if config.cache_config.cache_dtype.startswith("fp8") else FlashAttnMLABackend
    for layer in get_layers_from_vllm_config(config, AttentionLayerBase).values():
        if hasattr(layer, "attn_backend"):
            layer.attn_backend = mla if layer.attn_backend.is_mla() else FlashAttentionBackend


def kv_layer(name: str, spec: KVCacheSpec, config: VllmConfig) -> dict[str, Any]:
    """One layer of the cache."""
    layer = {
        "layer": name,
        "kind": type(spec).__name__,
        "page_size_bytes": spec.page_size_bytes,
        "block_size": spec.block_size,
        "max_memory_usage_bytes": spec.max_memory_usage_bytes(config),
    }
    return layer | {key: short(getattr(spec, key)) for key in SPEC_FIELDS if getattr(spec, key, None) is not None}


def kv_bytes_in_groups(specs: dict[str, KVCacheSpec], config: VllmConfig) -> int:
    """What vLLM wants at least for one request of full length when it starts.

    Layers of different kinds are put into groups of equal size, so a model of two kinds may need more than the sum.
    """
    layers = get_layers_from_vllm_config(config, AttentionLayerBase).values()
    layouts = get_supported_kv_cache_layouts(layer.get_attn_backend() for layer in layers)
    resolve_kv_cache_layout(config, [[layout.name for layout in layouts]], specs.values())
    groups = kv_cache_utils.get_kv_cache_groups(config, dict(specs))
    return kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def short(value: Any) -> Any:
    """A value that JSON can hold; types by their names without `torch.`."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, list | tuple):
        return [short(item) for item in value]
    return value


if __name__ == "__main__":
    main()
