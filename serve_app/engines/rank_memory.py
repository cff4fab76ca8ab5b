"""What one rank of an engine holds of one device, read inside the rank's process."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from serve_app.engines.torch_internals import gpu_uuid
from serve_app.facts.process_memory import gpu_bytes, resident_bytes


@dataclass(frozen=True)
class RankMemory:
    """Measured bytes of one process on one device; `device` is the GPU's UUID, or "cpu".

    `weights` and `kv_cache` are tensors that are there now, `most_kv_cache` the most that the cache may have taken so
    far. `held` is all that the process holds: by NVML on a GPU, and
    there None where the driver does not tell; on the CPU resident memory beyond that of the loaded libraries. `peak` is
    the most that `held` was, as far as torch's allocator knows. `context` is held outside that allocator.
    """

    device: str
    pid: int
    weights: int
    kv_cache: int
    most_kv_cache: int
    held: int | None
    peak: int | None
    context: int | None

    @property
    def rest(self) -> int | None:
        """What was held at least, at some moment, beyond weights, cache and context: activations, graphs, what the
        allocator keeps. The peak and the cache's own may be of different moments, so it may have been more."""
        if self.peak is None or self.context is None:
            return None
        return max(0, self.peak - self.weights - self.most_kv_cache - self.context)


def rank_memory(
    device: torch.device, weights: int, kv_cache: int, libraries: int, most_kv_cache: int | None = None
) -> RankMemory:
    """Reads this process. `libraries` is what it held before the model was loaded, for the CPU; without
    `most_kv_cache` the cache has always the same size."""
    most = kv_cache if most_kv_cache is None else max(kv_cache, most_kv_cache)
    if device.type != "cuda":
        held = max(0, resident_bytes() - libraries)
        return RankMemory("cpu", os.getpid(), weights, kv_cache, most, held, held, 0)
    uuid = gpu_uuid(device)
    held_here = gpu_bytes(os.getpid()).get(uuid)
    if held_here is None:
        return RankMemory(uuid, os.getpid(), weights, kv_cache, most, None, None, None)
    reserved = torch.cuda.memory_reserved(device)
    peak = held_here + torch.cuda.max_memory_reserved(device) - reserved
    return RankMemory(uuid, os.getpid(), weights, kv_cache, most, held_here, peak, max(0, held_here - reserved))


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> dict[torch.device, int]:
    """Bytes by device, shared storages once; tensors without data ("meta") are left out."""
    storages = {}
    for tensor in tensors:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    sizes: dict[torch.device, int] = {}
    for (device, _), size in storages.items():
        sizes[device] = sizes.get(device, 0) + size
    return sizes
