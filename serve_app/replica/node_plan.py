"""Makes the plan of a replica whose ranks are on several nodes, each in a bundle of the replica's placement group.

Ray has chosen the nodes, and need not have chosen those of the builder's plan. So the replica plans on the nodes that
it was given, and tells vLLM which bundle each rank is in.
"""

from collections.abc import Mapping, Sequence

from serve_app.config import ModelConfig
from serve_app.facts.engine_facts import EngineFacts
from serve_app.facts.inventory import Device, Inventory, seen_on_nodes
from serve_app.planning.plan import ModelPlan
from serve_app.planning.resource_demand import BUNDLES
from serve_app.ray_serve import own_bundles
from serve_app.replica.replica_plan import plan_on


def plan_over_nodes(config: ModelConfig, facts: EngineFacts | None) -> ModelPlan | None:
    """Returns the plan for the nodes of this replica's placement group, which are called "node 0", "node 1" and so on
    by the numbers of their bundles. Everything else is as in `plan_replica`, but who holds what is free is not known.
    It asks each node, so it blocks."""
    bundles = own_bundles()
    seen = seen_on_nodes({name_of(number): node for number, (node, _) in enumerate(bundles)})
    return plan_on(config, given_devices(seen, [int(bundle.get("GPU", 0)) for _, bundle in bundles]), facts)


def name_of(bundle: int) -> str:
    """Returns the name of a bundle's node in the replica's plan."""
    return f"node {bundle}"


def given_devices(seen: Sequence[Inventory], gpus: Sequence[int]) -> list[Device]:
    """Returns the devices that a replica may use of each node: its host, and as many GPUs as its bundle has. Those that
    Ray gave are not known yet, and they are among those with most memory free, because nothing else runs there."""
    devices: list[Device] = []
    for inventory, count in zip(seen, gpus, strict=True):
        devices += sorted(inventory.gpus, key=lambda gpu: (-gpu.free_bytes, gpu.index or 0))[:count]
        devices += [device for device in inventory.devices if not device.is_gpu]
    return devices


def bundle_order(planned: ModelPlan | None) -> Mapping[str, str]:
    """Returns the environment variable in which vLLM reads the bundle of each rank. Without a plan, the one that the
    builder has set stays, which has the bundles in their order."""
    if planned is None:
        return {}
    numbers = {name_of(number): number for number in range(planned.config.nodes)}
    return {BUNDLES: ",".join(str(numbers[rank.device.node]) for rank in planned.ranks)}
