"""Guesses how long a model of a pool takes to come and to go, until its replica has measured it.

The guesses are its weights divided by a bandwidth, and the seconds in which an engine starts. They are for a machine of
2024 with PCIe 4.0 and NVMe, and none of them was measured on a GPU here.
"""

from dataclasses import dataclass

# These are bytes per second: between the host's pinned memory and a GPU, from a disk, and into the host's memory while
# vLLM sleeps, which copies its weights each time (10.6 s for an 8B model in vllm#48337).
TO_GPU, FROM_DISK, VLLM_SLEEP = 8e9, 1e9, 1.5e9
# These are the seconds in which an engine starts without its weights: its imports, its probe or its profiling pass, and
# for vLLM its CUDA graphs.
START_S = {"pt": 15.0, "vllm": 60.0}
# In so many seconds a process has ended, and a cache and its buffers are free.
STOP_S, FREE_S = 5.0, 0.5


@dataclass(frozen=True)
class SwapTimes:
    """These are seconds: until a parked model is resident, until a stopped one is, and until one that leaves has freed
    its memory."""

    wake_s: float
    start_s: float
    leave_s: float


def guessed_times(backend: str, weights: int, on_gpu: bool, parks: bool) -> SwapTimes:
    """Returns the guesses for a model with so many bytes of weights on its devices. A model that does not park has the
    time of a start for both."""
    start = START_S[backend] + weights / FROM_DISK
    if not parks:
        return SwapTimes(start, start, STOP_S)
    to_device = TO_GPU if on_gpu else FROM_DISK
    leave = weights / (VLLM_SLEEP if backend == "vllm" else to_device)
    return SwapTimes(FREE_S + weights / to_device, start, FREE_S + leave)
