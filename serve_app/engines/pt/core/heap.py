"""Gives back memory that this process keeps but does not use."""

import ctypes
import gc


def trim_heap() -> None:
    """Gives free memory that Python and the C library keep back to the system.

    glibc keeps free pages: after hundreds of requests at once 20 to 60 MB, which grow slowly and look like a leak.
    Other C libraries have no `malloc_trim`.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
