"""What a replica asks of Ray, and whether a cluster can give it."""

from dataclasses import replace

import pytest

from serve_app.config import ModelConfig
from serve_app.errors import PlacementError
from serve_app.facts.nodes import Node, node_from_resources
from serve_app.planning.resource_demand import Demand, demands_of, require_replicas, require_room
from tests.builders import model_config, node


def first_demand(config: ModelConfig, nodes: list[Node]) -> Demand:
    """The better way to ask."""
    return demands_of(config, nodes)[0]


WHOLE = [node(gpus=2)]
BY_INDEX = [node(vram_gib={0: 8, 1: 24})]


def test_a_cpu_model_asks_for_no_gpu() -> None:
    """`device: cpu` runs on any node."""
    demand = first_demand(model_config(device="cpu", num_cpus=2), WHOLE)
    assert (demand.cpus, demand.gpus, demand.resources) == (2, 0, {})


def test_vllm_asks_for_as_many_whole_gpus_as_its_parallel_size() -> None:
    """One GPU without `tensor_parallel_size`."""
    assert first_demand(model_config(infer_backend="vllm", tensor_parallel_size=2), WHOLE).gpus == 2
    stages = model_config(infer_backend="vllm", tensor_parallel_size=2, pipeline_layers=[1, 3])
    assert first_demand(stages, WHOLE).gpus == 4
    assert first_demand(model_config(infer_backend="vllm"), WHOLE).gpus == 1


def test_pt_asks_for_one_whole_gpu_for_each_that_max_memory_names() -> None:
    """Where nodes have whole GPUs to give, the replica counts its own from 0."""
    demand = first_demand(model_config(max_memory={0: "3GB", 1: "10GB"}), WHOLE)
    assert (demand.gpus, demand.resources) == (2, {})


def test_pt_asks_for_memory_by_index_where_nodes_advertise_it() -> None:
    """3 GB are 2861.02 MiB, and `ray start` takes whole numbers only, so it is rounded up."""
    demand = first_demand(model_config(max_memory={0: "3GB", 1: "10GiB"}), BY_INDEX)
    assert demand.gpus == 0
    assert demand.resources == {"vram_mib_0": 2862.0, "vram_mib_1": 10240.0}


def test_a_share_of_a_gpu_is_passed_to_ray() -> None:
    """`num_gpus` below 1 is Ray's own fraction."""
    assert first_demand(model_config(num_gpus=0.3), WHOLE).gpus == 0.3


def test_gpu_numbers_of_whole_gpus_start_at_zero() -> None:
    """GPU 1 alone can only be meant where nodes advertise memory by index."""
    with pytest.raises(PlacementError, match="counts its own from 0"):
        first_demand(model_config(max_memory={1: "3GB"}), WHOLE)
    assert first_demand(model_config(max_memory={1: "3GB"}), BY_INDEX).resources == {"vram_mib_1": 2862.0}


def test_what_no_node_has_is_refused_with_both_figures() -> None:
    """The message says what is needed, why, and what the cluster has."""
    config = model_config(infer_backend="vllm", tensor_parallel_size=4)
    with pytest.raises(PlacementError) as caught:
        require_room(config, [node("10.0.0.1", gpus=2), node("10.0.0.2", gpus=2)])
    message = str(caught.value)
    assert "needs 4 GPUs, 1 CPU on one node (vllm, tensor_parallel_size: 4)" in message
    assert "10.0.0.1: 8 CPUs, 2 GPUs; 10.0.0.2: 8 CPUs, 2 GPUs" in message
    assert "device: cpu" not in message


def test_a_cluster_without_gpus_gets_the_cure() -> None:
    """On a laptop the way out is the CPU."""
    with pytest.raises(PlacementError, match=r"max_memory: \{0: 3GB, 1: 10GB\}.*set device: cpu"):
        require_room(model_config(max_memory={0: "3GB", 1: "10GB"}), [node()])


def test_memory_by_index_must_be_there() -> None:
    """A GPU that is too small is not enough, even if another is large."""
    with pytest.raises(PlacementError, match=r"9.31 GiB of GPU 0.*GPU 0: 8 GiB, GPU 1: 24 GiB"):
        require_room(model_config(max_memory={0: "10GB"}), BY_INDEX)
    assert require_room(model_config(max_memory={1: "10GB"}), BY_INDEX)


def test_a_mixed_cluster_is_asked_in_the_way_that_fits() -> None:
    """One small node with memory by index must not hide a large one with whole GPUs."""
    nodes = [node("small", vram_gib={0: 8, 1: 8}), node("large", gpus=2)]
    assert require_room(model_config(max_memory={0: "20GB", 1: "20GB"}), nodes).gpus == 2
    assert require_room(model_config(max_memory={0: "2GB", 1: "2GB"}), nodes).vram_gib


