"""Ray Serve's options for a model."""

from serve_app.deploy.options import OUTER_DOOR, model_options, replica_environment, router_options
from serve_app.engines.pt.engine import DEFAULT_MAX_NUM_SEQS, DEFAULT_MAX_QUEUED_REQUESTS
from serve_app.facts.torch_allocator import without_allocator
from serve_app.planning.resource_demand import Demand, demands_of
from tests.builders import model_config

CPU = model_config(device="cpu")


def test_a_cpu_replica_sees_no_gpu_and_uses_its_cpus() -> None:
    """Torch must not find a GPU that belongs to another model."""
    variables = replica_environment(model_config(device="cpu", num_cpus=2), Demand(cpus=2), {})
    assert (variables["CUDA_VISIBLE_DEVICES"], variables["OMP_NUM_THREADS"]) == ("", "2")


def test_the_ranks_of_vllm_share_the_cpus() -> None:
    """Each rank is a process with so many threads, and has one at least."""
    for cpus, threads in ((8.0, "2"), (4.0, "1"), (1.0, "1")):
        config = model_config(
            infer_backend="vllm", device="cpu", pipeline_layers=[1, 3], tensor_parallel_size=2, num_cpus=cpus
        )
        assert replica_environment(config, Demand(cpus=cpus), {})["OMP_NUM_THREADS"] == threads


def test_vllm_chooses_its_threads_on_gpus_of_one_node() -> None:
    """It takes a variable for the user's own choice. pt and ranks on several nodes have no such choice."""
    for fields, is_set in (
        ({"infer_backend": "vllm"}, False),
        ({"infer_backend": "pt"}, True),
        ({"infer_backend": "vllm", "device": "cpu"}, True),
    ):
        variables = replica_environment(model_config(**fields), Demand(cpus=1), {})
        assert ("OMP_NUM_THREADS" in variables) is is_set


def test_memory_by_index_shows_exactly_those_gpus() -> None:
    """With `num_gpus=0` Ray leaves CUDA_VISIBLE_DEVICES alone, so it is set here, in NVML's order."""
    demand = Demand(cpus=1, vram_gib={3: 1.0, 1: 2.0})
    variables = replica_environment(model_config(max_memory={1: "2GiB", 3: "1GiB"}), demand, {})
    assert (variables["CUDA_VISIBLE_DEVICES"], variables["CUDA_DEVICE_ORDER"]) == ("1,3", "PCI_BUS_ID")


def test_whole_gpus_are_chosen_by_ray() -> None:
    """Ray sets CUDA_VISIBLE_DEVICES itself."""
    assert "CUDA_VISIBLE_DEVICES" not in replica_environment(model_config(), Demand(1, gpus=1), {})


def test_the_users_own_variables_stay_but_not_over_the_placement() -> None:
    """The replica sets what is missing, and the GPUs in any case."""
    own = {"OMP_NUM_THREADS": "7", "A": "1", "CUDA_VISIBLE_DEVICES": "5"}
    assert replica_environment(CPU, Demand(cpus=1), own) == {
        "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"
    }  # fmt: skip


def test_only_pt_on_the_cpu_bounds_what_onednn_keeps() -> None:
    """vLLM's shapes are few, and a GPU makes no products there."""
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    assert name not in replica_environment(CPU.model_copy(update={"infer_backend": "vllm"}), Demand(cpus=1), {})
    assert name not in replica_environment(model_config(), Demand(1, gpus=1), {})
    assert name not in replica_environment(CPU, Demand(cpus=1), {name: "1024"})


def test_buffers_of_pt_on_a_gpu_grow_in_place_unless_the_user_has_set_the_allocator() -> None:
    """Either name is the user's. vLLM's sleep mode has settings of its own, and the CPU has no such allocator."""
    name, whole = "PYTORCH_ALLOC_CONF", Demand(1, gpus=1)
    assert replica_environment(model_config(), whole, {})[name] == "expandable_segments:True"
    for own in (name, "PYTORCH_CUDA_ALLOC_CONF"):
        assert name not in replica_environment(model_config(), whole, {own: "max_split_size_mb:64"})
        assert without_allocator({name: "a", "B": "1"}, {own: "b"}) == {"B": "1"}
    assert without_allocator({name: "a"}, {"C": "1"}) == {name: "a"}
    for config in (CPU, model_config(infer_backend="vllm")):
        assert name not in replica_environment(config, Demand(cpus=1), {})


