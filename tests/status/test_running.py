"""What Serve's details and the replicas' reports say of what runs."""

from dataclasses import replace
from typing import Any

from serve_app.facts.inventory import Device, Inventory
from serve_app.replica.report import DeviceReport, ReplicaReport
from serve_app.status.beside import Holding, RunningPool
from serve_app.status.running import running

GIB = 2**30
DEVICES = (
    Device("n1", 0, "L4", 24 * GIB, 24 * GIB, by_index=True),
    Device("n1", None, "memory", 64 * GIB, 64 * GIB),
    Device("n2", 0, "L4", 24 * GIB, 24 * GIB, by_index=False),
    Device("n2", None, "memory", 64 * GIB, 64 * GIB),
)
NAMES = {"id1": "n1", "id2": "n2"}
ADDRESSES = {"10.0.0.1": "n1", "10.0.0.2": "n2"}


def application(args: dict[str, Any], nodes: list[str], resources: dict[str, float] | None = None) -> dict[str, Any]:
    """A model of Serve's details with a replica on each of these nodes."""
    replicas = [{"replica_id": f"r{number}", "state": "RUNNING", "node_id": node} for number, node in enumerate(nodes)]
    return {
        "status": "RUNNING",
        "message": "",
        "deployed_app_config": {"args": {"model": "serve-app/demo", "infer_backend": "pt", **args}},
        "deployments": {"Model": {"replicas": replicas, "message": "", "required_resources": resources or {}}},
    }


def report(name: str, *devices: DeviceReport, replica: str = "r0") -> dict[tuple[str, str], ReplicaReport]:
    """What one replica tells."""
    told = ReplicaReport(name, replica, "10.0.0.1", 1, "serve-app/demo", "pt", 0.0, 1.0, 0.0, devices)
    return {(name, replica): told}


def device(where: str, index: int | None, planned: int | None, held: int | None, node: str = "") -> DeviceReport:
    """One rank, in GiB."""
    size = [None if value is None else value * GIB for value in (planned, held)]
    return DeviceReport(where, index, size[0], "exact", size[1], size[1], 0, 0, node=node)


def read(applications: dict[str, Any], reports: dict[tuple[str, str], ReplicaReport]) -> Any:
    """What runs."""
    return running(applications, reports, Inventory(DEVICES), NAMES, ADDRESSES, {})


def test_a_replica_holds_what_it_reports_on_the_devices_of_the_inventory() -> None:
    """On the node that Serve names, and a rank elsewhere on the node of that address. What is not known counts as 0."""
    ranks = (device("cpu", None, 8, 4), device("GPU-x", 0, 10, None), device("GPU-y", 0, 6, 5, node="10.0.0.2"))
    (model,) = read({"a": application({}, ["id1"], {"GPU": 1.0})}, report("a", *ranks)).models
    assert model.holdings == [
        Holding("n1:cpu", 4 * GIB, 8 * GIB),
        Holding("n1:0", 0, 10 * GIB),
        Holding("n2:0", 5 * GIB, 6 * GIB, 1.0),
    ]
    assert (model.starting, model.is_asleep, model.pool) == (0, False, "")


def test_a_replica_without_a_report_claims_what_ray_counts() -> None:
    """By index, on its node, and that of another replica too."""
    asked = application({}, ["id1", "id1"], {"vram_mib_0": 2048.0})
    (model,) = read({"a": asked}, {}).models
    assert (model.starting, model.claims) == (2, {"n1:0": 4 * GIB})


def test_what_serves_on_after_a_failed_update_counts_by_its_reports() -> None:
    """Serve gives no details of it. It is believed to have its GPU whole."""
    failed = application({}, []) | {"status": "DEPLOY_FAILED", "deployments": {}}
    told = {key: replace(value, node_id="id2") for key, value in report("a", device("GPU-y", 0, 6, 5)).items()}
    (model,) = read({"a": failed}, told).models
    assert (model.holdings, model.is_asleep) == ([Holding("n2:0", 5 * GIB, 6 * GIB, 1.0)], False)


def test_a_model_without_replicas_sleeps() -> None:
    """It holds nothing."""
    (model,) = read({"a": application({}, [])}, {}).models
    assert (model.is_asleep, model.holdings) == (True, [])


def test_a_pool_has_the_budget_of_its_config_on_its_nodes() -> None:
    """By index, of memory, and without `pool_memory` all GPUs of the node. A config that cannot be read has no pool."""
    swap = {"policy": "swap"}
    indexed = application({"residency": {**swap, "pool_memory": {0: "16GiB"}}}, ["id1"])
    on_cpu = {"device": "cpu"}
    memory = application(
        {**on_cpu, "residency": {**swap, "pool": "m", "pool_memory": {"cpu": "2GiB", "disk": "1GiB"}}}, ["id2"]
    )
    whole = application({"residency": {**swap, "pool": "w"}}, ["id2"])
    broken = application({"residency": "swap"}, ["id2"])
    found = read({"a": indexed, "b": memory, "c": whole, "d": broken}, {})
    assert found.pools == (
        RunningPool("default", {"n1:0": 16 * GIB}, {"n1:0": 16 * GIB}),
        RunningPool("m", {"n2:cpu": 2 * GIB}),
        RunningPool("w", {"n2:0": 24 * GIB}),
    )
    assert [model.pool for model in found.models] == ["default", "m", "w", ""]
