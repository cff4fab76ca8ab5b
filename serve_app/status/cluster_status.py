"""Compares what runs with what was asked for and planned, from Serve's details, Ray's nodes and the replicas'
reports."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from serve_app.adapters.records import Found, Records
from serve_app.facts.nodes import Node, node_from_resources
from serve_app.planning.resource_demand import Demand
from serve_app.ray_serve import MODEL_DEPLOYMENT
from serve_app.replica.report import STALE_S, ReplicaReport
from serve_app.router.model_status import ModelStatus, adapter_statuses, read_status

# The reports are found by application and replica.
Reports = Mapping[tuple[str, str], ReplicaReport]
# What a replica asks of each node, by the model's name, of models whose replicas take several nodes.
Bundles = Mapping[str, Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class ReplicaView:
    """This is a replica as Serve knows it, with its report if there is one. `state` is the state that Serve gives
    it."""

    replica: str
    state: str
    node: str
    pid: int | None
    report: ReplicaReport | None


@dataclass(frozen=True)
class ModelView:
    """This is a model and its replicas. `wanted` is the number of replicas that Serve aims at now, `missing` says why
    fewer run, and `error` is the model's last error."""

    name: str
    state: str
    running: int
    wanted: int
    replicas: Sequence[ReplicaView]
    missing: str
    error: str
    adapters: Sequence["AdapterView"] = ()

    @property
    def load(self) -> float | None:
        """Returns the mean of the replicas' loads, or None if no replica has reported one."""
        loads = [view.report.load for view in self.replicas if view.report is not None]
        return sum(loads) / len(loads) if loads else None


@dataclass(frozen=True)
class AdapterView:
    """This is an adapter of a model, with the number of replicas that have it. `message` says why it has failed, or
    what else is to be known of it."""

    name: str
    state: str
    replicas: int
    message: str


