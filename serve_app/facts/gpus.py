"""Asks NVML for the GPUs of this machine."""

import os
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """This is a GPU. `index` is NVML's, in PCI order. Sizes are in bytes, and `free_bytes` was free when it was
    read."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int


def local_gpus() -> list[Gpu]:
    """Returns the GPUs that NVML sees here. It is empty if there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return []
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
            return []
        raise
    try:
        return [_read(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def visible_gpus(gpus: Sequence[Gpu]) -> list[Gpu]:
    """Returns those of the machine's GPUs that CUDA_VISIBLE_DEVICES names by number or UUID, in its order."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(gpus)
    known = {str(gpu.index): gpu for gpu in gpus} | {gpu.uuid: gpu for gpu in gpus}
    return [known[name.strip()] for name in named.split(",") if name.strip() in known]


def _read(index: int) -> Gpu:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(index, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle), memory.total, memory.free)
