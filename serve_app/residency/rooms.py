"""Finds the places that a pool could have: the devices of a node with what the pool may take of them, and what is left
for others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from serve_app.facts.inventory import Device, Inventory
from serve_app.model_fields import ResidencyConfig
from serve_app.planning.memory import reserve
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Plan
from serve_app.planning.planner import with_accounting
from serve_app.planning.pool import COPIES_SHARE, PoolPlan
from serve_app.planning.shortage import available


@dataclass(frozen=True)
class Room:
    """This is a place for a pool on one node: its devices as a plan has them, with the budget free on each, and the
    host of the node, if the inventory has it."""

    node: str
    devices: tuple[Device, ...]
    budget: Mapping[str, int]
    host: Device | None
    wanted: Mapping[str, int]  # It is more than the budget where a device has less.

    @property
    def tier(self) -> Literal["cpu", "disk"]:
        """Returns where copies of parked models are."""
        return "cpu" if self.devices[0].is_gpu else "disk"


def rooms_of(swaps: ResidencyConfig, on_cpu: bool, left: Sequence[Device]) -> list[Room]:
    """Returns the places that a pool could have. Of nodes that are alike it has only the first."""
    rooms: dict[object, Room] = {}
    for node in dict.fromkeys(device.node for device in left):
        own = [device for device in left if device.node == node]
        host = next((device for device in own if not device.is_gpu), None)
        if on_cpu:
            wanted = {host: (swaps.pool_memory or {})["cpu"]} if host is not None else {}
        elif swaps.pool_memory is None:
            wanted = {device: available(device, device.free_bytes) for device in own if device.is_gpu}
            wanted = {device: size for device, size in wanted.items() if size > 0}
        else:
            gpus = {device.index: device for device in own if device.is_gpu}
            named = {key: size for key, size in swaps.pool_memory.items() if isinstance(key, int)}
            wanted = {gpus[index]: size for index, size in named.items()} if named.keys() <= gpus.keys() else {}
        if wanted:
            room = _room(node, wanted, host)
            likeness = [(device.index, device.name, device.total_bytes, device.free_bytes) for device in room.devices]
            rooms.setdefault((*likeness, host and host.free_bytes), room)
    return list(rooms.values())


def _room(node: str, wanted: Mapping[Device, int], host: Device | None) -> Room:
    """Returns the room with no more than there is. Memory of a host is never quite free nor quite taken, so all of it
    counts."""
    budget, devices = {}, []
    for device, size in wanted.items():
        most = available(device, device.free_bytes) if device.is_gpu else device.total_bytes
        budget[device.id] = max(0, min(size, most))
        kept = reserve(device.total_bytes) if device.is_gpu else 0
        devices.append(replace(device, free_bytes=budget[device.id] + kept, by_index=device.is_gpu or None))
    return Room(node, tuple(devices), budget, host, {device.id: size for device, size in wanted.items()})


def room_for_copies(swaps: ResidencyConfig, room: Room) -> tuple[int | None, int | None]:
    """Returns what copies of parked models may take, and what the node has free of that, each None if it is not known.
    No inventory knows disks."""
    named = (swaps.pool_memory or {}).get(room.tier)
    if room.tier == "disk" or room.host is None:
        return named, None
    return (int(COPIES_SHARE * room.host.total_bytes) if named is None else named), room.host.free_bytes


def without_pool(left: Iterable[Device], room: Room, pool: PoolPlan) -> tuple[Device, ...]:
    """Returns the devices without what a pool holds."""
    found = []
    for device in left:
        held = room.budget.get(device.id, 0)
        if device.id == (room.host and room.host.id) and pool.tier == "cpu":
            held += min(pool.copies_bytes, pool.copies_budget or 0)
        found.append(_less(device, held))
    return tuple(found)


def left_by(plan: Plan, devices: Iterable[Device]) -> tuple[Device, ...]:
    """Returns the devices with what the models of a plan leave of them."""
    return tuple(_less(device, plan.planned(device)) for device in devices)


def _less(device: Device, held: int) -> Device:
    """Returns a device without the bytes that are held of it, which is all of a GPU that Ray counts as a whole."""
    is_whole = device.is_gpu and not device.by_index
    return replace(device, free_bytes=0 if held and is_whole else max(0, device.free_bytes - held))


def counted(requests: Sequence[ModelRequest], inventory: Inventory) -> Inventory:
    """Returns the inventory with Ray's kind of accounting, which is by index if it is still open and a pool names
    GPUs."""
    names_gpus = any(
        isinstance(key, int)
        for request in requests
        if request.config.swaps is not None
        for key in request.config.swaps.pool_memory or {}
    )
    if not names_gpus:
        return with_accounting(requests, inventory)
    devices = (
        replace(device, by_index=True) if device.is_gpu and device.by_index is None else device
        for device in inventory.devices
    )
    return replace(inventory, devices=tuple(devices))
