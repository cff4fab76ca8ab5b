"""Brings a replica into its pool: the pool's devices and budget, the replica's plan in it, and the pool's keeper."""

import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import serve

from serve_app.byte_sizes import MaxMemoryKey
from serve_app.config import ModelConfig
from serve_app.engines.engine import Engine, create_engine
from serve_app.errors import EngineError
from serve_app.facts.engine_facts import EngineFacts
from serve_app.facts.gpus import Gpu, local_gpus
from serve_app.facts.host_memory import host_memory_bytes
from serve_app.facts.inventory import Device
from serve_app.facts.nodes import VRAM_RESOURCE
from serve_app.model_fields import ResidencyConfig
from serve_app.planning.memory import reserve
from serve_app.planning.model_request import PT_MAX_NUM_SEQS, PT_MAX_QUEUED_REQUESTS
from serve_app.planning.plan import ModelPlan
from serve_app.planning.pool import COPIES_SHARE, residue, still_bytes, weights_of
from serve_app.replica.replica_plan import NODE, plan_alone, with_planned_memory
from serve_app.replica.swapping_engine import Seat, SwappingEngine
from serve_app.residency.keeper import PoolSettings, RayKeeper
from serve_app.residency.lease_records import PoolName
from serve_app.residency.member import Bytes

MIB = 2**20


@dataclass(frozen=True)
class PlannedSeat:
    """This is one plan of a replica in its pool, the lease that it takes, and what its process keeps of each device
    while it is parked. Both are bytes by the names of `lease_key`."""

    planned: ModelPlan
    lease: Bytes
    residue: Bytes


@dataclass(frozen=True)
class PoolMember:
    """This is a replica that is about to join a pool. `seats` are its plans, the best first, and `gpus` are those of
    the pool in the order in which the plans count them."""

    config: ModelConfig
    swaps: ResidencyConfig
    seats: Sequence[PlannedSeat]
    keeper: RayKeeper
    gpus: Sequence[Gpu] = ()

    @property
    def planned(self) -> ModelPlan:
        """Returns the best plan."""
        return self.seats[0].planned

    def engine(self, name: str) -> SwappingEngine:
        """Returns the engine of the model `name` for clients."""
        replica = serve.get_replica_context().replica_id.unique_id
        weights = weights_of(self.planned)
        seats = [Seat(seat.lease, partial(self._make, seat.planned, name), seat.residue) for seat in self.seats]
        is_pt = self.config.infer_backend == "pt"
        still = still_bytes(self.planned, host_budget(self.swaps, self.config.device == "cpu"))
        most = sequences(self.config) if is_pt else math.inf
        # A process keeps CUDA's context for as long as it lives. That of vLLM's engine ends with it.
        return SwappingEngine(
            name,
            replica,
            self.swaps,
            seats,
            weights,
            self.keeper,
            keeps_residue=is_pt,
            most_running=most,
            still=still,
        )

    def _make(self, planned: ModelPlan, name: str) -> Engine:
        if self.gpus:
            show_gpus(planned, self.gpus)
        own = with_planned_memory(planned.config, planned)
        # What the plan found on the pool's devices is not what the config names.
        return create_engine(own.model_copy(update={"max_memory": self.config.max_memory}), name, planned)


def pool_member(config: ModelConfig, swaps: ResidencyConfig, facts: EngineFacts | None) -> PoolMember:
    """Returns the replica of this process in its pool. It blocks for as long as a plan takes. Raises EngineError if the
    model does not fit into the pool."""
    on_cpu = config.device == "cpu"
    if on_cpu:
        seats, budget = cpu_seats(config, swaps, facts), cpu_budget(swaps)
        return PoolMember(config, swaps, seats, keeper_of(swaps, budget, on_cpu, {}))
    gpus = gpus_of_pool(swaps)
    if not gpus:
        raise EngineError("device: cuda, but this node shows no GPU to its pool. Set device: cpu to run on the CPU.")
    budget = gpu_budget(swaps, gpus)
    node = ray.get_runtime_context().get_node_id()
    total = next(item["Resources"] for item in ray.nodes() if item["NodeID"] == node)
    options = ray_options(swaps, gpus, total)
    seats = gpu_seats(config, gpus, budget, "resources" in options, facts)
    return PoolMember(config, swaps, seats, keeper_of(swaps, budget, on_cpu, options), gpus)


def sequences(config: ModelConfig) -> int:
    """Returns how many sequences pt takes at once: those that run, and those that wait in it."""
    return (config.max_num_seqs or PT_MAX_NUM_SEQS) + (config.max_queued_requests or PT_MAX_QUEUED_REQUESTS)


def cpu_budget(swaps: ResidencyConfig) -> Bytes:
    """Returns what resident models of a pool on the processor may take."""
    return {"cpu": (swaps.pool_memory or {})["cpu"]}


def host_budget(swaps: ResidencyConfig, on_cpu: bool) -> int:
    """Returns the bytes that copies may take: of the host's memory, or of the disk for models on the processor."""
    named: Mapping[MaxMemoryKey, int] = swaps.pool_memory or {}
    tier: MaxMemoryKey = "disk" if on_cpu else "cpu"
    if tier in named:
        return named[tier]
    # What is there in all does not change, and all replicas of a pool must find the same.
    there = shutil.disk_usage(tempfile.gettempdir()).total if on_cpu else host_memory_bytes()
    return int(COPIES_SHARE * there)


