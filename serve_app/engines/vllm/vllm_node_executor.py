"""Runs the ranks of one engine on several nodes, by vLLM's own Ray executor in the placement group of the replica.

vLLM's executor (`vllm.v1.executor.ray_executor_v2`) wants a bundle for each rank, which Ray may put on any node. Here a
bundle is a node, with all its ranks, because a stage must stay whole on one. Its list of the ranks' bundles,
`VLLM_RAY_BUNDLE_INDICES`, says in which bundle each rank is. It also lacks two things for the CPU: a name of the device
in Ray's books, and that a rank without a GPU has none. And it waits for ever for the answer of a rank on another node
that has died, although it knows of the death.

vLLM imports this file in the engine's process and in those of the ranks. `vllm_internals.running_engine` names it.
"""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2, ray_utils

# After the death of a rank, the engine's process has so many seconds to end.
LAST_STEP_S = 5.0


class NodeRank(ray_executor_v2.RayWorkerProc):  # type: ignore[misc]  # vLLM is not typed
    """This is the process of one rank, an actor of Ray.

    It replaces `get_node_and_physical_gpu_ids` of `RayWorkerProc`, seen in vLLM 0.32.
    """

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """Returns Ray's id of the node, and the GPUs that Ray gave, of which a rank on the CPU has none."""
        if current_platform.is_cpu():
            return ray.get_runtime_context().get_node_id(), []
        found: tuple[str, list[int]] = super().get_node_and_physical_gpu_ids()
        return found


class NodeExecutor(ray_executor_v2.RayExecutorV2):  # type: ignore[misc]  # vLLM is not typed
    """This is vLLM's Ray executor, for ranks whose bundles are nodes.

    It replaces `_get_actor_resource_kwargs` and wraps `_init_executor` and `register_failure_callback` of
    `RayExecutorV2`, and in the module it
    replaces the functions `initialize_ray_cluster` and `get_bundles_for_indices` and the class `RayWorkerProc` by which
    that starts; seen in vLLM 0.32.
    """

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        """Returns what a rank takes of its bundle. On the CPU it takes nothing, and the bundle has the node's share."""
        if current_platform.is_cpu():
            return {"num_gpus": 0}
        asked: dict[str, Any] = ray_executor_v2.RayExecutorV2._get_actor_resource_kwargs()
        return asked

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
