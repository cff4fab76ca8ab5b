"""Decides what one replica asks of Ray, and whether any node can ever give it.

There are two kinds of accounting for GPUs, which are never both on one node:

- Whole GPUs, or a share of one, are Ray's own `num_gpus`.
- Memory by GPU index needs nodes that advertise `vram_mib_<index>`. It is the only way to give a replica shares of
  several, unequal GPUs with Ray as the only scheduler.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from serve_app.config import ModelConfig
from serve_app.errors import PlacementError
from serve_app.facts.inventory import Inventory
from serve_app.facts.nodes import VRAM_RESOURCE, Node
from serve_app.planning.plan import ModelPlan
from serve_app.ray_serve import TYPE_RESOURCE

GIB = 2**30
# Ray counts resources in ten-thousandths.
RAY_UNITS = 10_000
# vLLM reads here in which bundle of the replica's placement group each of its ranks is, in the order of the ranks.
BUNDLES = "VLLM_RAY_BUNDLE_INDICES"
# The most replicas that a config may have (`facts/serve_file.py`), for a demand that takes nothing.
MOST_REPLICAS = 100_000


@dataclass(frozen=True)
class Demand:
    """These are the resources that one replica asks of one node.

    `vram_gib` is memory in GiB by GPU index. With it, `gpus` is 0 and the replica is shown exactly those GPUs.
    `elsewhere` is what it asks of further nodes, all of them different ones, and `ranks` is the number of vLLM's ranks
    on this node. The replica itself runs on the first node.
    """

    cpus: float
    gpus: float = 0.0
    vram_gib: Mapping[int, float] = field(default_factory=dict)
    accelerator_type: str | None = None
    ranks: int = 1
    elsewhere: tuple["Demand", ...] = ()

    @property
    def parts(self) -> list["Demand"]:
        """Returns what is asked of each node, that of the first one first."""
        return [replace(self, elsewhere=()), *self.elsewhere]

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Returns what is asked of each node as Ray names it."""
        plain = ({"CPU": part.cpus, "GPU": part.gpus, **part.resources} for part in self.parts)
        return [{name: amount for name, amount in bundle.items() if amount} for bundle in plain]

    @property
    def resources(self) -> dict[str, float]:
        """Returns Ray's custom resources in whole MiB. They are rounded up, since what a node advertises is whole."""
        asked = {VRAM_RESOURCE.format(index=index): float(ceil(size * 1024)) for index, size in self.vram_gib.items()}
        if self.accelerator_type is not None:  # It only ties, so it is as little as Ray's own option asks for.
            asked[TYPE_RESOURCE.format(name=self.accelerator_type)] = 0.001
        return asked

    def fits(self, nodes: Sequence[Node]) -> bool:
        """Returns whether the nodes could hold the replica if nothing else ran there."""
        if not self.elsewhere:
            return any(self.times_on(node) for node in nodes)
        return _have_places([{place for place, node in enumerate(nodes) if part.times_on(node)} for part in self.parts])

    def most_on(self, nodes: Sequence[Node]) -> int:
        """Returns how many replicas the nodes could hold if nothing else ran there. Over several nodes it is the number
        that could be held if each node were asked for the least of them, which may be too high."""
        parts = self.parts
        most = [max(part.times_on(node) for part in parts) for node in nodes]
        if len(parts) == 1:
            return sum(most)
        low, high = 0, sum(most)
        while low < high:  # So many replicas take a place of each of as many nodes, and no node twice for one replica.
            middle = (low + high + 1) // 2
            enough = sum(min(middle, count) for count in most) >= middle * len(parts)
            low, high = (middle, high) if enough else (low, middle - 1)
        return low

    def times_on(self, node: Node) -> int:
        """Returns how many times the node could hold what is asked of the first node. A fraction of a GPU is always on
        one GPU."""
        if self.accelerator_type is not None and self.accelerator_type not in node.accelerator_types:
            return 0
        counts = [_times(self.cpus, node.cpus)]
        if 0 < self.gpus < 1:
            counts.append(_times(self.gpus, 1.0) * int(node.gpus))
        elif self.gpus:
            counts.append(_times(self.gpus, node.gpus))
        counts += [
            int(node.vram_gib.get(index, 0.0) * 1024) // max(1, ceil(size * 1024))
            for index, size in self.vram_gib.items()
        ]
        return min(counts)

    def __str__(self) -> str:
        if self.elsewhere:
            return " and ".join(map(str, self.parts))
        by_index = [f"{size:.2f} GiB of GPU {index}" for index, size in sorted(self.vram_gib.items())]
        whole = [f"{self.gpus:g} GPU{'' if self.gpus == 1 else 's'}"] if self.gpus else []
        kind = [f"accelerator_type {self.accelerator_type}"] if self.accelerator_type else []
        return ", ".join([*whole, *by_index, *kind, f"{self.cpus:g} CPU{'' if self.cpus == 1 else 's'}"])

    @property
    def where(self) -> str:
        """Returns on how many nodes it is needed, as a part of a sentence."""
        return f"on {len(self.parts)} nodes" if self.elsewhere else "on one node"


