"""Holds what a plan says of a pool: what each of its models takes while it is resident, and what it keeps otherwise."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.planning.memory import ZERO, Figure, guessed
from serve_app.planning.plan import ModelPlan
from serve_app.planning.resident_sets import ResidentSets
from serve_app.planning.sizes import gib
from serve_app.planning.swap_times import SwapTimes
from serve_app.planning.terms import sleeping_vllm
from serve_app.planning.vllm_arguments import sleep_is_off

# Copies of parked models may take this share of the host's memory where the config does not say how much.
COPIES_SHARE = 0.5


@dataclass(frozen=True)
class PoolModel:
    """This is a replica of a model that shares a pool's memory, planned as if it had the pool alone.

    `leases` are the ways in which it can be resident, in bytes by device, the best first, which is that of `model`.
    `residue` is what its process keeps of each device while it is parked. `copy_bytes` is what the copy of its weights
    takes of the slower tier, and 0 if it is stopped instead of parked, of which `stops_because` is the reason.
    `still_bytes` is the most that requests which stand still take beside it.
    """

    model: ModelPlan
    leases: tuple[Mapping[str, int], ...]
    residue: Mapping[str, Figure]
    copy_bytes: int
    stops_because: str
    times: SwapTimes
    still_bytes: int = 0

    @property
    def title(self) -> str:
        """Returns the model's name, with its replica's number from the second one on."""
        return self.model.name if self.model.replica == 0 else f"{self.model.name} #{self.model.replica}"

    def to_json(self) -> dict[str, Any]:
        """Returns it as `serve-app plan --json` prints it."""
        return {
            **self.model.to_json(),
            "leases": [dict(lease) for lease in self.leases],
            "parked_bytes": {device: figure.bytes for device, figure in self.residue.items()},
            "copy_bytes": self.copy_bytes,
            "still_bytes": self.still_bytes,
            "stops_because": self.stops_because or None,
            "guessed_wake_s": round(self.times.wake_s, 1),
            "guessed_start_s": round(self.times.start_s, 1),
        }


@dataclass(frozen=True)
class PoolPlan:
    """This is the plan of the models that share the memory of one node.

    `budget` is what they may take together, in bytes by device. `tier` is where the copies of parked models are, "cpu"
    or "disk". `copies_budget` is what all copies may take there, and `tier_free` what the node has free of it, each
    None if the plan does not know it. `crowded` are the resident sets beside which not all others can be parked,
    because of what they would keep of the devices. `longest_wait_s` is the policy's bound with guessed times.
    """

    name: str
    node: str
    budget: Mapping[str, int]
    tier: str
    copies_budget: int | None
    tier_free: int | None
    models: tuple[PoolModel, ...]
    sets: ResidentSets
    crowded: tuple[tuple[str, ...], ...]
    longest_wait_s: float
    notes: tuple[str, ...] = ()

    @property
    def copies_bytes(self) -> int:
        """Returns the most bytes of the copies of all models that park."""
        return sum(model.copy_bytes + model.still_bytes for model in self.models)

    @property
    def still_bytes(self) -> int:
        """Returns the part of `copies_bytes` that only requests which stand still take."""
        return sum(model.still_bytes for model in self.models)

    @property
    def has_room_for_copies(self) -> bool | None:
        """Returns whether the copies of all models have room at one time, within the budget and on the node, or None if
        the plan does not know what there is."""
        known = [size for size in (self.copies_budget, self.tier_free) if size is not None]
        return self.copies_bytes <= min(known) if known else None

    @property
    def residue(self) -> dict[str, Figure]:
        """Returns what all parked models together keep of each device."""
        return residue_of(self.models)

    def to_json(self) -> dict[str, Any]:
        """Returns it as `serve-app plan --json` prints it."""
        return {
            "name": self.name,
            "node": self.node,
            "budget_bytes": dict(self.budget),
            "parked_bytes": {device: figure.bytes for device, figure in self.residue.items()},
            "models": [model.to_json() for model in self.models],
            "resident_sets": [list(names) for names in self.sets.shown],
            "more_resident_sets": self.sets.more,
            "is_search_cut": self.sets.is_cut,
            "crowded_sets": [list(names) for names in self.crowded],
            "copies": {
                "tier": self.tier,
                "bytes": self.copies_bytes,
                "still_bytes": self.still_bytes,
                "budget_bytes": self.copies_budget,
                "free_bytes": self.tier_free,
                "fit": self.has_room_for_copies,
            },
            "guessed_longest_wait_s": round(self.longest_wait_s, 1),
            "notes": list(self.notes),
        }


def residue_of(models: Iterable[PoolModel]) -> dict[str, Figure]:
    """Returns what these models keep of each device together while they are parked."""
    found: dict[str, Figure] = {}
    for model in models:
        for device, figure in model.residue.items():
            found[device] = found.get(device, ZERO) + figure
    return found


def residue(planned: ModelPlan) -> dict[str, Figure]:
    """Returns what the process of a parked model keeps of each GPU. It has its CUDA context still, and vLLM its graphs
    too. A process on the CPU keeps nothing that the plan counts."""
    found: dict[str, Figure] = {}
    for rank in planned.ranks:
        if not rank.device.is_gpu:
            continue
        kept = rank.context
        if planned.backend == "vllm":
            kept = max(guessed([sleeping_vllm()]), rank.context + rank.graph, key=lambda figure: figure.bytes)
        most = max(0, rank.share.bytes - rank.weights.bytes - rank.adapters.bytes - rank.kv_cache.bytes)
        kept = kept if kept.bytes <= most else Figure(most, "guessed")
        found[rank.device.id] = found.get(rank.device.id, ZERO) + kept
    return found


def stops_because(planned: ModelPlan, tier: str, copies_budget: int | None) -> str:
    """Returns why a model is stopped instead of parked when it has to leave, or an empty text if it parks."""
    copy = weights_of(planned)
    swaps = planned.config.swaps
    most = None if swaps is None else swaps.host_memory
    if planned.backend == "vllm" and not planned.ranks[0].device.is_gpu:
        return "vLLM cannot sleep on the CPU"
    if planned.backend == "vllm" and sleep_is_off(planned.config.engine_args):
        return "engine_args has enable_sleep_mode: false"
    if most == 0:
        return "host_memory is 0"
    if most is not None and copy > most:
        return f"the copy of its weights takes {gib(copy)}, and host_memory allows {gib(most)}"
    if copies_budget is not None and copy > copies_budget:
        return f"the copy of its weights takes {gib(copy)}, and all copies may take {gib(copies_budget)} of {tier}"
    return ""


def still_bytes(planned: ModelPlan, copies_budget: int | None) -> int:
    """Returns the most bytes that the copy of a parked model takes beside its weights, for the keys and values of
    requests that stand still: all that its KV cache holds, or what the bounds of copies leave. vLLM copies none."""
    if planned.backend == "vllm":
        return 0
    swaps = planned.config.swaps
    own = None if swaps is None else swaps.host_memory
    room = [bound - weights_of(planned) for bound in (own, copies_budget) if bound is not None]
    return max(0, min([sum(rank.kv_cache.bytes for rank in planned.ranks), *room]))


def weights_of(planned: ModelPlan) -> int:
    """Returns the bytes of a model's weights on its devices, and of its buffers for adapters, which is what a copy of
    them takes."""
    return sum(rank.weights.bytes + rank.adapters.bytes for rank in planned.ranks)
