"""What `serve-app status` makes of Serve's details, Ray's nodes and the replicas' reports."""

from dataclasses import replace
from typing import Any

import pytest

from serve_app.adapters.records import AdapterState
from serve_app.cli.status import report
from serve_app.facts.nodes import Node
from serve_app.replica.report import BlocksReport, DeviceReport, ReplicaReport, ResidencyReport
from serve_app.status.cluster_status import ClusterStatus, cluster_status, missing_for
from tests.builders import application, node

GIB = 2**30
NOW = 1000.0


def ray_node(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    """As `ray.nodes()` has it."""
    return {"NodeID": name * 8, "NodeManagerAddress": name, "Alive": alive, "Resources": resources,
            "DeathReasonMessage": "" if alive else "health check failed"}  # fmt: skip


def model(running: int, wanted: int, resources: dict[str, float]) -> dict[str, Any]:
    """An application of one model, with replicas r0, r1, …"""
    item = application(running=running)
    replicas = [
        {"replica_id": f"r{number}", "state": "RUNNING", "node_ip": "a", "pid": number} for number in range(running)
    ]
    item["deployments"]["Model"] |= {
        "replicas": replicas,
        "target_num_replicas": wanted,
        "required_resources": resources,
    }
    return item


def told(replica: str, held: int, written_at: float = NOW, planned: int | None = 10 * GIB) -> ReplicaReport:
    """A report of one GPU."""
    device = DeviceReport("GPU-x", 0, planned, "guessed", held, held, 1, 1)
    return ReplicaReport("m", replica, "a", 1, "some/model", "pt", 0.5, 3.0, written_at, (device,))


def seen(running: int, wanted: int, *reports: ReplicaReport, lost: bool = False) -> ClusterStatus:
    """One model on a node with 24 GiB of GPU 0, of which 4 are left."""
    nodes = [ray_node("a", CPU=8, **({} if lost else {"vram_mib_0": 24576.0}))]
    nodes += [ray_node("b", alive=False)] if lost else []
    left = {"aaaaaaaa": {"CPU": 8.0} | ({} if lost else {"vram_mib_0": 4096.0})}
    applications = {"m": model(running, wanted, {"CPU": 1, "vram_mib_0": 10240.0})}
    return cluster_status(applications, nodes, left, reports, NOW)


def test_planned_and_held_stand_side_by_side() -> None:
    """With a mark where more is held, and the sum of the card."""
    status = seen(2, 2, told("r0", 9 * GIB), told("r1", 11 * GIB))
    assert status.is_whole
    assert status.models[0].load == 0.5
    lines = [" ".join(line.split()) for line in report(status).splitlines()]
    assert "a GPU 0 m r0 10.00 9.00 9.00 90%" in lines
    assert "a GPU 0 m r1 10.00 11.00 11.00 110%!" in lines
    assert "a GPU 0 in total planned 20.00 GiB, held 20.00 GiB" in lines
    assert lines[-1] == "Every model has its replicas."


def test_each_rank_of_a_replica_has_a_line() -> None:
    """With its number, though all share the memory of the host. A replica of one process has no number."""
    one = told("r0", 9 * GIB).devices[0]
    ranks = tuple(replace(one, device="cpu", index=None, held=size * GIB, rank=rank) for rank, size in ((1, 8), (0, 7)))
    status = seen(2, 2, replace(told("r0", 0), devices=ranks), told("r1", 9 * GIB))
    lines = [" ".join(line.split()) for line in report(status).splitlines()]
    first = lines.index("a memory m r0 0 10.00 7.00 9.00 90%")
    assert lines[first + 1] == "a memory m r0 1 10.00 8.00 9.00 90%"
    assert "a GPU 0 m r1 10.00 9.00 9.00 90%" in lines


def test_what_nobody_tells_is_no_zero() -> None:
    """An unknown figure is a question mark; a replica that is silent, or was long ago, is named."""
    text = report(seen(2, 2, told("r0", 9 * GIB, written_at=NOW - 100), told("r1", 9 * GIB, planned=None)))
    assert "?" in text
    assert "These replicas have not reported for a minute or more: m r0." in text


def test_a_lost_node_is_named_with_what_is_missing() -> None:
    """Its GPU is nowhere else."""
    status = seen(0, 1, lost=True)
    assert not status.is_whole
    text = report(status)
    assert "gone: b (bbbbbbbb): health check failed" in text
    assert "A replica needs 10.00 GiB of GPU 0, 1 CPU on one node, and no living node has it: a: 8 CPUs" in text
    assert text.endswith("Some models have fewer replicas than they should.")


def test_what_others_have_taken_is_told_with_what_is_left() -> None:
    """Ray has the GPU, and not enough of it now."""
    (found,) = seen(1, 2).models
    assert found.missing.endswith(
        "or others use these resources now. The nodes have this left: a: 8 CPUs, GPU 0: 4 GiB."
    )


@pytest.mark.parametrize(
    ("asked", "left", "expected"),
    [
        ({"CPU": 1}, node(cpus=2), ""),  # starting, or about to
        ({"CPU": 4}, node(cpus=2), "or others use these resources now"),
        ({"GPU": 2, "CPU": 1}, node(cpus=2), "no living node has it"),
    ],
)
def test_missing_resources(asked: dict[str, float], left: Node, expected: str) -> None:
    """Room now, room if others went, or no room at all."""
    assert expected in missing_for([asked], [node(cpus=8)], [left])
    assert bool(missing_for([asked], [node(cpus=8)], [left])) == bool(expected)


def test_a_replica_over_nodes_waits_for_all_of_them() -> None:
    """With what it asks of each."""
    asked = [{"CPU": 2.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}]
    cluster = [node(cpus=4, gpus=2), node(cpus=4, gpus=2)]
    assert missing_for(asked, cluster, cluster) == ""
    assert "A replica needs 2 GPUs, 2 CPUs and 1 GPU, 2 CPUs on 2 nodes, and the living nodes do not have it" in (
        missing_for(asked, cluster[:1], cluster[:1])
    )
    assert "is about to start on them" in missing_for(asked, cluster, [cluster[0], node(cpus=4)])


def test_a_kind_of_gpu_that_no_node_has_is_told() -> None:
    """Of any of the nodes, as Ray counts it."""
    kind = {"accelerator_type:L4": 0.001}
    cluster = [Node("a", 4, 2, accelerator_types=("L4",)), Node("b", 4, 2, accelerator_types=("A100",))]
    asked = [{"CPU": 2.0, "GPU": 1.0, **kind}]
    assert missing_for(asked, cluster, cluster) == ""
    assert "A replica needs 1 GPU, accelerator_type L4, 2 CPUs on one node, and no living node has it" in (
        missing_for(asked, cluster[1:], cluster[1:])
    )
    assert "the living nodes do not have it" in missing_for([*asked, *asked], cluster, cluster)


def test_a_replica_that_loads_waits_for_nobody() -> None:
    """It has its GPU already, so Ray has none left."""
    asked = model(0, 1, {"GPU": 1})
    asked["deployments"]["Model"]["replicas"] = [{"replica_id": "r0", "state": "STARTING", "node_ip": "a", "pid": 7}]
    found = cluster_status({"m": asked}, [ray_node("a", CPU=8, GPU=1)], {"aaaaaaaa": {"CPU": 7.0}}, [], NOW)
    assert found.models[0].missing == ""
    assert not found.is_whole


def test_replicas_that_serve_after_a_failed_update_are_shown() -> None:
    """Serve has no deployment of such an application any more; their reports tell of them."""
    failed = {"m": application("DEPLOY_FAILED", 0, "unknown field 'x'.", deployment=None)}
    found = cluster_status(failed, [ray_node("a", CPU=8)], {}, [told("r0", GIB)], NOW)
    assert (found.models[0].running, found.models[0].state) == (1, "ready")
    assert not found.is_whole
    assert "its update failed: unknown field 'x'." in report(found)


def test_a_model_that_is_being_built_has_no_error() -> None:
    """Serve has neither details nor a message of it yet."""
    built = {"m": application("DEPLOYING", 0, "", deployment=None)}
    found = cluster_status(built, [ray_node("a", CPU=8)], {}, [], NOW)
    assert found.models[0].error == ""


def test_a_sum_with_an_unknown_part_is_unknown() -> None:
    """As in containers, where NVML does not tell."""
    unknown = replace(told("r0", 0), devices=(replace(told("r0", 0).devices[0], held=None, peak=None),))
    assert "in total planned 20.00 GiB, held ?" in " ".join(report(seen(2, 2, unknown, told("r1", GIB))).split())


def test_another_number_of_blocks_is_a_line() -> None:
    """Only where both are known and differ."""
    counts = ((90, 90), (90, 89), (None, 5))
    reports = [replace(told(f"r{number}", GIB), blocks=BlocksReport(*pair)) for number, pair in enumerate(counts)]
    text = report(seen(3, 3, *reports))
    assert [line for line in text.splitlines() if "blocks" in line] == [
        "m r1: the plan has 90 blocks of KV cache, and vLLM has made 89."
    ]


def test_adapters_stand_below_their_model_and_a_broken_one_is_told() -> None:
    """With the number of replicas that have each, and why one has none."""
    applications = {"m": model(2, 2, {"CPU": 1})}
    applications["m"]["deployed_app_config"] = {"import_path": "serve_app.app:model", "args": {"adapters": {"x": "/x"}}}
    failed = AdapterState("failed", "its rank is 64")
    records = {("m", "r0"): {"sql": AdapterState("ready"), "bad": failed}, ("m", "r1"): {"bad": failed}}
    nodes = [ray_node("a", CPU=8)]
    status = cluster_status(applications, nodes, {"aaaaaaaa": {"CPU": 8.0}}, (), NOW, records=records)
    lines = [line.strip() for line in report(status).splitlines()]
    assert "adapter sql is ready on 1 of 2 replicas" in lines
    assert "adapter bad is failed: its rank is 64" in lines
    assert "adapter x is loading" in lines
    assert not status.is_whole
    assert lines[-1] == "These adapters cannot be served: bad of m."
    assert {one["name"]: one["replicas"] for one in status.to_json()["models"][0]["adapters"]} == {
        "bad": 0, "sql": 1, "x": 0,
    }  # fmt: skip


def test_what_was_not_measured_is_called_a_guess() -> None:
    """How long a replica of a pool takes to come back, until it has done so once."""
    parked = ResidencyReport("parked", "default", 2.0, is_guess=True)
    stopped = ResidencyReport("stopped", "default", 31.26)
    reports = [
        replace(told(f"r{number}", GIB), residency=residency) for number, residency in enumerate((parked, stopped))
    ]
    lines = [line.strip() for line in report(seen(2, 2, *reports)).splitlines()]
    assert "r0 is parked in pool 'default', and back in about 2.0 s (a guess, not measured yet)" in lines
    assert "r1 is stopped in pool 'default', and back in about 31.3 s" in lines
