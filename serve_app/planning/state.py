"""Says what a plan has taken of the devices so far, for the next replica that it places."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.facts.inventory import Device
from serve_app.planning.plan import ModelPlan


@dataclass(frozen=True)
class Home:
    """This is the place of a model's replicas: the indices of their GPUs, and their nodes."""

    indices: tuple[int, ...] = ()
    nodes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class State:
    """What is taken: bytes by device, the devices in whole use, and the shares of the others."""

    used: Mapping[str, int] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    shares: Mapping[str, float] = field(default_factory=dict)
    homes: Mapping[str, Home] = field(default_factory=dict)

    def may_host(self, name: str, gpus: Sequence[Device]) -> bool:
        """Returns whether a node may have a replica of this model. By index, all replicas ask for the same GPUs of a
        node, so a node has one."""
        return not gpus[0].by_index or gpus[0].node not in self.homes.get(name, Home()).nodes

    def free(self, device: Device) -> int:
        """Returns the bytes that are left on a device."""
        return device.free_bytes - self.used.get(device.id, 0)

    def is_untouched(self, device: Device) -> bool:
        """Returns whether no replica has a part of the device."""
        return device.id not in self.used

    def with_plan(self, plan: ModelPlan, devices: Sequence[Device], share: float | None) -> "State":
        """Returns the state with one more replica. `share` is its fraction of a GPU, or None for whole devices."""
        used, shares = dict(self.used), dict(self.shares)
        for device in devices:
            used.setdefault(device.id, 0)
        shares_of: dict[str, int] = {}
        for rank in plan.ranks:  # On the CPU, all ranks of vLLM are on one device.
            shares_of[rank.device.id] = shares_of.get(rank.device.id, 0) + rank.share.bytes
        for device in dict.fromkeys(devices):  # By index Ray counts the whole limit, whatever part of it is planned.
            cap = (plan.config.max_memory or {}).get(device.index or 0, 0) if device.by_index else 0
            used[device.id] += max(cap, shares_of.get(device.id, 0))
        if share is not None:
            for device in devices:
                shares[device.id] = shares.get(device.id, 0.0) + share
        whole = {device.id for device in devices if device.is_gpu} if share is None else set()
        nodes = self.homes.get(plan.name, Home()).nodes | {device.node for device in devices}
        indices = tuple(device.index for device in devices if device.index is not None)
        return State(used, self.whole | whole, shares, {**self.homes, plan.name: Home(indices, nodes)})