def test_a_type_of_gpu_ties_a_model_to_its_nodes() -> None:
    """As Ray's own option does, with a little of the resource that Ray gives each node."""
    tied = model_config(infer_backend="vllm", accelerator_type="L4")
    nodes = [node_from_resources("n1", {"CPU": 8, "GPU": 2, "accelerator_type:L4": 1.0})]
    demand = require_room(tied, nodes)
    assert demand.resources == {"accelerator_type:L4": 0.001}
    with pytest.raises(PlacementError, match=r"needs 1 GPU, accelerator_type A100, 1 CPU on one node .*2 GPUs \(L4\)"):
        require_room(model_config(infer_backend="vllm", accelerator_type="A100"), nodes)


@pytest.mark.parametrize(
    ("demand", "most"),
    [
        (Demand(1), 16),
        (Demand(0.1), 160),
        (Demand(3), 4),
        (Demand(1, gpus=1), 2),
        (Demand(1, gpus=2), 1),
        (Demand(0.1, gpus=0.3), 6),
        (Demand(0.1, gpus=0.6), 2),
        (Demand(1, vram_gib={0: 3}), 2),
        (Demand(1, vram_gib={0: 3, 1: 13}), 1),
        (Demand(1, gpus=1, accelerator_type="L4"), 0),
    ],
)
def test_a_cluster_holds_so_many_replicas(demand: Demand, most: int) -> None:
    """Node by node, because a replica is on one node, and a fraction on one GPU. One more is refused."""
    nodes = [node("a", cpus=8, gpus=2), node("b", cpus=8, vram_gib={0: 8, 1: 24})]
    require_replicas(demand, most, nodes)
    with pytest.raises(PlacementError, match=f"is {most + 1}, .* the cluster holds {most} of them at most"):
        require_replicas(demand, most + 1, nodes)


def over_nodes(*gpus: int, cpus: float = 1) -> Demand:
    """What a replica with so many GPUs on each of several nodes asks."""
    first, *others = (Demand(cpus, float(count), ranks=count) for count in gpus)
    return replace(first, elsewhere=tuple(others))


def test_vllm_over_nodes_asks_for_whole_stages_on_each() -> None:
    """The first node has one more if they do not come out even."""
    config = model_config(infer_backend="vllm", tensor_parallel_size=2, pipeline_parallel_size=3, nnodes=2)
    demand = first_demand(config, WHOLE)
    assert demand == over_nodes(4, 2)
    assert demand.bundles == [{"CPU": 1, "GPU": 4}, {"CPU": 1, "GPU": 2}]
    assert str(demand) == "4 GPUs, 1 CPU and 2 GPUs, 1 CPU"


def test_stages_over_nodes_on_the_cpu_ask_for_cpus_of_each() -> None:
    """`num_cpus` is what the replica takes on each node."""
    config = model_config(infer_backend="vllm", device="cpu", pipeline_parallel_size=2, nnodes=2, num_cpus=3)
    assert first_demand(config, WHOLE).bundles == [{"CPU": 3}, {"CPU": 3}]


@pytest.mark.parametrize(
    ("gpus", "cluster", "fits", "most"),
    [
        ((2, 2), (2, 2), True, 1),
        ((2, 2), (4,), False, 0),  # One node is not two.
        ((2, 1), (1, 2), True, 1),  # Whichever node has more.
        ((2, 2), (2, 1), False, 0),
        ((1, 1), (4, 4), True, 4),
        ((1, 1), (8, 1), True, 1),
        ((1, 1, 1), (2, 2, 2), True, 2),
        ((1, 1), (3, 2, 1), True, 3),
    ],
)
def test_each_part_needs_a_node_of_its_own(
    gpus: tuple[int, ...], cluster: tuple[int, ...], fits: bool, most: int
) -> None:
    """Ray's strategy is STRICT_SPREAD."""
    nodes = [node(cpus=16, gpus=count) for count in cluster]
    demand = over_nodes(*gpus)
    assert demand.fits(nodes) is fits
    if fits:
        assert demand.most_on(nodes) == most


def test_nodes_that_lack_gpus_are_named() -> None:
    """With what the replica needs on each."""
    config = model_config(infer_backend="vllm", pipeline_parallel_size=4, nnodes=2)
    with pytest.raises(PlacementError, match=r"needs 2 GPUs, 1 CPU and 2 GPUs, 1 CPU on 2 nodes .*the nodes do not"):
        require_room(config, [node(gpus=8)])
    kind = model_config(infer_backend="vllm", pipeline_parallel_size=4, nnodes=2, accelerator_type="L4")
    tied = require_room(kind, [replace(node(gpus=2), accelerator_types=("L4",))] * 2)
    assert [part.accelerator_type for part in tied.parts] == ["L4", "L4"]
