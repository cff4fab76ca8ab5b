"""Makes what the console shows of nodes and models from the cluster's status. It is pure.

The figures are those of `serve-app status`. What only the console adds is the memory that is in use of a device at all,
and so what of it others hold.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_app.console.events import Event
from serve_app.console.view import Seen
from serve_app.facts.device_memory import DeviceMemory
from serve_app.facts.inventory import names_of
from serve_app.ray_serve import HEAD_NODE
from serve_app.replica.report import DeviceReport, ReplicaReport
from serve_app.router.model_status import ModelStatus
from serve_app.status.cluster_status import ClusterStatus, ModelView, ReplicaView

CERTAINTIES = ("exact", "calibrated", "guessed")
# Sizes of what a key may not see are rounded up to a multiple of this.
HIDDEN_STEP = 2**30


@dataclass(frozen=True)
class Queued:
    """These are a model's requests in all routers: before their first byte, held for a load, and all that run."""

    waiting: int = 0
    held: int = 0
    active: int = 0


@dataclass(frozen=True)
class Snapshot:
    """This is what was read at one moment. `statuses` are the models and adapters of the directory, `nodes` are those
    of `ray.nodes()`, `idle` has the devices of nodes from which no replica reports, by the node's id, `args` those of
    each model's config, and `ready_in_s` the seconds until a model can answer, where it cannot."""

    cluster: ClusterStatus
    statuses: Mapping[str, ModelStatus]
    nodes: Sequence[Mapping[str, Any]]
    idle: Mapping[str, Sequence[DeviceMemory]] = field(default_factory=dict)
    args: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    queued: Mapping[str, Queued] = field(default_factory=dict)
    ready_in_s: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Block:
    """This is one rank of one replica on one device."""

    model: str
    view: ReplicaView
    report: ReplicaReport
    device: DeviceReport


@dataclass(frozen=True)
class Placed:
    """This is a node as `ray.nodes()` has it, with its devices and what is on them. `name` is that of plans, and empty
    for a node that is gone."""

    node: Mapping[str, Any]
    name: str
    devices: Sequence["_Device"]
    blocks: Mapping[str, Sequence[_Block]]


def placed_nodes(snapshot: Snapshot) -> list[Placed]:
    """Returns the nodes with what is on them. Reports name their node by its id, and older ones by its address."""
    blocks: dict[str, list[_Block]] = {}
    measured: dict[str, list[DeviceMemory]] = {}
    for model in snapshot.cluster.models:
        for view in model.replicas:
            report = view.report
            if report is None:
                continue
            own = report.node_id or report.node
            measured.setdefault(own, []).extend(report.node_devices)
            for device in report.devices:
                is_away = device.node and device.node != report.node  # It is a rank on another node.
                where = device.node if is_away else own
                blocks.setdefault(where, []).append(_Block(model.name, view, report, device))
    names = names_of(snapshot.nodes)
    return [
        _placed(node, names.get(str(node["NodeID"]), ""), blocks, measured, snapshot.idle) for node in snapshot.nodes
    ]


def _placed(
    node: Mapping[str, Any],
    name: str,
    blocks: Mapping[str, Sequence[_Block]],
    measured: Mapping[str, Sequence[DeviceMemory]],
    idle: Mapping[str, Sequence[DeviceMemory]],
) -> Placed:
    if not node["Alive"]:
        return Placed(node, name, (), {})
    names = str(node["NodeID"]), str(node["NodeManagerAddress"])
    here = [block for name in names for block in blocks.get(name, ())]
    seen = [*idle.get(names[0], ()), *(device for name in names for device in measured.get(name, ()))]
    by_device: dict[str, list[_Block]] = {}
    for block in here:
        by_device.setdefault(block.device.device, []).append(block)
    return Placed(node, name, _devices(seen, here), by_device)


def nodes_json(placed: Iterable[Placed], seen: Seen) -> list[dict[str, Any]]:
    """Returns the nodes with their devices and what is on them, as far as it is shown."""
    return [_node(each, seen) for each in placed]


def _node(placed: Placed, seen: Seen) -> dict[str, Any]:
    node = placed.node
    is_alive = bool(node["Alive"])
    return {
        "id": str(node["NodeID"]),
        "name": placed.name,
        "address": str(node["NodeManagerAddress"]),
        "is_head": HEAD_NODE in node["Resources"],
        "alive": is_alive,
        "note": "" if is_alive else seen.text(" ".join(str(node.get("DeathReasonMessage") or "").split())),
        "cpus": float(node["Resources"].get("CPU", 0.0)),
        "devices": [_device(device, placed.blocks.get(device.device, ()), seen) for device in placed.devices],
    }


@dataclass(frozen=True)
class _Device:
    """This is a device of a node. Unknown figures are None."""

    device: str
    index: int | None
    name: str
    total: int | None
    used: int | None
    measured_at: float | None


def _devices(measured: Iterable[DeviceMemory], blocks: Iterable[_Block]) -> list[_Device]:
    """Returns the node's devices with their newest figures: the memory first, then GPUs by their number."""
    found: dict[str, _Device] = {}
    for block in blocks:
        device = block.device
        name = "memory" if device.device == "cpu" else "GPU"
        at = None if device.total is None else block.report.written_at
        mine = _Device(device.device, device.index, name, device.total, device.used, at)
        found[device.device] = _newest(found.get(device.device), mine)
    for each in measured:
        mine = _Device(each.device, each.index, each.name, each.total, each.used, each.measured_at)
        found[each.device] = _newest(found.get(each.device), mine)
    return sorted(found.values(), key=lambda device: (device.device != "cpu", device.index or 0, device.device))


