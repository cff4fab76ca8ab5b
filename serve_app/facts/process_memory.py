"""Measures what processes of this machine hold: resident memory, and memory of GPUs by NVML."""

import os
from collections.abc import Sequence

import psutil

from serve_app.facts.gpu_processes import gpu_processes
from serve_app.facts.gpus import Gpu

GIB = 2**30


def resident_bytes(pid: int | None = None) -> int:
    """Returns the resident memory of a process in bytes, by default of this one."""
    size: int = psutil.Process(pid).memory_info().rss
    return size


def gpu_bytes(pid: int) -> dict[str, int]:
    """Returns the bytes that a process holds of each GPU, by UUID. It is empty if NVML cannot say: without a driver,
    or in a container, where NVML counts pids of the host."""
    import pynvml

    try:
        pynvml.nvmlInit()
        found = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == pid and process.usedGpuMemory is not None:
                    found[str(pynvml.nvmlDeviceGetUUID(handle))] = int(process.usedGpuMemory)
        return found
    except pynvml.NVMLError:
        return {}


def held_by_others(gpus: Sequence[Gpu]) -> str:
    """Returns a sentence for each of these GPUs of which other processes hold memory, or an empty text if none do.

    Other processes are those that this one has not started, including replicas of other models.
    """
    mine = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    processes = [process for process in gpu_processes() if process.pid not in mine]
    sentences = []
    for gpu in gpus:
        listed = "; ".join(
            f"pid {process.pid} {process.name or '(not visible from here)'}"
            + ("" if process.used_bytes is None else f" {process.used_bytes / GIB:.2f} GiB")
            for process in processes
            if process.gpu_index == gpu.index
        )
        held = gpu.total_bytes - gpu.free_bytes
        if listed:
            sentences.append(f"These processes hold memory of GPU {gpu.index} ({gpu.uuid}): {listed}.")
        elif is_held(gpu):
            sentences.append(
                f"On GPU {gpu.index} ({gpu.uuid}), processes that cannot be seen from here hold {held / GIB:.2f} GiB."
            )
    return " ".join(sentences)


def is_held(gpu: Gpu) -> bool:
    """Returns whether more is held than a driver and a desktop take."""
    return gpu.total_bytes - gpu.free_bytes > max(GIB, gpu.total_bytes // 20)
