"""One replica of vLLM over several nodes: which nodes it could have, which stages they get, and what is refused."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.facts.inventory import Device, Inventory, parse_gpus
from serve_app.planning.fixes import with_fixes
from serve_app.planning.node_seats import host_seats, node_seats
from serve_app.planning.plan import ModelPlan
from serve_app.planning.planner import make_plan
from serve_app.planning.resolve import resolve
from tests.planning.model_requests import request

GIB = 2**30


def asked(**config: Any) -> ModelConfig:
    """A config of a pipeline."""
    return ModelConfig.from_args({"model": "m", "infer_backend": "vllm", **config})


def free(gpus: str) -> dict[str, list[tuple[Device, int]]]:
    """The GPUs of each node, all unused."""
    nodes = parse_gpus(gpus).node_gpus()
    return {name: [(gpu, gpu.free_bytes) for gpu in found] for name, found in nodes.items()}


def counts(config: ModelConfig, gpus: str) -> list[dict[str, int]]:
    """How many GPUs of each node the sets have."""
    return [dict(Counter(gpu.node for gpu, _ in seats)) for seats in node_seats(config, free(gpus))]


def planned(gpus: str, shape: str = "qwen2-7b", **config: Any) -> ModelPlan:
    """The plan of one replica that fits."""
    made = request(shape, infer_backend="vllm", max_model_len=4096, **config)
    plan = make_plan([made], replace(parse_gpus(gpus), calibrations={}))
    assert plan.fits, plan.problems
    return plan.models[0]


def problem(gpus: str, **config: Any) -> str:
    """Why a replica has no place."""
    made = request("qwen2-7b", infer_backend="vllm", max_model_len=4096, **config)
    plan = make_plan([made], replace(parse_gpus(gpus), calibrations={}))
    return plan.problems[0].message


def test_each_node_has_whole_stages_of_equal_gpus() -> None:
    """Two stages of two: one on each node, never three GPUs on one and one on the other."""
    config = asked(tensor_parallel_size=2, pipeline_parallel_size=2, nnodes=2)
    assert counts(config, "3x24GiB;3x24GiB") == [{"n1": 2, "n2": 2}]
    assert counts(config, "4x24GiB;1x24GiB") == []
    assert counts(config, "2x24GiB,8GiB;2x24GiB;2x16GiB") == [{"n2": 2, "n3": 2}]


def test_every_node_has_at_least_one_stage() -> None:
    """The others go to where there is room, in all ways."""
    config = asked(pipeline_parallel_size=4, nnodes=2)
    assert counts(config, "4x24GiB;2x16GiB") == [{"n1": 3, "n2": 1}, {"n1": 2, "n2": 2}]


def test_nodes_that_are_alike_are_tried_once() -> None:
    """A hundred of them cost no more than two."""
    config = asked(pipeline_parallel_size=2, nnodes=2)
    assert counts(config, ";".join(["8x24GiB"] * 100)) == [{"n1": 1, "n2": 1}]


def test_hosts_have_a_rank_for_each_of_their_stages() -> None:
    """The one with most memory free has one more, and the ranks of a host share what is free there."""
    hosts = [(Device(name, None, "memory", GIB, GIB), size) for name, size in (("n1", 10), ("n2", 30), ("n3", 20))]
    (seats,) = host_seats(asked(device="cpu", pipeline_parallel_size=3, nnodes=2), hosts)
    assert [(device.node, size) for device, size in seats] == [("n2", 15), ("n2", 15), ("n3", 20)]
    assert list(host_seats(asked(device="cpu", pipeline_parallel_size=4, nnodes=4), hosts)) == []


def test_the_stages_of_a_node_stay_together() -> None:
    """So each link between nodes is used once for a token, and the plan says what goes over it."""
    model = planned("2x24GiB;2x16GiB", pipeline_parallel_size=4, nnodes=2)
    nodes = [rank.device.node for rank in model.ranks]
    assert nodes in (["n1", "n1", "n2", "n2"], ["n2", "n2", "n1", "n1"])
    assert sum(model.pipeline_layers) == 28
    # 3584 elements of hidden states and as many of the residual, of two bytes each.
    assert any("up to 14 KiB for each token go over the network" in reason for reason in model.reasons)


def test_the_better_order_of_the_nodes_is_taken() -> None:
    """The larger cards get more layers, whichever node was written first."""
    one, other = (
        planned("24GiB;12GiB", pipeline_parallel_size=2, nnodes=2),
        planned("12GiB;24GiB", pipeline_parallel_size=2, nnodes=2),
    )
    assert one.kv_tokens == other.kv_tokens
    assert one.pipeline_layers == other.pipeline_layers
    by_size = {rank.device.total_bytes: layers for rank, layers in zip(one.ranks, one.pipeline_layers, strict=True)}
    assert by_size[24 * GIB] > by_size[12 * GIB]


def test_layers_that_are_set_stay() -> None:
    """The order of the nodes is free, and the numbers of layers keep theirs."""
    assert planned("24GiB;12GiB", pipeline_layers=[8, 20], nnodes=2).pipeline_layers == (8, 20)


def test_two_replicas_take_different_gpus() -> None:
    """Each goes over both nodes."""
    made = replace(request("qwen2-7b", infer_backend="vllm", max_model_len=4096, pipeline_parallel_size=2, nnodes=2),
                   replicas=2)  # fmt: skip
    plan = make_plan([made], replace(parse_gpus("2x24GiB;2x24GiB"), calibrations={}))
    assert plan.fits
    assert sorted(rank.device.id for model in plan.models for rank in model.ranks) == ["n1:0", "n1:1", "n2:0", "n2:1"]


def test_the_demand_has_a_part_for_each_node() -> None:
    """In the order of the plan's stages."""
    made = request("qwen2-7b", infer_backend="vllm", max_model_len=4096, pipeline_parallel_size=3, nnodes=2)
    inventory = parse_gpus("2x24GiB;1x24GiB")
    whole = Inventory(tuple(replace(device, by_index=False) for device in inventory.devices))
    demand = resolve(made, whole).demand
    assert sorted((part.gpus, part.ranks) for part in demand.parts) == [(1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("gpus", "config", "said"),
    [
        ("4x24GiB", {"pipeline_parallel_size": 2, "nnodes": 2}, "2 nodes are needed"),
        ("24GiB,16GiB;24GiB", {"pipeline_parallel_size": 2, "nnodes": 2}, "n1 has GPUs of several kinds"),
        ("2x24GiB;2x24GiB", {"pipeline_parallel_size": 4}, "Set nnodes to have stages on several nodes"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(gpus: str, config: dict[str, Any], said: str) -> None:
    """And with what would do."""
    assert said in problem(gpus, **config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"nnodes": 2}, "Set pipeline_parallel_size: 2 or more"),
        ({"nnodes": 2, "tensor_parallel_size": 2}, "at least one stage"),
        (
            {"nnodes": 2, "pipeline_parallel_size": 2, "max_memory": {0: "3GB", 1: "3GB"}},
            "max_memory names GPUs of one",
        ),
        ({"nnodes": 2, "pipeline_parallel_size": 2, "gpu_ids": [0, 1]}, "gpu_ids names GPUs of one node"),
        ({"nnodes": 2, "infer_backend": "pt"}, "nnodes: pt places whole layers on one node"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(config: dict[str, Any], said: str) -> None:
    """Before anything is planned."""
    with pytest.raises(ConfigError, match=said):
        asked(**config)


def test_another_node_is_a_fix_where_one_has_too_little() -> None:
    """With what it costs, and before a shorter context or other weights."""
    made = request("llama-3.1-8b", infer_backend="vllm", max_model_len=65536)
    inventory = replace(parse_gpus("16GiB;16GiB"), calibrations={})
    found = with_fixes(make_plan([made], inventory), [made], inventory)
    (first, *_) = [fix for fix in found.problems[0].fixes if "nnodes" in fix.text]
    assert first.text == "nnodes: 2, pipeline_parallel_size: 2"
    assert "time for each token on the network between 2 nodes" in first.loses
    cheaper = [fix for fix in found.problems[0].fixes if fix.price < first.price]
    assert all("max_model_len" not in fix.text for fix in cheaper)
