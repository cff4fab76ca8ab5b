"""Asks NVML which processes hold memory on the GPUs of this machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuProcess:
    """This is a process that uses a GPU.

    `name` is empty for a process that cannot be seen from here, such as one of another container or user.
    `used_bytes` is None if the driver does not report it.
    """

    gpu_index: int
    pid: int
    name: str
    used_bytes: int | None


def gpu_processes() -> list[GpuProcess]:
    """Returns the compute processes on all GPUs, ordered by GPU and then pid. It is empty if NVML is missing or does
    not answer."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = [process for index in range(pynvml.nvmlDeviceGetCount()) for process in _on_gpu(index)]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()
    return sorted(found, key=lambda process: (process.gpu_index, process.pid))


def _on_gpu(index: int) -> list[GpuProcess]:
    import pynvml

    running = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(index))
    return [GpuProcess(index, item.pid, _name(item.pid), item.usedGpuMemory) for item in running]


def _name(pid: int) -> str:
    import psutil

    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""
