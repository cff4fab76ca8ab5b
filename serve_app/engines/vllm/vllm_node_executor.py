"""Runs the ranks of one engine on several nodes, by vLLM's own Ray executor in the placement group of the replica.

vLLM's executor (`vllm.v1.executor.ray_executor_v2`) wants a bundle for each rank, which Ray may put on any node. Here a
bundle is a node, with all its ranks, because a stage must stay whole on one. Its list of the ranks' bundles,
`VLLM_RAY_BUNDLE_INDICES`, says in which bundle each rank is. What else differs:

- The CPU has no name in Ray's books, and a rank on it no GPU.
- A rank on another node that has died is waited for until the step's own timeout of minutes, although the executor
  knows of its death, so the engine's process is ended.
- Ranks of different nodes would meet in shared memory on the CPU, of which each node has its own.
- The layers of the stages and the number of threads are those of the replica, whatever a node was started with.

vLLM imports this file in the engine's process and in those of the ranks. `vllm_internals.running_engine` names it.
"""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import ray
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2, ray_utils

from serve_app.planning.plan import STAGES

# After the death of a rank, the engine's process has so many seconds to end.
LAST_STEP_S = 5.0
# Ray sets the first to 1 for an actor without CPUs, and torch reads it when it is imported. A node may have been
# started with other stages. Ray and NVML number GPUs by PCI address, but CUDA's default begins with the fastest.
SAME_ON_ALL_NODES = ("OMP_NUM_THREADS", STAGES, "CUDA_DEVICE_ORDER")
# Gloo and NCCL meet at the interface that these name.
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class NodeRank(ray_executor_v2.RayWorkerProc):  # type: ignore[misc]  # vLLM is not typed
    """This is the process of one rank, an actor of Ray.

    It replaces `get_node_and_physical_gpu_ids` and wraps `initialize_worker` of `RayWorkerProc`; seen in vLLM 0.32.
    """

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """Returns Ray's id of the node, and the GPUs that Ray gave, of which a rank on the CPU has none."""
        if current_platform.is_cpu():
            return ray.get_runtime_context().get_node_id(), []
        found: tuple[str, list[int]] = super().get_node_and_physical_gpu_ids()
        return found

    def initialize_worker(self, *args: Any, **kwargs: Any) -> None:
        """Makes the worker. Its GPU is one of its node's, which vLLM expects only of an executor named "ray"."""
        self._init_kwargs["vllm_config"].parallel_config.distributed_executor_backend = "ray"
        address = ray.util.get_node_ip_address()
        for name in INTERFACES:  # The engine's own variables would come after these, and are those of another node.
            if (interface := interface_of(address)) is not None:
                os.environ.setdefault(name, interface)
        if current_platform.is_cpu():
            share_memory_within_node(ray.get_runtime_context().get_node_id())
        super().initialize_worker(*args, **kwargs)


class NodeExecutor(ray_executor_v2.RayExecutorV2):  # type: ignore[misc]  # vLLM is not typed
    """This is vLLM's Ray executor, for ranks whose bundles are nodes.

    It replaces `_get_actor_resource_kwargs` of `RayExecutorV2` and wraps its `_build_runtime_env`, `_init_executor` and
    `register_failure_callback`. In its module it replaces the functions `initialize_ray_cluster` and
    `get_bundles_for_indices` and the class `RayWorkerProc`, by which that starts; seen in vLLM 0.32.
    """

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        """Returns what a rank takes of its bundle. On the CPU it takes nothing, and the bundle has the node's share."""
        if current_platform.is_cpu():
            return {"num_gpus": 0}
        asked: dict[str, Any] = ray_executor_v2.RayExecutorV2._get_actor_resource_kwargs()
        return asked

    def _build_runtime_env(self) -> dict[str, Any]:
        """Returns the environment of the ranks' processes, which is there before they import anything."""
        found: dict[str, Any] = super()._build_runtime_env()
        found["env_vars"] |= {name: os.environ[name] for name in SAME_ON_ALL_NODES if name in os.environ}
        return found

    def _init_executor(self) -> None:
        """Starts the ranks. The names that are replaced belong to this process, which runs one engine."""
        ray_executor_v2.initialize_ray_cluster = _connect
        ray_executor_v2.get_bundles_for_indices = bundles_of_ranks
        ray_executor_v2.RayWorkerProc = NodeRank
        super()._init_executor()

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        """Has the engine told of the death of a rank, and its process ended if it does not end by itself.

        The engine reads the message only between two steps. In a step it waits for the answers of ranks; what wakes it
        there (`MessageQueue.shutdown`) reaches queues in shared memory, and not those over the network.
        """

        def told() -> None:
            callback()
            end = threading.Timer(LAST_STEP_S, os._exit, (1,))
            end.daemon = True
            end.start()

        super().register_failure_callback(told)


def _connect(parallel_config: Any, require_gpu_on_driver: bool = True) -> None:
    """Connects to the replica's cluster. vLLM has set `placement_group` to that of the replica, and would refuse its
    bundles because they have several GPUs."""
    if parallel_config.placement_group is None:
        raise RuntimeError("the replica is in no placement group, so its ranks have no nodes")
    if not ray.is_initialized():
        ray.init(os.environ["RAY_ADDRESS"], runtime_env=parallel_config.ray_runtime_env, log_to_driver=True)


def bundles_of_ranks(group: Any, indices: Sequence[int], world_size: int) -> list[tuple[int, str, str]]:
    """Returns the index, Ray's id of the node and the address of each rank's bundle. vLLM's own function
    (`vllm.v1.executor.ray_utils.get_bundles_for_indices`) refuses several ranks in a bundle. Raises ValueError if there
    are not as many indices as ranks."""
    if len(indices) != world_size:
        raise ValueError(f"{len(indices)} bundles are given for {world_size} ranks")
    every = sorted(set(indices))
    found = {bundle[0]: bundle for bundle in ray_utils.get_bundles_for_indices(group, every, len(every))}
    return [found[index] for index in indices]


def interface_of(address: str) -> str | None:
    """Returns the name of this machine's network interface that has the address, or None if none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return name
    return None


def share_memory_within_node(node: str) -> None:
    """Has this rank share memory with ranks of its own node only, by a name that has the node in it.

    vLLM compares the names of a group's ranks, and falls back to `torch.distributed` where they differ. It wraps
    `vllm.distributed.device_communicators.cpu_communicator._CPUSHMDistributed.make_group_name`, seen in vLLM 0.32.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    make = _CPUSHMDistributed.make_group_name

    def make_group_name(communicator: Any) -> str:
        return f"{make(communicator)}-{node[:8]}"

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)