def cpu_seats(config: ModelConfig, swaps: ResidencyConfig, facts: EngineFacts | None) -> list[PlannedSeat]:
    """Returns the plan of a model on the processor, as if it had the whole pool. Raises EngineError if that is too
    little."""
    size = cpu_budget(swaps)["cpu"]
    device = Device(NODE, None, "memory", max(size, host_memory_bytes()), size)
    return [_seat(plan_alone(config, [device], facts))]


def gpu_seats(
    config: ModelConfig, gpus: Sequence[Gpu], budget: Bytes, by_index: bool, facts: EngineFacts | None
) -> list[PlannedSeat]:
    """Returns the plans of a model on the GPUs of its pool, as if it had all of the pool, the best first.

    A model that fits on a single GPU has a plan for each on which it fits. Raises EngineError if it fits nowhere.
    """
    devices = [
        Device(
            NODE, number, gpu.name, gpu.total_bytes, budget[lease_key(gpu.index)] + reserve(gpu.total_bytes), by_index
        )
        for number, gpu in enumerate(gpus)
    ]
    best = _seat(plan_alone(config, devices, facts), gpus)
    if len(best.lease) > 1 or config.max_memory is not None:
        return [best]
    seats = [best]
    for device, gpu in zip(devices, gpus, strict=True):
        if lease_key(gpu.index) not in best.lease:
            try:
                seats.append(_seat(plan_alone(config, [device], facts), gpus))
            except EngineError:  # It does not fit on this one.
                continue
    return seats


def gpu_budget(swaps: ResidencyConfig, gpus: Sequence[Gpu]) -> Bytes:
    """Returns what resident models may take of each GPU: what the config says, or all of it without the reserve of the
    plan. Raises EngineError if the config names a GPU that is not there."""
    named = swaps.pool_memory or {}
    known = {gpu.index: gpu.total_bytes - reserve(gpu.total_bytes) for gpu in gpus}
    if not named:
        return {lease_key(index): size for index, size in known.items()}
    for index in named:
        if isinstance(index, int) and index not in known:
            raise EngineError(
                f"residency.pool_memory names GPU {index}, and this node has {', '.join(map(str, known)) or 'none'}."
            )
    return {lease_key(index): min(size, known[index]) for index, size in named.items() if isinstance(index, int)}


def gpus_of_pool(swaps: ResidencyConfig) -> list[Gpu]:
    """Returns the GPUs of this node that the pool may have, in the order of their numbers."""
    named = [index for index in swaps.pool_memory or {} if isinstance(index, int)]
    return [gpu for gpu in local_gpus() if not named or gpu.index in named]


def ray_options(swaps: ResidencyConfig, gpus: Sequence[Gpu], total: Mapping[str, float]) -> dict[str, Any]:
    """Returns what the keeper asks of Ray, once for all models of the pool: bytes by the GPU's index where the node
    advertises them (`total` are its resources), and whole GPUs otherwise."""
    if not gpus:
        return {}
    budget = gpu_budget(swaps, gpus)
    resources = {VRAM_RESOURCE.format(index=gpu.index): budget[lease_key(gpu.index)] // MIB for gpu in gpus}
    if resources.keys() <= total.keys():
        return {"resources": resources}
    if len(gpus) != total.get("GPU", 0):  # Ray gives any of its GPUs, by its own choice.
        raise EngineError(
            f"residency.pool_memory names {len(gpus)} GPUs, and Ray has {total.get('GPU', 0):g} whole ones on this "
            "node. A pool has all of them, or parts of them on a node that advertises its memory by index "
            '(ray start --num-gpus 0 --resources "$(serve-app node-resources)").'
        )
    return {"num_gpus": len(gpus)}


def keeper_of(swaps: ResidencyConfig, budget: Bytes, on_cpu: bool, options: Mapping[str, Any]) -> RayKeeper:
    """Returns the way to the keeper of this node's pool."""
    node = ray.get_runtime_context().get_node_id()
    return RayKeeper(PoolName(swaps.pool, node), PoolSettings(budget, host_budget(swaps, on_cpu), dict(options)))


def show_gpus(planned: ModelPlan, gpus: Sequence[Gpu]) -> None:
    """Shows the engine's processes the GPUs of the pool in the order in which vLLM's ranks take them, those of the plan
    first. Ray shows none to a replica that asks it for none."""
    first = [gpus[rank.device.index] for rank in planned.ranks if rank.device.index is not None]
    others = [gpu for gpu in gpus if gpu not in first]
    order = [*dict.fromkeys(first), *others] if planned.backend == "vllm" else list(gpus)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu.index) for gpu in order)


def lease_key(index: int | None) -> str:
    """Returns the name of a device in leases: a GPU by its number on the node, or "cpu"."""
    return "cpu" if index is None else f"GPU {index}"


def _seat(planned: ModelPlan, gpus: Sequence[Gpu] = ()) -> PlannedSeat:
    lease: dict[str, int] = {}
    keys: dict[str, str] = {}
    for rank in planned.ranks:
        key = lease_key(None if rank.device.index is None else gpus[rank.device.index].index)
        keys[rank.device.id] = key
        lease[key] = lease.get(key, 0) + rank.share.bytes
    return PlannedSeat(planned, lease, {keys[device]: figure.bytes for device, figure in residue(planned).items()})
