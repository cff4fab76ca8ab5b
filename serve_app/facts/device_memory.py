"""Reads how much of this machine's memory and GPUs is in use, whoever uses it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from serve_app.facts.gpus import Gpu, local_gpus
from serve_app.facts.host_memory import container_memory

# The device that is the host's memory.
CPU = "cpu"


@dataclass(frozen=True)
class DeviceMemory:
    """This is a device of a node as it was at `measured_at`, in seconds since 1970. `device` is the GPU's UUID or
    "cpu", and `index` is NVML's number of a GPU. `used` is what all processes hold together, in bytes like `total`."""

    device: str
    index: int | None
    name: str
    total: int
    used: int
    measured_at: float

    @property
    def free(self) -> int:
        """Returns the bytes that nobody holds."""
        return max(0, self.total - self.used)


def node_devices() -> list[DeviceMemory]:
    """Returns the host's memory and all GPUs that NVML sees here. In a container with a limit of memory, that is the
    memory. It takes about a tenth of a millisecond, and some for each GPU."""
    return [host_device(), *(_gpu_device(gpu) for gpu in _gpus())]


def host_device() -> DeviceMemory:
    """Returns the host's memory, or the container's if that has a limit."""
    memory = psutil.virtual_memory()
    total, used = memory.total, memory.total - memory.available
    limited = container_memory(total)
    if limited is not None:
        total, used = limited
    return DeviceMemory(CPU, None, "memory", total, used, time.time())


def _gpu_device(gpu: Gpu) -> DeviceMemory:
    return DeviceMemory(gpu.uuid, gpu.index, gpu.name, gpu.total_bytes, gpu.total_bytes - gpu.free_bytes, time.time())


def _gpus() -> Sequence[Gpu]:
    import pynvml

    try:
        return local_gpus()
    except pynvml.NVMLError:  # A driver that is broken reports nothing, and the engines say so elsewhere.
        return ()
