"""Asks NVML for the GPUs of this machine."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from serve_app.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
# CUDA shows nothing from such a name on. Ray takes the last one for none, too.
_HIDING = frozenset({"", "-1", "NoDevFiles"})


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
    """Returns those of the machine's GPUs that CUDA_VISIBLE_DEVICES names by number or UUID, in its order.

    "-1" hides itself and what follows, as it does for CUDA. Raises ConfigError for a name that is none of these GPUs,
    if there are any, because CUDA would show other devices than the plan counts with.
    """
    named = os.environ.get(VISIBLE)
    return list(gpus) if named is None or not gpus else gpus_named(gpus, named.split(","))


def gpus_named(gpus: Sequence[Gpu], names: Iterable[str]) -> list[Gpu]:
    """Returns the GPUs with these names, in their order: NVML's number, or the UUID or a beginning of it that no other
    GPU has. Everything else is as in `visible_gpus`."""
    found = []
    for name in map(str.strip, names):
        if name in _HIDING:
            break
        matches = [gpu for gpu in gpus if name == str(gpu.index) or (name[:4] == "GPU-" and gpu.uuid.startswith(name))]
        if len(matches) != 1:
            raise ConfigError(_unknown(name, len(matches), gpus))
        found += matches
    return found


def _unknown(name: str, matches: int, gpus: Sequence[Gpu]) -> str:
    here = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in gpus)
    if name.startswith("MIG-"):
        why = "is a part of a card (MIG), which serve-app does not support. Name whole GPUs"
    elif matches:
        why = "is the beginning of several UUIDs. Write more of it"
    else:
        why = "is no GPU of this machine. Name GPUs by number or UUID"
    return f"{VISIBLE}: '{name[:80]}' {why}. This machine has {here}."


def as_given(given: Sequence[str]) -> dict[str, str]:
    """Returns the environment that shows a process the GPUs that Ray has given it, and is empty where it shows them.

    Ray does this itself, unless its node was started with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1. Each replica
    would then compute on the first GPU of the machine.
    """
    shown = os.environ.get(VISIBLE)
    if not given or (shown is not None and {name.strip() for name in shown.split(",")} == set(given)):
        return {}
    return {VISIBLE: ",".join(sorted(given, key=lambda name: (len(name), name)))}


def _read(index: int) -> Gpu:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(index, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle), memory.total, memory.free)
