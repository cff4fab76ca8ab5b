"""Decides how many tokens the KV cache may hold."""

from collections.abc import Mapping

import psutil
import torch

from serve_app.config import ModelConfig
from serve_app.errors import EngineError
from serve_app.planning.fit_pt import PT_CPU_KV_BYTES, PT_CPU_KV_SHARE
from serve_app.planning.terms import CONTEXT_BYTES

# The cache may take this share of what is free on a GPU after the weights. The rest is for activations and moved
# buffers.
GPU_SHARE = 0.7


def cache_tokens(config: ModelConfig, bytes_per_token: Mapping[torch.device, float], least: int, most: int) -> int:
    """Returns how many tokens fit on every device that holds a part of the cache, at most `most`.

    `bytes_per_token` was measured at load on the buffers of a small batch. It includes one more layer's, since one
    layer has both buffers while they are moved. Raises EngineError if fewer than `least` fit, the buffers of a single
    token.
    """
    if config.kv_cache_memory_bytes is not None:
        tokens = config.kv_cache_memory_bytes / max(1e-9, sum(bytes_per_token.values()))
    else:
        tokens = min((_room(config, device) / size for device, size in bytes_per_token.items() if size), default=most)
    if tokens < least:
        needed = int(least * sum(bytes_per_token.values()))
        raise EngineError(
            f"kv_cache_memory_bytes: the KV cache of one sequence needs at least {needed} bytes, and there is room for "
            "less. Raise it, or give the weights less of the device."
        )
    return min(most, int(tokens))


def _room(config: ModelConfig, device: torch.device) -> float:
    if device.type != "cuda":
        return min(PT_CPU_KV_BYTES, PT_CPU_KV_SHARE * float(psutil.virtual_memory().available))
    free, total = torch.cuda.mem_get_info(device)
    most = min(1.0, config.num_gpus or 1.0) * total
    if config.max_memory and device.index is not None and device.index < len(config.gpu_indices):
        most = min(most, config.max_memory[config.gpu_indices[device.index]])
    left = most - CONTEXT_BYTES - torch.cuda.memory_allocated(device)
    return GPU_SHARE * float(max(0.0, min(free, left)))
