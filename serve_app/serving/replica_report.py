"""What a replica tells about itself, in Ray's key-value store, where `serve-app status` reads it.

A report that is older than `STALE_S`, or of a replica that Serve does not have any more, says nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PREFIX = b"serve-app-report/"
REPORT_EVERY_S = 10.0
STALE_S = 60.0


@dataclass(frozen=True)
class DeviceReport:
    """One replica on one device: planned and measured bytes, None where nobody knows them.

    `device` is the GPU's UUID or "cpu", `index` the GPU's number on its node. `held`, `peak`, `weights` and `kv_cache`
    as in `RankMemory`.
    """

    device: str
    index: int | None
    planned: int | None
    certainty: str
    held: int | None
    peak: int | None
    weights: int
    kv_cache: int


@dataclass(frozen=True)
class ReplicaReport:
    """One replica, at `written_at` (seconds since 1970). `load` as in `Engine.load`."""

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


def write_report(report: ReplicaReport) -> None:
    """Tells it. Blocks for a moment. Raises RayError or RuntimeError while Ray's head does not answer."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_key(report.application, report.replica), json.dumps(asdict(report)).encode())


def forget_report(application: str, replica: str) -> None:
    """The replica stops."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(_key(application, replica))


def read_reports() -> list[ReplicaReport]:
    """All that were told and not forgotten."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    texts = [_internal_kv_get(key) for key in _internal_kv_list(PREFIX)]
    return sorted(
        (_parsed(json.loads(text)) for text in texts if text), key=lambda report: (report.application, report.replica)
    )


def _parsed(item: dict[str, Any]) -> ReplicaReport:
    devices = tuple(DeviceReport(**device) for device in item.pop("devices"))
    return ReplicaReport(**item, devices=devices)


def _key(application: str, replica: str) -> bytes:
    return PREFIX + f"{application}/{replica}".encode()
