"""The plan of a replica over several nodes, made on what its bundles have."""

from typing import Any

import pytest

from serve_app.config import ModelConfig
from serve_app.engines.rank_memory import RankMemory
from serve_app.errors import EngineError
from serve_app.facts.gpus import Gpu
from serve_app.facts.inventory import BundleView, Device
from serve_app.planning.plan import ModelPlan
from serve_app.replica.memory_watch import require_own_gpus, with_plans
from serve_app.replica.node_plan import bundle_order, gpus_of, name_of, plan_over_nodes
from serve_app.replica.replica_plan import with_planned_memory
from tests.planning.model_requests import CONFIGS

GIB = 2**30


def view(bundle: int, *gib: int, first: int = 0) -> BundleView:
    """What a bundle has: GPUs of these sizes, whose numbers on the node begin with `first`, and its node's memory."""
    gpus = tuple(
        Gpu(number, f"GPU-{bundle}-{number}", f"{size}GiB", size * GIB, size * GIB)
        for number, size in enumerate(gib, first)
    )
    return BundleView(name_of(bundle), Device("there", None, "memory", 64 * GIB, 64 * GIB), gpus)


def planned(views: list[BundleView], **fields: Any) -> ModelPlan:
    """The plan of a replica that fits."""
    config = ModelConfig.from_args(
        {"model": str(CONFIGS / "qwen2-7b"), "infer_backend": "vllm", "max_model_len": 4096, **fields}
    )
    found = plan_over_nodes(config, views, None)
    assert found is not None
    return found


def test_stages_are_solved_for_the_gpus_that_ray_chose() -> None:
    """Here the smaller one has the first bundle. vLLM is told which bundle each rank is in."""
    found = planned([view(0, 12), view(1, 24)], pipeline_parallel_size=2, nnodes=2)
    sizes = [rank.device.total_bytes // GIB for rank in found.ranks]
    by_size = dict(zip(sizes, found.pipeline_layers, strict=True))
    assert by_size[24] > by_size[12]
    assert bundle_order(found) == {"VLLM_RAY_BUNDLE_INDICES": "0,1" if sizes == [12, 24] else "1,0"}


def test_the_gpus_of_a_plan_are_numbered_over_all_nodes() -> None:
    """By their places among the GPUs of the replica, as in a replica on one node, so that their UUIDs are known."""
    views = [view(0, 24, 24, first=2), view(1, 24, first=5)]
    found = planned(views, pipeline_parallel_size=3, nnodes=2)
    gpus = gpus_of(views)
    named = {(rank.device.node, gpus[rank.device.index or 0].uuid) for rank in found.ranks}
    assert named == {("node 0", "GPU-0-2"), ("node 0", "GPU-0-3"), ("node 1", "GPU-1-5")}
    (order,) = bundle_order(found).values()
    assert sorted(order.split(",")) == ["0", "0", "1"]


def measured(uuid: str, pid: int = 1, node: str = "") -> RankMemory:
    """What a rank reports."""
    return RankMemory(uuid, pid, GIB, GIB, GIB, 2 * GIB, 2 * GIB, 0, node)


def test_each_rank_over_nodes_is_on_the_gpu_of_its_stage() -> None:
    """Equal pids on two nodes are different processes."""
    views = [view(0, 24), view(1, 24)]
    found, gpus = planned(views, pipeline_parallel_size=2, nnodes=2), gpus_of(views)
    order = [gpus[rank.device.index or 0].uuid for rank in found.ranks]
    ranks = [measured(uuid, 7, f"10.0.0.{number}") for number, uuid in enumerate(order)]
    require_own_gpus(ranks, gpus, found)
    assert [plan for _, plan in with_plans(ranks, found, gpus)] == list(found.ranks)
    with pytest.raises(EngineError, match="the stages of the pipeline run on"):
        require_own_gpus(ranks[::-1], gpus, found)
    with pytest.raises(EngineError, match="but Ray gave it"):
        require_own_gpus([measured("GPU-9"), ranks[1]], gpus, found)


def test_gpus_of_several_kinds_on_one_node_are_refused() -> None:
    """The plan has no stages there."""
    with pytest.raises(EngineError, match="GPUs of several kinds"):
        planned([view(0, 24, 8), view(1, 24)], pipeline_parallel_size=3, nnodes=2)


def test_nodes_that_hold_too_little_are_an_error() -> None:
    """Ray does not look at sizes, and vLLM would run out of memory."""
    with pytest.raises(EngineError, match="too much"):
        planned([view(0, 6), view(1, 6)], pipeline_parallel_size=2, nnodes=2)


def test_without_a_plan_the_bundles_stay_in_their_order() -> None:
    """The builder has set them. GPUs that NVML does not see are not planned."""
    assert bundle_order(None) == {}
    config = ModelConfig.from_args(
        {"model": str(CONFIGS / "qwen2-7b"), "infer_backend": "vllm", "pipeline_parallel_size": 2, "nnodes": 2}
    )
    assert plan_over_nodes(config, [view(0), view(1, 24)], None) is None


def test_hosts_are_planned_as_well() -> None:
    """One stage on each."""
    found = planned([view(0), view(1)], pipeline_layers=[8, 20], nnodes=2, device="cpu", kv_cache_memory_bytes="2GiB")
    assert sorted(rank.device.id for rank in found.ranks) == ["node 0:cpu", "node 1:cpu"]


def named(bundle: int, name: str, gib: int) -> BundleView:
    """What a bundle with one card of that name has."""
    gpu = Gpu(0, f"GPU-{bundle}", name, gib * GIB, gib * GIB)
    return BundleView(name_of(bundle), Device("there", None, "memory", 64 * GIB, 64 * GIB), (gpu,))


@pytest.mark.parametrize(("other", "dtype"), [("Tesla T4", "float16"), ("NVIDIA L4", "auto")])
def test_what_vllm_would_take_from_one_card_is_written_over_nodes(other: str, dtype: str) -> None:
    """The engine's process sees a card of the replica's node, which need not be one of the ranks'."""
    found = planned([named(0, "NVIDIA L4", 24), named(1, other, 16)], pipeline_parallel_size=2, nnodes=2)
    config = with_planned_memory(found.config, found)
    assert config.dtype == dtype
    assert config.max_num_seqs == 256
    assert config.vllm_args["max_num_batched_tokens"] == 2048
