"""Keeps what a replica reports about itself in Ray's key-value store, where `serve-app status` reads it.

A report that is older than `STALE_S`, or belongs to a replica that Serve does not have any more, is ignored.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from serve_app.facts.device_memory import DeviceMemory
from serve_app.ray_serve import delete_stored, store, stored, stored_keys

PREFIX = b"serve-app-report/"
REPORT_EVERY_S = 10.0
# While somebody watches the console, replicas report more often. They look at the second interval whether anybody does,
# and with each report alone where nobody ever has, since the console may be switched off.
WATCHED_EVERY_S, LOOK_EVERY_S = 2.0, 5.0
WATCHED_UNTIL = b"serve-app-console-watched-until"
# Whoever opens the console is believed to watch for so many seconds after it was last told.
WATCHED_FOR_S = 10.0
STALE_S = 60.0
FORGOTTEN_S = 600.0


@dataclass(frozen=True)
class DeviceReport:
    """What one rank of a replica was planned and measured to hold of one device in bytes. Unknown figures are None.

    `device` is the GPU's UUID or "cpu", and `index` is the GPU's number on its node. `held`, `peak`, `weights`,
    `kv_cache` and `adapters` are as in `RankMemory`, and `planned_adapters` is what of `planned` is for adapters.
    `rank` is the number of the engine's process: vLLM has one for each rank, and they share the device "cpu", while pt
    has one process for all devices. `node` is the address of the rank's node, or empty if it is the replica's. `parts`
    has what `planned` and `held` consist of. For a rank on another node, `total` and `used` are its device's and what
    all processes hold of that.
    """

    device: str
    index: int | None
    planned: int | None
    certainty: str
    held: int | None
    peak: int | None
    weights: int
    kv_cache: int
    rank: int = 0
    node: str = ""
    adapters: int = 0
    planned_adapters: int | None = None
    parts: Sequence["PartReport"] = ()
    total: int | None = None
    used: int | None = None

    @property
    def where(self) -> str:
        """Returns the device on its node, as a person reads it. The number of a GPU on another node is not known."""
        if self.device == "cpu":
            return "memory"
        return f"GPU {self.device if self.index is None else self.index}"


@dataclass(frozen=True)
class PartReport:
    """This is a part of what a rank was planned and measured to hold: "weights", "adapters", "kv_cache", "activations"
    or "context", which is the CUDA context with the CUDA graphs. On the CPU, what is none of the first three counts as
    activations. Unknown figures are None, and `certainty` is empty without a plan."""

    name: str
    planned: int | None
    held: int | None
    certainty: str


@dataclass(frozen=True)
class ReplicaReport:
    """This is the report of a replica at `written_at`, in seconds since 1970. `load` is as in `Engine.load`. `node` and
    `node_id` are the address and Ray's id of its node, of whose memory and GPUs `node_devices` says what all processes
    hold."""

    application: str
    replica: str
    node: str
    pid: int
    model: str
    backend: str
    load: float
    ready_after_s: float
    written_at: float
    devices: Sequence[DeviceReport]
    blocks: "BlocksReport | None" = None
    residency: "ResidencyReport | None" = None
    node_id: str = ""
    node_devices: Sequence[DeviceMemory] = ()

    @property
    def has_ranks(self) -> bool:
        """Returns whether the engine has several processes, each of which reports on its own."""
        return has_ranks(self.devices)


@dataclass(frozen=True)
class ResidencyReport:
    """This is the state of a replica that shares its memory with others (`residency/member.py`), the name of its pool,
    and the seconds that it takes to become resident once it may, which were measured unless they are a guess."""

    state: str
    pool: str
    ready_in_s: float
    is_guess: bool = False


@dataclass(frozen=True)
class BlocksReport:
    """These are the blocks of KV cache that were planned and that vLLM has made. Unknown figures are None."""

    planned: int | None
    made: int | None

    @property
    def differ(self) -> bool:
        """Returns whether both are known and one is not the other."""
        return None not in (self.planned, self.made) and self.planned != self.made


def has_ranks(devices: Sequence[DeviceReport]) -> bool:
    """Returns whether these are of several processes of an engine."""
    return len({device.rank for device in devices}) > 1


def write_report(report: ReplicaReport) -> None:
    """Stores a report, for which it blocks for a moment. Raises RayError or RuntimeError while Ray's head does not
    answer."""
    store(_key(report.application, report.replica), json.dumps(asdict(report)).encode())


def tell_watched(now: float) -> None:
    """Tells all replicas and routers that somebody watches the console, for `WATCHED_FOR_S` from `now`, in seconds
    since 1970. It blocks for a millisecond, and raises what `write_report` raises."""
    store(WATCHED_UNTIL, f"{now + WATCHED_FOR_S:.3f}".encode())


def watchers(now: float) -> Literal["now", "earlier", "never"]:
    """Returns when somebody watches the console. It blocks for a millisecond, and raises what `write_report` raises. A
    clock that is far ahead on another node does not make it "now" for ever."""
    until = stored(WATCHED_UNTIL)
    if until is None:
        return "never"
    try:
        left_s = float(until) - now
    except ValueError:
        return "earlier"
    return "now" if 0.0 < left_s <= 2 * WATCHED_FOR_S else "earlier"


def is_watched(now: float) -> bool:
    """Returns whether somebody watches the console now, as `watchers` does."""
    return watchers(now) == "now"


def forget_report(application: str, replica: str) -> None:
    """Deletes the report of a replica that stops."""
    delete_stored(_key(application, replica))


def read_reports() -> list[ReplicaReport]:
    """Returns all reports that are stored. It skips those that another version has written.

    A replica that was killed leaves its report behind. Such reports are removed here once they are old, even those of
    another version. A report without a time stays, since its replica may be alive.
    """
    found = []
    for key in stored_keys(PREFIX):
        text = stored(key) or b""
        written_at = _written_at(text)
        if written_at is not None and time.time() - written_at > FORGOTTEN_S:
            delete_stored(key)
        elif (report := parsed_report(text)) is not None:
            found.append(report)
    return found


def _written_at(text: bytes) -> float | None:
    """Returns the time of a report of this version or another, in seconds since 1970, or None if it has none."""
    try:
        item = json.loads(text)
    except ValueError:
        return None
    written_at = item.get("written_at") if isinstance(item, dict) else None
    return float(written_at) if isinstance(written_at, int | float) else None


def parsed_report(text: bytes) -> ReplicaReport | None:
    """Returns the report that a text holds, or None if it is not one of this version."""
    try:
        item = json.loads(text)
        devices = tuple(_device(device) for device in item.pop("devices"))
        seen = tuple(DeviceMemory(**device) for device in item.pop("node_devices", ()))
        blocks, residency = item.pop("blocks"), item.pop("residency", None)
        return ReplicaReport(
            **item,
            devices=devices,
            blocks=None if blocks is None else BlocksReport(**blocks),
            residency=None if residency is None else ResidencyReport(**residency),
            node_devices=seen,
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _device(item: dict[str, Any]) -> DeviceReport:
    parts = tuple(PartReport(**part) for part in item.pop("parts", ()))
    return DeviceReport(**item, parts=parts)


def _key(application: str, replica: str) -> bytes:
    return PREFIX + f"{application}/{replica}".encode()
