"""What `vllm_node_executor.py` uses of vLLM's Ray executor is there, and means what it meant.

`tests/cluster/test_nodes.py` runs it.
"""

import inspect
import time
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():  # Importing vLLM brings those of its libraries.
    warnings.simplefilter("ignore")
    from serve_app.engines.vllm import vllm_node_executor
    from serve_app.engines.vllm.vllm_node_executor import (
        NodeExecutor,
        NodeRank,
        bundles_of_ranks,
        interface_of,
        share_memory_within_node,
    )

from serve_app.planning.resource_demand import BUNDLES
from tests.contracts.contract import contract, untested

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@contract("vllm", "its Ray executor", NodeExecutor)
def test_the_executor_starts_by_the_names_that_are_replaced() -> None:
    """Otherwise vLLM's own would run: it refuses bundles with several GPUs, and the CPU."""
    from vllm.v1.executor import ray_executor_v2

    starts = inspect.getsource(ray_executor_v2.RayExecutorV2._init_executor)
    for part in ("initialize_ray_cluster(self.", "ray.remote(RayWorkerProc)", "= get_bundles_for_indices(",
                 "self._build_runtime_env()",
                 "self._get_actor_resource_kwargs()"):  # fmt: skip
        assert part in starts, part
    assert NodeExecutor.uses_ray is NodeExecutor.supports_pp is True


@contract("vllm", "the bundles of its ranks", bundles_of_ranks)
def test_the_bundle_of_each_rank_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranks may have the same one."""
    from vllm import envs
    from vllm.v1.executor import ray_utils

    assert BUNDLES in envs.environment_variables
    table = {"bundles_to_node_id": {0: "a", 1: "b"}}
    monkeypatch.setattr(ray_utils, "placement_group_table", lambda _: table)
    nodes = [{"NodeID": name, "NodeManagerAddress": f"ip-{name}", "Alive": True} for name in "ab"]
    monkeypatch.setattr(ray_utils.ray, "nodes", lambda: nodes)
    group: Any = SimpleNamespace()
    assert bundles_of_ranks(group, [1, 1, 0], 3) == [(1, "b", "ip-b"), (1, "b", "ip-b"), (0, "a", "ip-a")]


@contract("vllm", "the process of a rank in its Ray executor", NodeRank)
def test_a_rank_on_the_cpu_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own raises there, because the CPU has no name in Ray's books."""
    monkeypatch.setattr(vllm_node_executor.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a"))
    rank = NodeRank.__new__(NodeRank)
    assert rank.get_node_and_physical_gpu_ids() == ("a", [])
    assert NodeExecutor._get_actor_resource_kwargs() == {"num_gpus": 0}


@contract("vllm", "the check of a rank's GPU", NodeRank)
def test_a_rank_may_have_fewer_gpus_on_its_node_than_there_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's worker refuses it, unless the executor is named "ray"; here it goes on to the GPU, which is not there."""
    from vllm.v1.executor import ray_executor_v2
    from vllm.v1.worker import gpu_worker

    parallel: Any = SimpleNamespace(
        distributed_executor_backend=NodeExecutor, local_world_size=2, assigned_physical_gpu_ids=[1],
        data_parallel_size=1, nnodes_within_dp=1, enable_elastic_ep=False, disable_custom_all_reduce=True,
    )  # fmt: skip
    rank = NodeRank.__new__(NodeRank)
    rank._init_kwargs = {"vllm_config": SimpleNamespace(parallel_config=parallel)}
    monkeypatch.setattr(ray_executor_v2.RayWorkerProc, "initialize_worker", lambda *_, **__: None)
    monkeypatch.setattr(vllm_node_executor, "share_memory_within_node", lambda _: None)
    context = SimpleNamespace(get_node_id=lambda: "a")
    monkeypatch.setattr(vllm_node_executor.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(vllm_node_executor.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    for name in vllm_node_executor.INTERFACES:
        monkeypatch.setenv(name, "eth7")
    rank.initialize_worker(0, {}, "tcp://127.0.0.1:1")
    assert parallel.distributed_executor_backend == "ray"
    source = inspect.getsource(gpu_worker.Worker.init_device)
    assert "local_world_size" in source
    assert '"ray"' in source
    assert vllm_node_executor.os.environ["GLOO_SOCKET_IFNAME"] == "eth7"  # What a node's own environment says stays.


@contract("vllm", "the environment of a rank's process", NodeExecutor)
def test_a_rank_has_the_replicas_threads_and_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it imports torch. Ray would give an actor without CPUs one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,3")
    executor = NodeExecutor.__new__(NodeExecutor)
    executor.parallel_config = SimpleNamespace(ray_runtime_env={"env_vars": {"A": "b"}}, ray_workers_use_nsight=False)
    found = executor._build_runtime_env()["env_vars"]
    assert (found["OMP_NUM_THREADS"], found["VLLM_PP_LAYER_PARTITION"], found["A"]) == ("3", "1,3", "b")


@contract("vllm", "the interface at which ranks meet", interface_of)
def test_the_interface_is_that_of_the_nodes_address() -> None:
    """Gloo would look the host's name up, which may lead to 127.0.1.1."""
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None


@contract("vllm", "the name of the memory that ranks share", share_memory_within_node)
def test_ranks_of_different_nodes_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names differ, so vLLM sends over the network. Two raylets of one machine are different nodes too."""
    from vllm.distributed.device_communicators import cpu_communicator

    shared = cpu_communicator._CPUSHMDistributed
    monkeypatch.setenv("VLLM_DIST_IDENT", "123")
    made: Any = SimpleNamespace(unique_name="pp:0", ranks=[0, 1])
    names = []
    for node in ("aaaaaaaaaaaa", "bbbbbbbbbbbb", "aaaaaaaaaaaa"):
        with monkeypatch.context() as undone:
            undone.setattr(shared, "make_group_name", staticmethod(shared.make_group_name))
            share_memory_within_node(node)
            names.append(shared.make_group_name(made))
    assert names[0] == names[2] != names[1]
    assert all(name.startswith("123-") for name in names)


@contract("vllm", "what its engine is told of the death of a rank", NodeExecutor)
def test_an_engine_that_waits_for_a_dead_rank_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the engine is told and goes on, its process ends, because it waits for an answer that does not come."""
    ended: list[int] = []
    monkeypatch.setattr(vllm_node_executor, "LAST_STEP_S", 0.01)
    monkeypatch.setattr(vllm_node_executor.os, "_exit", ended.append)
    executor = NodeExecutor.__new__(NodeExecutor)
    executor.is_failed, executor.failure_callback, told = False, None, []
    executor.register_failure_callback(lambda: told.append(True))
    executor.failure_callback()
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (told, ended) == ([True], [1])


@contract("vllm", "what it tells the executor of the placement group", NodeExecutor)
def test_without_a_placement_group_there_is_no_start() -> None:
    """vLLM sets it in the replica's process, which is one of Ray's actors."""
    from vllm.engine import arg_utils

    assert "ray.util.get_current_placement_group()" in inspect.getsource(arg_utils.EngineArgs.create_engine_config)
    group: Any = SimpleNamespace(placement_group=None, ray_runtime_env=None)
    with pytest.raises(RuntimeError, match="no placement group"):
        vllm_node_executor._connect(group)


def test_each_part_has_a_test() -> None:
    """So that an upgrade shows what breaks."""
    assert untested(vllm_node_executor) == []
