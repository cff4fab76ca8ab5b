"""Gives back memory that this process keeps but does not use."""

import ctypes
import gc

import torch


def trim_heap() -> None:
    """Gives free memory that Python and the C library keep back to the system.

    glibc keeps free pages: after hundreds of requests at once 20 to 60 MB, which grow slowly and look like a leak.
    Other C libraries have no `malloc_trim`.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_everything() -> None:
    """Gives back the memory of a model that nothing refers to any more: the host's as `trim_heap` does, and that of
    GPUs which torch's allocator keeps, or which other processes have opened and closed. It takes some 0.3 s."""
    trim_heap()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.ipc_collect()
