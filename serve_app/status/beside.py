"""Says what a plan may use of a cluster's devices beside the models that run there. It is pure.

What a device has left is not what is free on it: a model that loads, sleeps in a pool or has few requests holds less
than it was planned to take. So each replica counts with what it holds or with its plan, whichever is more, and a pool
with its budget. Models that the plan replaces count with nothing, and what they hold is free for it. Ray's own books
bound that where they count bytes, and a GPU that Ray has given away as a whole is not there at all.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from serve_app.facts.inventory import Device, Inventory


@dataclass(frozen=True)
class Holding:
    """This is what one replica holds of a device of the inventory and what it was planned to take, in bytes. `gpus` is
    the part of the GPU that Ray has given to it, or 0 where Ray counts bytes and for memory."""

    device: str
    held: int
    planned: int
    gpus: float = 0.0


@dataclass(frozen=True)
class RunningModel:
    """This is a model that Serve has, with what its replicas hold. `pool` is the name of the pool in which it shares
    memory, or empty. `starting` replicas have not reported yet. `claims` are the bytes that Ray's books count for all
    its replicas, by device."""

    name: str
    holdings: Sequence[Holding]
    pool: str = ""
    starting: int = 0
    is_asleep: bool = False
    claims: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunningPool:
    """This is a pool that models share, with the bytes of each device that its resident models may take together.
    `claims` are the bytes that Ray's books count for its keepers."""

    name: str
    budget: Mapping[str, int]
    claims: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """This is what a cluster runs. `booked` are the bytes that Ray's books have left of each GPU that they count so."""

    models: Sequence[RunningModel] = ()
    pools: Sequence[RunningPool] = ()
    booked: Mapping[str, int] = field(default_factory=dict)


def beside_running(
    inventory: Inventory, running: Running, models: Collection[str], pools: Collection[str]
) -> tuple[Inventory, list[str]]:
    """Returns the devices with what is left beside all running models but these, which a plan replaces, and notes on
    what could not be counted. Of the `pools` that the plan has, too, nothing is counted, because it plans them anew."""
    replaced = [model for model in running.models if model.name in models or (model.pool in pools and model.pool)]
    staying = [model for model in running.models if model not in replaced]
    kept = [pool for pool in running.pools if pool.name not in pools]
    devices = tuple(_left(device, running, replaced, staying, kept) for device in inventory.devices)
    return replace(inventory, devices=devices), list(_notes(inventory, replaced, staying))


def _left(
    device: Device,
    running: Running,
    replaced: Sequence[RunningModel],
    staying: Sequence[RunningModel],
    pools: Sequence[RunningPool],
) -> Device:
    own = [item for model in staying for item in model.holdings if item.device == device.id]
    if device.is_gpu and not device.by_index and _is_taken(device, own, pools):
        return replace(device, free_bytes=0)
    pinned = [item for model in staying if not model.pool for item in model.holdings if item.device == device.id]
    needed = sum(max(item.held, item.planned) for item in pinned)
    for pool in pools:
        members = (model for model in staying if model.pool == pool.name)
        held = sum(item.held for model in members for item in model.holdings if item.device == device.id)
        needed += max(held, pool.budget.get(device.id, 0))
    everything = (*replaced, *staying)
    held = sum(item.held for model in everything for item in model.holdings if item.device == device.id)
    free = min(device.total_bytes, device.free_bytes + held) - needed
    if device.by_index and device.id in running.booked:
        gone = [pool.claims for pool in running.pools if pool not in pools] + [model.claims for model in replaced]
        free = min(free, running.booked[device.id] + sum(claims.get(device.id, 0) for claims in gone))
    return replace(device, free_bytes=max(0, free))


def _is_taken(device: Device, own: Iterable[Holding], pools: Iterable[RunningPool]) -> bool:
    """Returns whether Ray has no part of this GPU left, because a replica or a pool has all of it."""
    return any(item.gpus >= 1 for item in own) or any(device.id in pool.budget for pool in pools)


def _notes(inventory: Inventory, replaced: Sequence[RunningModel], staying: Sequence[RunningModel]) -> Iterable[str]:
    if replaced:
        holds = "holds" if len({model.name for model in replaced}) == 1 else "hold"
        yield f"What {_named(replaced)} {holds} now counts as free, because the plan has it anew."
    if starting := [model for model in staying if model.starting]:
        yield f"{_named(starting)} has replicas that have not reported what they hold, so they are not counted."
    if asleep := [model for model in staying if model.is_asleep]:
        yield f"{_named(asleep)} is scaled to zero and is not counted. It needs room when a request wakes it."
    for device in inventory.gpus:
        shares = [
            (model.name, item.gpus)
            for model in staying
            for item in model.holdings
            if item.device == device.id and 0 < item.gpus < 1
        ]
        if shares:
            left = max(0.0, 1 - sum(share for _, share in shares))
            names = ", ".join(sorted({name for name, _ in shares}))
            yield f"{device.id} is shared by {names}, and Ray gives no more than num_gpus: {left:g} of it to others."


def _named(models: Sequence[RunningModel]) -> str:
    return ", ".join(sorted({model.name for model in models}))