def test_the_applications_runtime_env_is_kept() -> None:
    """Serve would drop it."""
    own = {"env_vars": {"OMP_NUM_THREADS": "7", "A": "1"}, "working_dir": "w"}
    runtime_env = model_options(CPU, Demand(cpus=1), own, {})["ray_actor_options"]["runtime_env"]
    assert runtime_env["working_dir"] == "w"
    assert runtime_env["env_vars"].items() >= own["env_vars"].items()


def test_a_replica_needs_no_process_of_its_own_where_the_node_has_the_door() -> None:
    """Ray has started processes in advance, which only an actor without a `runtime_env` can take."""
    for options in (model_options(CPU, Demand(cpus=1), {}, OUTER_DOOR), router_options({}, OUTER_DOOR)):
        assert "runtime_env" not in options["ray_actor_options"]


def test_serve_lets_in_more_than_the_engine_takes() -> None:
    """So the engine's own queue is what fills up, and its 429 tells the measured rate."""
    for rows, queued in ((None, None), (512, None), (8, 1000)):
        config = model_config(device="cpu", max_num_seqs=rows, max_queued_requests=queued)
        taken = (rows or DEFAULT_MAX_NUM_SEQS) + (queued or DEFAULT_MAX_QUEUED_REQUESTS)
        assert model_options(config, Demand(cpus=1), {})["max_ongoing_requests"] > taken


def test_no_queue_of_serves_is_without_a_bound() -> None:
    """Serve's default is any number of requests, each with its body."""
    for options in (model_options(CPU, Demand(cpus=1), {}), router_options({})):
        assert 0 < options["max_queued_requests"] <= 1024


def test_the_door_is_before_serve_in_every_replica() -> None:
    """Whatever the file's own variables are; the router keeps its application's runtime_env too."""
    own = {"env_vars": {"A": "1"}, "working_dir": "w"}
    for inherited in ({}, OUTER_DOOR):
        for options in (model_options(CPU, Demand(cpus=1), own, inherited), router_options(own, inherited)):
            runtime_env = options["ray_actor_options"]["runtime_env"]
            assert runtime_env["working_dir"] == "w"
            assert runtime_env["env_vars"].items() >= {"A": "1", **OUTER_DOOR}.items()
    for options in (model_options(CPU, Demand(cpus=1), {}, {}), router_options({}, {})):
        assert options["ray_actor_options"]["runtime_env"] == {"env_vars": OUTER_DOOR}


def test_a_replica_over_nodes_has_a_bundle_for_each() -> None:
    """Its own process takes no GPU of the first one, because the ranks do, which are told their bundles."""
    config = model_config(infer_backend="vllm", tensor_parallel_size=2, pipeline_parallel_size=3, nnodes=2, num_cpus=4)
    (demand,) = demands_of(config, [])
    options = model_options(config, demand, {}, {})
    assert options["placement_group_bundles"] == [{"CPU": 4, "GPU": 4}, {"CPU": 4, "GPU": 2}]
    assert options["placement_group_strategy"] == "STRICT_SPREAD"
    assert (options["ray_actor_options"]["num_cpus"], options["ray_actor_options"]["num_gpus"]) == (4, 0)
    variables = replica_environment(config, demand, {})
    assert variables["VLLM_RAY_BUNDLE_INDICES"] == "0,0,0,0,1,1"
    assert variables["OMP_NUM_THREADS"] == "1"  # Four ranks share the four CPUs of the first node.


def test_a_replica_on_one_node_has_no_placement_group() -> None:
    """Serve places it as before."""
    config = model_config(infer_backend="vllm", pipeline_parallel_size=2)
    (demand,) = demands_of(config, [])
    assert "placement_group_bundles" not in model_options(config, demand, {}, {})
    assert "VLLM_RAY_BUNDLE_INDICES" not in replica_environment(config, demand, {})
