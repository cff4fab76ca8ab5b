"""Says why a replica does not fit on given devices, with the figures in words."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_app.config import ModelConfig
from serve_app.facts.inventory import Device
from serve_app.planning import memory
from serve_app.planning.memory import Figure
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Attempt, NearestPlan, attempt_of
from serve_app.planning.sizes import gib

# A sentence names so many devices at most, and otherwise their number.
MOST_NAMED = 4
# Devices with the bytes that are free on each.
Seats = Sequence[tuple[Device, int]]


@dataclass(frozen=True)
class Shortage:
    """This is the reason why a replica does not fit. `missing` is in bytes, on the device that lacks most. `attempt` is
    the way to run it that was tried, and `nearest` returns the plan that would be made if the devices had that much
    more. It is None where no figures were made."""

    code: str
    message: str
    missing: int
    attempt: Attempt | None = None
    nearest: NearestPlan | None = field(default=None, compare=False, repr=False)


def available(device: Device, free: int) -> int:
    """Returns the bytes that may be planned on a device with `free` bytes left. GPUs keep a reserve."""
    return free - (memory.reserve(device.total_bytes) if device.is_gpu else 0)


def rows_problem(request: ModelRequest, rows: int) -> Shortage | None:
    """Returns a shortage if the engine runs fewer sequences at once than are asked for, whatever its KV cache holds."""
    wanted = request.at_once
    if wanted is None or wanted.requests <= rows:
        return None
    text = f"max_num_seqs: the engine runs at most {rows} requests at once, and {wanted.text} are asked for."
    return Shortage("max_num_seqs", text, 0)


def held_text(request: ModelRequest) -> str:
    """Returns what the KV cache has to hold, as a part of a sentence."""
    one = f"one request of {request.max_model_len} tokens"
    return one if request.at_once is None else f"{one} and for {request.at_once.text} at once"


def small_cache(request: ModelRequest, least: int) -> Shortage:
    """Returns the shortage of a `kv_cache_memory_bytes` that is below `least`, the bytes that a rank needs."""
    cache = request.config.kv_cache_memory_bytes or 0
    return Shortage(
        "small_cache",
        f"kv_cache_memory_bytes: {gib(cache)} is less than what is needed on a rank for {held_text(request)} "
        f"({gib(least)}).",
        least - cache,
    )


def way_of(config: ModelConfig) -> str:
    """Returns how a replica would run, as the subject of a sentence."""
    attempt = attempt_of(config)
    return "It" if attempt is None else attempt.text


def named(devices: Sequence[Device]) -> str:
    """Returns the names of devices, or the first one and their number if there are many."""
    ids = [device.id for device in devices]
    if len(ids) > MOST_NAMED:
        return f"{len(ids)} devices from {ids[0]}"
    return ids[0] if len(ids) == 1 else f"{', '.join(ids[:-1])} and {ids[-1]}" if ids else "no device"


def shortage(
    request: ModelRequest,
    seat: tuple[Device, int],
    fixed: Figure,
    cache: int,
    missing: int,
    bounds: str,
    devices: Sequence[Device],
) -> Shortage:
    """Returns a shortage with its figures in bytes: `fixed` is what the replica takes beside its KV cache, `cache` what
    that needs, and `missing` what the device of `seat` lacks, all on each rank of vLLM, or on all `devices` of pt
    together. `bounds` says what limits it."""
    device, free = seat
    held, planned = device.total_bytes - device.free_bytes, device.free_bytes - free
    others = f" Other processes hold {gib(held)} there now." if held > 0 and device.is_gpu else ""
    others += f" Models placed before take {gib(planned)} of it." if planned > 0 else ""
    if "mla" in request.architecture.layers and request.config.infer_backend == "vllm":
        others += " Its KV cache (MLA) is the same on every rank, so a larger tensor_parallel_size does not shrink it."
    others += (
        " Some of these figures were measured in earlier runs (calibration.json)."
        if fixed.certainty == "calibrated"
        else ""
    )
    where, lacks = named(devices), f"{gib(missing)} too much"
    if len(devices) > 1 and request.config.infer_backend == "vllm":
        where = f"each of {len(devices)} ranks"
        lacks = f"{lacks} for {device.id}"
    elif len(devices) > 1:
        where += " together"
    return Shortage(
        "over_commit",
        f"{way_of(request.config)} needs {gib(fixed.bytes)} for weights, activations and context and {gib(cache)} of "
        f"KV cache for {held_text(request)} on {where}, which is {lacks}.{bounds}{others}",
        missing,
    )


def bounds_of(request: ModelRequest, seats: Seats, limits: Sequence[int]) -> str:
    """Returns sentences on what keeps a replica from all that is free on its devices: limits of the config, and the
    plan's reserve on each other GPU."""
    pairs = list(zip(seats, limits, strict=True))
    limited = [f"{gib(limit)} of {device.id}" for (device, free), limit in pairs if limit < available(device, free)]
    field = "max_memory" if request.config.max_memory else f"num_gpus: {request.config.share or 1:g}"
    text = f" {field} allows {' and '.join(limited)}, context and activations included." if limited else ""
    if any(device.is_gpu and limit >= available(device, free) for (device, free), limit in pairs):
        text += f" The plan keeps {memory.RESERVE_SHARE * 100:g} % of each card free."
    return text
