"""What processes of this machine hold: resident memory, and memory of GPUs by NVML."""

import os

import psutil

from serve_app.facts.gpu_processes import gpu_processes
from serve_app.facts.gpus import Gpu, local_gpus

GIB = 2**30


def resident_bytes(pid: int | None = None) -> int:
    """Resident memory of one process, this one by default, in bytes."""
    size: int = psutil.Process(pid).memory_info().rss
    return size


def gpu_bytes(pid: int) -> dict[str, int]:
    """Bytes that a process holds of each GPU, by UUID. Empty where NVML does not tell: without a driver, or in a
    container, where it counts pids of the host."""
    uuids = {gpu.index: gpu.uuid for gpu in local_gpus()}
    found = [process for process in gpu_processes() if process.pid == pid and process.used_bytes is not None]
    return {uuids[process.gpu_index]: process.used_bytes or 0 for process in found}


def held_by_others(gpus: list[Gpu]) -> str:
    """Who else holds memory of these GPUs, as a sentence for each; empty where nobody does.

    "Other" are processes that this one has not started: replicas of other models are among them.
    """
    mine = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    sentences = []
    for gpu in gpus:
        others = [process for process in gpu_processes() if process.gpu_index == gpu.index and process.pid not in mine]
        held = gpu.total_bytes - gpu.free_bytes
        listed = "; ".join(
            f"pid {process.pid} {process.name or '(not visible from here)'}"
            + ("" if process.used_bytes is None else f" {process.used_bytes / GIB:.2f} GiB")
            for process in others
        )
        if listed:
            sentences.append(f"On GPU {gpu.index} ({gpu.uuid}): {listed}.")
        elif held > gpu.total_bytes // 20:
            sentences.append(f"On GPU {gpu.index} ({gpu.uuid}) {held / GIB:.2f} GiB are held, by whom cannot be seen.")
    return " ".join(sentences)
