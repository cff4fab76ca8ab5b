"""Reads what the nodes of a Ray cluster offer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.ray_serve import TYPE_RESOURCE

# The unit is MiB, since `ray start --resources` takes only whole numbers, and few cards have whole GiB.
VRAM_RESOURCE = "vram_mib_{index}"
_VRAM_PATTERN = re.compile(r"vram_mib_(\d+)")


@dataclass(frozen=True)
class Node:
    """This is a node's total resources, as Ray counts them.

    `accelerator_types` are Ray's names of its GPUs, at most that of the first one.
    `vram_gib` holds the memory in GiB of each GPU that the node advertises by index. Such a node is started with
    `ray start --num-gpus 0 --resources "$(serve-app node-resources)"`, so that it has no whole GPUs to give.
    """

    name: str
    cpus: float
    gpus: float
    vram_gib: Mapping[int, float] = field(default_factory=dict)
    accelerator_types: tuple[str, ...] = ()

    def __str__(self) -> str:
        by_index = ", ".join(f"GPU {index}: {size:g} GiB" for index, size in sorted(self.vram_gib.items()))
        kind = f" ({', '.join(self.accelerator_types)})" if self.accelerator_types else ""
        return f"{self.name}: {self.cpus:g} CPUs, {by_index or f'{self.gpus:g} GPUs'}{kind}"


def node_from_resources(name: str, resources: Mapping[str, float]) -> Node:
    """Returns the node that Ray describes by `resources`, which has an amount for each name."""
    matches = [(_VRAM_PATTERN.fullmatch(key), amount) for key, amount in resources.items()]
    by_index = {int(match[1]): amount / 1024 for match, amount in matches if match is not None}
    prefix = TYPE_RESOURCE.format(name="")
    kinds = tuple(sorted(key.removeprefix(prefix) for key in resources if key.startswith(prefix)))
    return Node(name, resources.get("CPU", 0.0), resources.get("GPU", 0.0), by_index, kinds)


def ray_nodes() -> list[Node]:
    """Returns the living nodes of the cluster that this process is connected to."""
    import ray

    return [node_from_resources(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
