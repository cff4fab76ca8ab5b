"""Adds methods of ours to vLLM's worker processes: what a rank holds of its device and of the host, which files it
shares, and what a pipeline stage lacks on the CPU.

vLLM makes this class a base of its worker (`worker_extension_cls`), and the engine calls the methods in every rank.
"""

import os
from dataclasses import asdict, replace
from typing import Any

from serve_app.engines.measure import free_pinned_cache, pinned_bytes, rank_memory, tensor_bytes
from serve_app.engines.vllm.vllm_internals import (
    adapter_tensors,
    add_adapter_to_rank,
    correct_cpu_adapters,
    prepare_stage,
    remove_shared_files,
    shared_files,
    worker_device,
    worker_tensors,
)
from serve_app.facts.device_memory import node_devices
from serve_app.facts.process_memory import resident_bytes
from serve_app.planning.resource_demand import BUNDLES

# vLLM imports this file before it loads the model.
correct_cpu_adapters()
LIBRARIES = resident_bytes()


class WorkerExtension:
    """Reports on a worker and finishes its start. The names of its methods must differ from all names of vLLM's
    worker."""

    _tensors: tuple[int, int] | None = None

    def serve_app_memory(self) -> dict[str, Any]:
        """Returns the `RankMemory` of this rank as plain values. It runs between two steps, so it is short."""
        if self._tensors is None:  # These tensors do not change after the start, and adapters come and go.
            weights, cache = (sum(tensor_bytes(tensors).values()) for tensors in worker_tensors(self))
            self._tensors = weights, cache
        weights, cache = self._tensors
        buffers, kept = self.serve_app_adapter_bytes()
        device = worker_device(self)
        adapters = buffers if device.type == "cuda" else buffers + kept
        found = rank_memory(device, weights, cache, LIBRARIES, adapters=adapters)
        node = _node()
        if node:
            devices = {each.device: each for each in node_devices()}
            if (seen := devices.get(found.device)) is not None:
                found = replace(found, device_total=seen.total, device_used=seen.used)
        return asdict(found) | {"node": node}

    def serve_app_add_adapter(self, name: str, number: int, path: str) -> str:
        """Loads an adapter in this rank. Returns why the rank does not take it, or an empty text."""
        return add_adapter_to_rank(self, name, number, path)

    def serve_app_adapter_bytes(self) -> tuple[int, int]:
        """Returns the bytes of this rank's buffers for adapters on its device, and those of the adapters that it keeps
        in the host's memory."""
        buffers, kept = (sum(tensor_bytes(tensors).values()) for tensors in adapter_tensors(self))
        return buffers, kept

    def serve_app_shared_files(self) -> list[str]:
        """Returns the paths of the files that this rank shares with others, once all ranks have opened them."""
        return shared_files(self)

    def serve_app_forget_shared_files(self) -> None:
        """Removes the names of the files that this rank shares with others of its node, once all have opened them."""
        remove_shared_files(shared_files(self))

    def serve_app_host_bytes(self) -> int:
        """Returns the bytes of pinned memory that this rank holds on the host, with what torch keeps for later."""
        return pinned_bytes()

    def serve_app_free_host_cache(self) -> None:
        """Gives pinned memory back that this rank does not use, such as the copy of an engine that has woken."""
        free_pinned_cache()

    def serve_app_prepare_stage(self) -> None:
        """Makes the buffer in which this rank gets its input from the stage before. It is called on the CPU, before the
        first request."""
        prepare_stage(self)


def _node() -> str:
    """Returns the address of this rank's node, which is the replica's own unless the ranks are Ray's actors."""
    if BUNDLES not in os.environ:
        return ""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address