def _have_places(choices: Sequence[set[int]]) -> bool:
    """Returns whether each of these can have one of its own choices, and no two the same."""
    taken: dict[int, int] = {}

    def find(number: int, seen: set[int]) -> bool:
        for place in sorted(choices[number] - seen):
            seen.add(place)
            if place not in taken or find(taken[place], seen):
                taken[place] = number
                return True
        return False

    return all(find(number, set()) for number in range(len(choices)))


def demands_of(config: ModelConfig, nodes: Sequence[Node]) -> list[Demand]:
    """Returns what one replica may ask for in this cluster, the better way first.

    Raises PlacementError if the GPUs that the config names can only be meant by index, but no node has them so.
    """
    if config.device == "cpu":
        return [_over_nodes(Demand(config.num_cpus, ranks=ranks) for ranks in config.ranks_of_nodes)]
    if config.gpu_ids is not None:
        raise PlacementError(
            "gpu_ids names GPUs by index, which needs nodes that advertise their memory by index "
            '(ray start --num-gpus 0 --resources "$(serve-app node-resources)") and a model that the plan knows.'
        )
    if config.infer_backend == "vllm" and config.nodes > 1:
        return [_over_nodes(Demand(config.num_cpus, float(ranks), ranks=ranks) for ranks in config.ranks_of_nodes)]
    if config.infer_backend == "vllm":
        return [Demand(config.num_cpus, gpus=config.num_gpus or float(config.ranks))]
    demands = []
    if config.max_memory and config.num_gpus is None and any(node.vram_gib for node in nodes):
        sizes = {index: config.max_memory[index] / GIB for index in config.gpu_indices}
        demands.append(Demand(config.num_cpus, vram_gib=sizes))
    if config.gpu_indices == tuple(range(len(config.gpu_indices))):
        demands.append(Demand(config.num_cpus, gpus=config.num_gpus or float(max(1, len(config.gpu_indices)))))
    if not demands:
        raise PlacementError(
            f"max_memory or device_map names GPU {config.gpu_indices[-1]}, "
            "but with whole GPUs the replica counts its own from 0. "
            f'Number them from 0, or start Ray with --num-gpus 0 --resources "$(serve-app node-resources)" to pick '
            "GPUs by index."
        )
    return demands


def _over_nodes(parts: Iterable[Demand]) -> Demand:
    first, *others = parts
    return replace(first, elsewhere=tuple(others))


def planned_demand(model: ModelPlan, inventory: Inventory) -> Demand:
    """Returns what one replica asks for, as it was planned: the bytes of each GPU's share, or Ray's own GPUs and
    fractions."""
    config = model.config
    devices = [rank.device for rank in model.ranks if rank.device.is_gpu]
    if config.nodes > 1:
        counts = Counter(rank.device.node for rank in model.ranks).values()  # In the order of the ranks.
        return _over_nodes(Demand(config.num_cpus, float(count) if devices else 0.0, ranks=count) for count in counts)
    if not devices:
        return Demand(config.num_cpus)
    if devices[0].by_index:
        caps = config.max_memory or {}
        planned = {rank.device.index or 0: rank.share.bytes for rank in model.ranks}
        named = {index: caps[index] for index in config.gpu_indices if index in caps}
        return Demand(config.num_cpus, vram_gib={index: size / GIB for index, size in (named or planned).items()})
    if model.backend == "vllm":
        return Demand(config.num_cpus, gpus=native_share(config, inventory) or float(len(model.ranks)))
    count = config.num_gpus or native_share(config, inventory) or float(max(1, len(config.gpu_indices)))
    return Demand(config.num_cpus, gpus=count)


