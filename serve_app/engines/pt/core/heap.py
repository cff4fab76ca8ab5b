"""Memory that this process keeps and does not use."""

import ctypes
import gc


def trim_heap() -> None:
    """Gives what Python and the C library keep back to the system.

    glibc keeps pages that are free: after hundreds of requests at once 20 to 60 MB, which grow slowly and look like a
    leak. Other C libraries have no `malloc_trim`.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
