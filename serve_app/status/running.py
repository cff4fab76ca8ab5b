"""Reads what a cluster runs and holds, for plans beside it (`beside.py`)."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.byte_sizes import MaxMemoryKey
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.facts.inventory import GIB, Inventory, node_names, ray_inventory, unclaimed
from serve_app.facts.nodes import node_from_resources
from serve_app.model_fields import ResidencyConfig
from serve_app.ray_serve import MODEL_DEPLOYMENT, serve_details
from serve_app.replica.report import STALE_S, DeviceReport, ReplicaReport, read_reports
from serve_app.router.model_status import read_status
from serve_app.status.beside import Holding, Running, RunningModel, RunningPool

# The controller has this many seconds to answer.
STATUS_TIMEOUT_S = 30.0


def read_running() -> tuple[Inventory, Running]:
    """Returns the devices of the cluster that this process is connected to, and what runs on them. It blocks for a
    second or more, because each node measures itself. Nothing runs where no Serve does.

    Raises RayError if a node or Serve's controller does not answer.
    """
    import ray

    inventory = ray_inventory()
    booked = {device.id: device.free_bytes for device in unclaimed(inventory).devices if device.by_index}
    try:
        applications = serve_details(STATUS_TIMEOUT_S)["applications"]
    except ValueError:
        return inventory, Running(booked=booked)
    names = node_names()
    addresses = {str(node["NodeManagerAddress"]): names[str(node["NodeID"])] for node in ray.nodes() if node["Alive"]}
    now = time.time()
    reports = {(each.application, each.replica): each for each in read_reports() if now - each.written_at < STALE_S}
    return inventory, running(applications, reports, inventory, names, addresses, booked)


def running(
    applications: Mapping[str, Any],
    reports: Mapping[tuple[str, str], ReplicaReport],
    inventory: Inventory,
    names: Mapping[str, str],
    addresses: Mapping[str, str],
    booked: Mapping[str, int],
) -> Running:
    """Returns what these applications of `ServeInstanceDetails` hold. `names` has the inventory's names of nodes by
    Ray's ids, and `addresses` has them by their addresses. It is pure."""
    models, pools = [], dict[str, RunningPool]()
    for name, status in read_status(applications, own_application="").items():
        application = applications[name]
        config = _config_of(application)
        swaps = None if config is None else config.swaps
        replicas, asked = _replicas(name, application, reports)
        holdings = [
            holding
            for each in replicas
            if each.report is not None
            for holding in _holdings(each.report, names.get(each.node_id, ""), addresses, asked, inventory)
        ]
        claims = _claims(asked, [names.get(each.node_id, "") for each in replicas])
        starting = sum(each.report is None for each in replicas)
        pool = "" if swaps is None else swaps.pool
        models.append(RunningModel(name, holdings, pool, starting, status.state == "asleep", claims))
        if swaps is not None and config is not None:
            nodes = {names.get(each.node_id, "") for each in replicas} - {""}
            budget = _budget(swaps, config.device == "cpu", nodes, inventory)
            known = pools.get(pool)
            both = {**(known.budget if known is not None else {}), **budget}
            by_index = {device.id for device in inventory.gpus if device.by_index}
            pools[pool] = RunningPool(pool, both, {key: size for key, size in both.items() if key in by_index})
    return Running(tuple(models), tuple(pools.values()), booked)


@dataclass(frozen=True)
class _Replica:
    """This is one replica, with Ray's id of its node and its report if there is one."""

    node_id: str
    report: ReplicaReport | None


def _replicas(
    name: str, application: Mapping[str, Any], reports: Mapping[tuple[str, str], ReplicaReport]
) -> tuple[list[_Replica], Mapping[str, float]]:
    """Returns the replicas of a model, and what each asks of Ray."""
    deployment = application["deployments"].get(MODEL_DEPLOYMENT)
    if deployment is None:  # Serve gives no details of what keeps running after an update could not be built.
        own = [report for (owner, _), report in reports.items() if owner == name]
        return [_Replica(report.node_id, report) for report in own], {"GPU": 1.0}
    found = [
        _Replica(str(item.get("node_id") or ""), reports.get((name, item["replica_id"])))
        for item in deployment.get("replicas") or ()
    ]
    return found, deployment.get("required_resources") or {}


def _config_of(application: Mapping[str, Any]) -> ModelConfig | None:
    """Returns the config of a model as it was deployed, or None if it cannot be read."""
    args = (application.get("deployed_app_config") or {}).get("args") or {}
    try:
        return ModelConfig.from_args(args)
    except ConfigError:
        return None


def _holdings(
    report: ReplicaReport,
    node: str,
    addresses: Mapping[str, str],
    asked: Mapping[str, float],
    inventory: Inventory,
) -> Iterable[Holding]:
    known = {device.id: device for device in inventory.devices}
    gpus = float(asked.get("GPU", 0.0))
    for item in report.devices:
        where = addresses.get(item.node, node) if item.node else node
        device = known.get(_device_id(where, item))
        if device is None:
            continue
        share = min(1.0, gpus) if device.is_gpu and not device.by_index else 0.0
        yield Holding(device.id, item.held or 0, item.planned or 0, share)


def _device_id(node: str, item: DeviceReport) -> str:
    return f"{node}:{'cpu' if item.device == 'cpu' else item.index}"


def _claims(asked: Mapping[str, float], nodes: Sequence[str]) -> dict[str, int]:
    """Returns the bytes that Ray's books count for replicas on these nodes, of which each asks for the same."""
    by_index = node_from_resources("", asked).vram_gib
    claims: dict[str, int] = {}
    for node in filter(None, nodes):
        for index, gib in by_index.items():
            claims[f"{node}:{index}"] = claims.get(f"{node}:{index}", 0) + int(gib * GIB)
    return claims


def _budget(swaps: ResidencyConfig, on_cpu: bool, nodes: Iterable[str], inventory: Inventory) -> dict[str, int]:
    """Returns the bytes that a pool may take of each device of its nodes. Without `pool_memory` that is all of their
    GPUs."""
    named: Mapping[MaxMemoryKey, int] = swaps.pool_memory or {}
    budget = {}
    for device in inventory.devices:
        if device.node not in nodes:
            continue
        if on_cpu and not device.is_gpu and "cpu" in named:
            budget[device.id] = named["cpu"]
        elif not on_cpu and device.is_gpu:
            if swaps.pool_memory is None:
                budget[device.id] = device.total_bytes
            elif device.index is not None and device.index in named:
                budget[device.id] = named[device.index]
    return budget
