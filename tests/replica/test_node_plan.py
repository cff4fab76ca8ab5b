"""The plan of a replica over several nodes, made on those that Ray chose."""

from dataclasses import replace
from typing import Any

import pytest

from serve_app.config import ModelConfig
from serve_app.errors import EngineError
from serve_app.facts.inventory import Device, Inventory
from serve_app.replica import node_plan
from serve_app.replica.node_plan import bundle_order, given_devices, name_of, plan_over_nodes
from tests.planning.model_requests import CONFIGS

GIB = 2**30


def node(bundle: int, *gib: int, free: tuple[int, ...] | None = None) -> Inventory:
    """What a node sees: its GPUs and its memory."""
    pairs = zip(gib, free or gib, strict=True)
    gpus = [Device(name_of(bundle), n, "GPU", size * GIB, left * GIB, False) for n, (size, left) in enumerate(pairs)]
    return Inventory((*gpus, Device(name_of(bundle), None, "memory", 64 * GIB, 64 * GIB)))


def planned(monkeypatch: pytest.MonkeyPatch, nodes: list[Inventory], gpus: list[int], **fields: Any) -> Any:
    """The plan of a replica with so many GPUs in the bundle of each node."""
    bundles = [(f"id-{number}", {"CPU": 1.0, "GPU": float(count)}) for number, count in enumerate(gpus)]
    monkeypatch.setattr(node_plan, "own_bundles", lambda: bundles)
    asked: list[dict[str, str]] = []

    def seen(names: dict[str, str]) -> list[Inventory]:
        asked.append(names)
        return nodes

    monkeypatch.setattr(node_plan, "seen_on_nodes", seen)
    config = ModelConfig.from_args(
        {"model": str(CONFIGS / "qwen2-7b"), "infer_backend": "vllm", "max_model_len": 4096, **fields}
    )
    found = plan_over_nodes(config, None)
    assert asked == [{"node 0": "id-0", "node 1": "id-1"}]
    return found


def test_stages_are_solved_for_the_nodes_that_ray_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the smaller one has the first bundle. vLLM is told which bundle each rank is in."""
    found = planned(monkeypatch, [node(0, 12), node(1, 24)], [1, 1], pipeline_parallel_size=2, nnodes=2)
    sizes = [rank.device.total_bytes // GIB for rank in found.ranks]
    by_size = dict(zip(sizes, found.pipeline_layers, strict=True))
    assert by_size[24] > by_size[12]
    assert bundle_order(found) == {"VLLM_RAY_BUNDLE_INDICES": "0,1" if sizes == [12, 24] else "1,0"}


def test_a_node_gives_as_many_gpus_as_its_bundle_has() -> None:
    """Those with most memory free, because others run on the rest."""
    devices = given_devices([node(0, 24, 24, 24, free=(2, 23, 24))], [2])
    assert [device.index for device in devices if device.is_gpu] == [2, 1]
    assert [device.name for device in devices if not device.is_gpu] == ["memory"]


def test_a_node_with_two_stages_has_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are in its bundle."""
    found = planned(monkeypatch, [node(0, 24, 24), node(1, 24)], [2, 1], pipeline_parallel_size=3, nnodes=2)
    (order,) = bundle_order(found).values()
    assert sorted(order.split(",")) == ["0", "0", "1"]


def test_nodes_that_hold_too_little_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray does not look at sizes, and vLLM would run out of memory."""
    with pytest.raises(EngineError, match="too much"):
        planned(monkeypatch, [node(0, 6), node(1, 6)], [1, 1], pipeline_parallel_size=2, nnodes=2)


def test_without_a_plan_the_bundles_stay_in_their_order() -> None:
    """The builder has set them."""
    assert bundle_order(None) == {}


def test_hosts_are_planned_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage on each."""
    nodes = [replace(node(0), calibrations={}), node(1)]
    found = planned(
        monkeypatch, nodes, [0, 0], pipeline_layers=[8, 20], nnodes=2, device="cpu", kv_cache_memory_bytes="2GiB"
    )
    assert [rank.device.id for rank in found.ranks] == ["node 0:cpu", "node 1:cpu"]
