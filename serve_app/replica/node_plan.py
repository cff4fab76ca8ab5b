"""Makes the plan of a replica whose ranks are on several nodes, each in a bundle of the replica's placement group.

Ray has chosen the nodes and their GPUs, and need not have chosen those of the builder's plan. So the replica plans on
what it was given, and tells vLLM which bundle each rank is in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from serve_app.config import ModelConfig
from serve_app.facts.engine_facts import EngineFacts
from serve_app.facts.gpus import Gpu
from serve_app.facts.inventory import BundleView, Device, seen_in_bundles
from serve_app.planning.plan import ModelPlan
from serve_app.planning.resource_demand import BUNDLES
from serve_app.ray_serve import own_bundles
from serve_app.replica.replica_plan import plan_on


def given_views() -> list[BundleView]:
    """Returns what each bundle of this replica has, the first one first. It asks each node, so it blocks. It can be
    called until the engine's ranks hold the GPUs."""
    return seen_in_bundles([int(bundle.get("GPU", 0)) for _, bundle in own_bundles()], name_of)


def gpus_of(views: Sequence[BundleView]) -> list[Gpu]:
    """Returns the GPUs of all nodes, in the order of the bundles."""
    return [gpu for view in views for gpu in view.gpus]


def plan_over_nodes(config: ModelConfig, views: Sequence[BundleView], facts: EngineFacts | None) -> ModelPlan | None:
    """Returns the plan for what the bundles have, whose nodes are called "node 0", "node 1" and so on by the numbers of
    the bundles. Its GPUs have their places in `gpus_of` for numbers. It is None too if NVML does not see the GPUs.
    Everything else is as in `plan_replica`, but it is not known who holds what is not free."""
    if config.device != "cpu" and not all(view.gpus for view in views):
        return None
    planned = plan_on(config, [device for view in views for device in _devices(view)], facts)
    if planned is None or config.device == "cpu":
        return planned
    places = [(view.name, gpu.index) for view in views for gpu in view.gpus]
    ranks = [
        replace(rank, device=replace(rank.device, index=places.index((rank.device.node, rank.device.index or 0))))
        for rank in planned.ranks
    ]
    return replace(planned, ranks=tuple(ranks))


def _devices(view: BundleView) -> list[Device]:
    gpus = [Device(view.name, gpu.index, gpu.name, gpu.total_bytes, gpu.free_bytes, False) for gpu in view.gpus]
    return [*gpus, replace(view.host, node=view.name)]


def name_of(bundle: int) -> str:
    """Returns the name of a bundle's node in the replica's plan."""
    return f"node {bundle}"


def bundle_order(planned: ModelPlan | None) -> Mapping[str, str]:
    """Returns the environment variable in which vLLM reads the bundle of each rank. Without a plan, the one that the
    builder has set stays, which has the bundles in their order."""
    if planned is None:
        return {}
    numbers = {name_of(number): number for number in range(planned.config.nodes)}
    return {BUNDLES: ",".join(str(numbers[rank.device.node]) for rank in planned.ranks)}