def native_share(config: ModelConfig, inventory: Inventory) -> float | None:
    """Returns the fraction of a GPU that Ray is asked for, or None for whole GPUs.

    It is `num_gpus` below 1 or, for one GPU in `max_memory`, its share of the smallest GPU that Ray could give, because
    Ray does not look at sizes. If one is smaller than that, it is a whole GPU, as no fraction would be right
    everywhere.
    """
    if config.share is not None or config.num_gpus is not None:
        return config.share
    if not config.max_memory or config.gpu_indices != (0,):
        return None
    smallest = min((gpu.total_bytes for gpu in inventory.gpus if not gpu.by_index), default=0)
    fraction = ceil(config.max_memory[0] / smallest * 1000) / 1000 if smallest else 1.0
    return fraction if fraction < 1 else None


def require_room(config: ModelConfig, nodes: Sequence[Node], planned: Demand | None = None) -> Demand:
    """Returns the demand of one replica, which is the planned one if there is one.

    Raises PlacementError if no node could hold it even if it were empty.
    """
    found = [planned] if planned is not None else demands_of(config, nodes)
    kind = config.accelerator_type
    demands = [
        _over_nodes(replace(part, accelerator_type=kind) for part in demand.parts) if kind else demand
        for demand in found
    ]
    for demand in demands:
        if demand.fits(nodes):
            return demand
    demand = demands[0]
    cure = ""
    if config.device != "cpu" and not any(node.gpus or node.vram_gib for node in nodes):
        also = " and leave out accelerator_type" if config.accelerator_type else ""
        cure = f" To run it on the CPU, set device: cpu{also}."
    elif demand.gpus and any(node.vram_gib for node in nodes):
        cure = " GPU memory by index is given only to models that the plan knows."
    raise PlacementError(
        f"A replica needs {demand} {demand.where} ({_why(config, demand)}), but "
        f"{'the nodes do not have' if demand.elsewhere else 'no node has'} that. "
        f"The cluster has {'; '.join(map(str, nodes)) or 'no nodes'}.{cure}"
    )


def _times(asked: float, there: float) -> int:
    """Returns how many times `asked` is in `there`, in Ray's unit of a ten-thousandth."""
    unit = round(asked * RAY_UNITS)
    return int(round(there * RAY_UNITS) // unit) if unit else MOST_REPLICAS


def require_replicas(demand: Demand, count: int, nodes: Sequence[Node]) -> None:
    """Raises PlacementError if the nodes could not hold so many replicas at one time even if they were empty."""
    most = demand.most_on(nodes)
    if count > most:
        raise PlacementError(
            f"num_replicas or min_replicas is {count}, and each replica takes {demand}, but the cluster holds {most} "
            f"of them at most. It has {'; '.join(map(str, nodes))}. Lower the number, or add nodes."
        )


def _why(config: ModelConfig, demand: Demand) -> str:
    if config.device == "cpu":
        return "device: cpu"
    if config.infer_backend == "vllm":
        stages = f", pipeline_parallel_size: {config.stages}" if config.stages > 1 else ""
        return f"vllm, tensor_parallel_size: {config.tensor_parallel_size or 1}{stages}"
    if config.num_gpus is not None:
        return f"pt, num_gpus: {config.num_gpus:g}"
    if config.max_memory:
        sizes = ", ".join(f"{index}: {config.max_memory[index] / 1e9:g}GB" for index in config.gpu_indices)
        return f"pt, max_memory: {{{sizes}}}"
    return "pt, device_map" if config.gpu_indices else "pt, one GPU by default"
