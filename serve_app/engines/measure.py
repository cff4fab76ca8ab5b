"""Reads what this process, one rank of an engine, holds of one device and of the host's pinned memory."""

import os
from collections.abc import Iterable

import torch

from serve_app.engines.rank_memory import RankMemory
from serve_app.engines.torch_internals import gpu_uuid, is_view
from serve_app.facts.process_memory import gpu_bytes, resident_bytes


def rank_memory(
    device: torch.device,
    weights: int,
    kv_cache: int,
    libraries: int,
    most_kv_cache: int | None = None,
    adapters: int = 0,
    tensor_peak: int | None = None,
) -> RankMemory:
    """Returns what this process holds. `libraries` is what it held before the model was loaded, for the CPU. Without
    `most_kv_cache`, the cache always has the same size. `tensor_peak` is as in `RankMemory`."""
    most = kv_cache if most_kv_cache is None else max(kv_cache, most_kv_cache)
    if device.type != "cuda":
        held = max(0, resident_bytes() - libraries)
        return RankMemory("cpu", os.getpid(), weights, kv_cache, most, held, held, 0, adapters=adapters)
    uuid = gpu_uuid(device)
    held_here = gpu_bytes(os.getpid()).get(uuid)
    if held_here is None:
        return RankMemory(
            uuid, os.getpid(), weights, kv_cache, most, None, None, None, adapters=adapters, tensor_peak=tensor_peak
        )
    reserved = torch.cuda.memory_reserved(device)
    peak = held_here + torch.cuda.max_memory_reserved(device) - reserved
    context = max(0, held_here - reserved)
    return RankMemory(
        uuid, os.getpid(), weights, kv_cache, most, held_here, peak, context, adapters=adapters, tensor_peak=tensor_peak
    )


def tensor_peak(device: torch.device, is_parked: bool = False) -> int | None:
    """Returns the most that tensors of this process took of a GPU, or None on the CPU. Memory that torch keeps of freed
    tensors does not count. A parked engine has had the peak with weights that are gone, so it tells none, which is
    0."""
    if device.type != "cuda":
        return None
    return 0 if is_parked else torch.cuda.max_memory_allocated(device)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> dict[torch.device, int]:
    """Returns the bytes by device. Shared storages count once, and tensors without data ("meta") do not count."""
    storages = {}
    for tensor in tensors:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    sizes: dict[torch.device, int] = {}
    for (device, _), size in storages.items():
        sizes[device] = sizes.get(device, 0) + size
    return sizes


def plain_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """Returns the tensors of floating point numbers that a module has as plain attributes, alone or in lists, which are
    neither its parameters nor its buffers. Views of other tensors are left out."""
    found: list[torch.Tensor] = []
    for value in vars(module).values():
        items = value if isinstance(value, list | tuple) else (value,)
        found += (item for item in items if isinstance(item, torch.Tensor) and not isinstance(item, torch.nn.Parameter))
    return [tensor for tensor in found if tensor.is_floating_point() and not is_view(tensor)]


def pinned_bytes() -> int:
    """Returns the bytes of pinned memory that torch holds in this process, in use or kept for later. It is 0 without
    CUDA."""
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


def free_pinned_cache() -> None:
    """Gives the pinned memory back that torch keeps for later. It does nothing without CUDA."""
    if torch.cuda.is_available():
        torch.accelerator.empty_host_cache()