def _newest(one: _Device | None, other: _Device) -> _Device:
    return other if one is None or (other.measured_at or 0.0) >= (one.measured_at or 0.0) else one


def _device(device: _Device, mine: Sequence[_Block], seen: Seen) -> dict[str, Any]:
    shown = [block for block in mine if seen.name(block.model)]
    others = [block for block in mine if not seen.name(block.model)]
    hidden = [_hidden_block(others)] if others else []
    total, used = device.total, device.used
    held = [*(block.device.held for block in shown), *(block["held"] for block in hidden)]
    return {
        "device": device.device,
        "index": device.index,
        "name": device.name,
        "total": total,
        "used": used,
        "foreign": _foreign(total, used, held),
        "free": None if total is None or used is None else max(0, total - used),
        "measured_at": device.measured_at,
        "blocks": [
            *(_block(block, seen) for block in sorted(shown, key=lambda b: (b.model, b.view.replica, b.device.rank))),
            *hidden,
        ],
    }


def _foreign(total: int | None, used: int | None, held: Sequence[int | None]) -> int | None:
    """Returns what is used and held by none of ours. It is unknown if that is so of what one of ours holds: in a
    container, NVML may not tell it."""
    known = [each for each in held if each is not None]
    if total is None or used is None or len(known) < len(held):
        return None
    return max(0, used - sum(known))


def _block(block: _Block, seen: Seen) -> dict[str, Any]:
    device, residency = block.device, block.report.residency
    return {
        "model": block.model,
        "replica": block.view.replica,
        "rank": device.rank,
        "state": block.view.state,
        "residency": None if residency is None else residency.state,
        "planned": device.planned,
        "held": device.held,
        "peak": device.peak,
        "certainty": device.certainty,
        "parts": [
            {"name": part.name, "planned": part.planned, "held": part.held, "certainty": part.certainty}
            for part in device.parts
        ],
    }


def _hidden_block(blocks: Sequence[_Block]) -> dict[str, Any]:
    """Returns the sums of blocks that a key may not see one by one. They are rounded up, and have no parts, because
    exact sizes would tell which model it is, and how much it is used."""
    devices = [block.device for block in blocks]
    return {
        "model": None,
        "replica": "",
        "rank": 0,
        "state": "",
        "residency": None,
        "planned": _rounded_sum([device.planned for device in devices], is_partial=True),
        "held": _rounded_sum([device.held for device in devices]),
        "peak": None,
        "certainty": _least_certain(device.certainty for device in devices),
        "parts": [],
    }


def _rounded_sum(values: Sequence[int | None], is_partial: bool = False) -> int | None:
    """Returns the sum, rounded up to `HIDDEN_STEP`, or None if a figure is not known, or with `is_partial` if none
    is."""
    known = [value for value in values if value is not None]
    if not known or (len(known) < len(values) and not is_partial):
        return None
    return -(-sum(known) // HIDDEN_STEP) * HIDDEN_STEP


def _least_certain(values: Iterable[str]) -> str:
    known = [value for value in values if value in CERTAINTIES]
    return max(known, key=CERTAINTIES.index) if known else ""


def models_json(snapshot: Snapshot, seen: Seen, can: Callable[[str], Sequence[str]]) -> list[dict[str, Any]]:
    """Returns the models and adapters that are shown. `can` returns what an admin can do with a model now."""
    views = {model.name: model for model in snapshot.cluster.models}
    return [
        _model(status, views.get(status.application), snapshot, seen, can)
        for name, status in snapshot.statuses.items()
        if seen.name(name)
    ]


def _model(
    status: ModelStatus, view: ModelView | None, snapshot: Snapshot, seen: Seen, can: Callable[[str], Sequence[str]]
) -> dict[str, Any]:
    name, parent = status.name, status.parent
    queued = snapshot.queued.get(name, Queued())
    args = snapshot.args.get(status.application, {})
    report = next((each.report for each in (() if view is None else view.replicas) if each.report is not None), None)
    is_own = not parent
    model = str(args.get("model") or ("" if report is None else report.model))
    message = status.message if view is None or parent else view.error or status.message
    return {
        "name": name,
        "parent": seen.name(parent),
        "state": status.state if view is None or parent or view.state == "asleep" else view.state,
        "message": seen.text(message),
        "backend": report.backend if report is not None else str(args.get("infer_backend") or ""),
        "model": seen.text(model) if is_own else "",
        "running": status.replicas if view is None or parent else view.running,
        "wanted": 0 if view is None else view.running if parent else view.wanted,
        "missing": "" if view is None or parent else seen.text(view.missing),
        "load": None if view is None or parent else view.load,
        "waiting": queued.waiting,
        "held": queued.held,
        "active": queued.active,
        "ready_in_s": snapshot.ready_in_s.get(name),
        "replicas": [] if view is None or parent else [_replica(each, seen) for each in view.replicas],
        "can": list(can(name)) if seen.view.is_admin and is_own else [],
    }


def _replica(view: ReplicaView, seen: Seen) -> dict[str, Any]:
    residency = None if view.report is None else view.report.residency
    return {
        "replica": view.replica,
        "node": view.node,
        "pid": view.pid,
        "state": view.state,
        "load": None if view.report is None else view.report.load,
        "residency": None
        if residency is None
        else {
            "state": residency.state,
            "pool": seen.text(residency.pool),
            "ready_in_s": residency.ready_in_s,
            "is_guess": residency.is_guess,
        },
    }


def event_json(event: Event) -> dict[str, Any]:
    """Returns an event as JSON takes it."""
    return {"id": event.id, "time": event.time, "kind": event.kind, "model": event.model, "text": event.text}