@dataclass(frozen=True)
class ClusterStatus:
    """What a cluster runs: it has all models, the living nodes, and what is known of the nodes that are gone."""

    nodes: Sequence[Node]
    gone: Sequence[str]
    models: Sequence[ModelView]

    @property
    def is_whole(self) -> bool:
        """Returns whether every model has as many replicas of its last version as it should have, and all of its
        adapters."""
        return all(
            model.running >= model.wanted
            and model.state in ("ready", "asleep")
            and not model.error
            and all(adapter.state in ("ready", "asleep") for adapter in model.adapters)
            for model in self.models
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the status as `serve-app status --json` prints it, with sizes in bytes."""
        return asdict(self) | {"is_whole": self.is_whole}


def cluster_status(
    applications: Mapping[str, Any],
    ray_nodes: Sequence[Mapping[str, Any]],
    available: Mapping[str, Mapping[str, float]],
    reports: Sequence[ReplicaReport],
    now: float,
    bundles: Bundles | None = None,
    records: Records | None = None,
    found: Found | None = None,
) -> ClusterStatus:
    """Returns the status of all models. `applications` are those of `ServeInstanceDetails`, `ray_nodes` those of
    `ray.nodes()`, and `available` has the free resources by node id. `bundles` are those of `ray_serve`, `records` has
    what replicas have of adapters, and `found` what they found in their folders last."""
    alive = [node for node in ray_nodes if node["Alive"]]
    nodes = [node_from_resources(node["NodeManagerAddress"], node["Resources"]) for node in alive]
    left = [node_from_resources(node["NodeManagerAddress"], available.get(node["NodeID"], {})) for node in alive]
    gone = [_gone(node) for node in ray_nodes if not node["Alive"]]
    fresh = {(report.application, report.replica): report for report in reports if now - report.written_at < STALE_S}
    statuses = read_status(applications, own_application="")
    serving = {name: _with_survivors(status, applications[name], fresh) for name, status in statuses.items()}
    adapters = adapter_statuses(applications, serving, records or {}, found or {})[0].values()
    models = [
        replace(
            _model(
                status, applications[name]["deployments"].get(MODEL_DEPLOYMENT) or {}, fresh, nodes, left, bundles or {}
            ),
            adapters=[_adapter(adapter) for adapter in adapters if adapter.parent == name],
        )
        for name, status in statuses.items()
    ]
    return ClusterStatus(nodes, gone, models)


def _with_survivors(status: ModelStatus, application: Mapping[str, Any], reports: Reports) -> ModelStatus:
    """Returns the status of a model that serves as before if its update has failed, as the router sees it. Serve gives
    no details of its replicas then, but they report."""
    running = sum(name == status.name for name, _ in reports)
    if status.state != "failed" or application["deployments"] or not running:
        return status
    return replace(status, state="ready", replicas=running)


def _adapter(status: ModelStatus) -> AdapterView:
    message = status.message if status.state in ("ready", "failed") else ""
    return AdapterView(status.name, status.state, status.replicas, message)


def _model(
    status: ModelStatus,
    deployment: Mapping[str, Any],
    reports: Reports,
    nodes: Sequence[Node],
    left: Sequence[Node],
    bundles: Bundles,
) -> ModelView:
    replicas = [_replica(status.name, item, reports) for item in deployment.get("replicas") or ()]
    wanted = deployment.get("target_num_replicas") or 0
    if not deployment:  # Serve gives no details of what keeps running after an update could not be built.
        survivors = [report for (application, _), report in reports.items() if application == status.name]
        replicas = [ReplicaView(each.replica, "RUNNING", each.node, each.pid, each) for each in survivors]
        running = len(survivors)
        state = "ready" if running else status.state
        what = "its update failed" if running else "it could not be built"
        error = f"{what}: {status.message}" if status.message else ""  # Nothing has failed while it is being built.
        return ModelView(status.name, state, running, max(1, running), replicas, "", error)
    starting = sum(view.state in ("STARTING", "UPDATING") and view.pid is not None for view in replicas)
    short = wanted - status.replicas - starting if status.state != "stopping" else 0
    asked = bundles.get(status.name) or [deployment.get("required_resources") or {}]
    missing = missing_for(asked, nodes, left) if short > 0 else ""
    error = "" if status.state == "asleep" else status.message
    return ModelView(status.name, status.state, status.replicas, wanted, replicas, missing, error)


def missing_for(asked: Sequence[Mapping[str, float]], nodes: Sequence[Node], left: Sequence[Node]) -> str:
    """Returns what a replica without a process waits for, or an empty text if there is room, so that the replica will
    start in a moment.

    `asked` has Ray's resources by name for each node that a replica takes, and `left` has the nodes with what is still
    free on them.
    """
    parts = [node_from_resources("", resources) for resources in asked]
    first, *others = (
        Demand(part.cpus, part.gpus, part.vram_gib, next(iter(part.accelerator_types), None)) for part in parts
    )
    demand = replace(first, elsewhere=tuple(others))
    if demand.fits(left):
        return ""
    if demand.fits(nodes):
        free = "; ".join(map(str, left))
        starts = "there" if len(parts) == 1 else "on them"
        return (
            f"A replica needs {demand} {demand.where}. Either it is about to start {starts}, or others use these "
            f"resources now. The nodes have this left: {free}."
        )
    there = "; ".join(map(str, nodes)) or "none"
    lacks = "no living node has it" if len(parts) == 1 else "the living nodes do not have it"
    return f"A replica needs {demand} {demand.where}, and {lacks}: {there}."


def _replica(
    application: str, item: Mapping[str, Any], reports: Mapping[tuple[str, str], ReplicaReport]
) -> ReplicaView:
    state = str(getattr(item["state"], "value", item["state"]))
    name = item["replica_id"]
    return ReplicaView(name, state, item.get("node_ip") or "", item.get("pid"), reports.get((application, name)))


def _gone(node: Mapping[str, Any]) -> str:
    reason = " ".join(str(node.get("DeathReasonMessage") or "").split())
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})" + (f": {reason}" if reason else "")
