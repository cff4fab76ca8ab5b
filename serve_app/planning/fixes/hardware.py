"""Finds the least hardware that would make a model fit, where no change of its config does: one card, or a node with a
set of equal cards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from serve_app.facts.inventory import Device, Inventory
from serve_app.planning.fixes import price
from serve_app.planning.fixes.ladder import Changes, rung
from serve_app.planning.fixes.model_ladders import backend_of
from serve_app.planning.fixes.trial import Trial
from serve_app.planning.fixes.wording import costs_for_others, gains_of
from serve_app.planning.memory import GIB
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Change, Fix

# These are the sizes of cards that can be bought, in GiB as drivers report them at least. The sizes that are there are
# tried too.
SIZES = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 95, 140, 179, 192, 288)
# A set has so many equal cards if the config does not say how many.
COUNTS = (2, 4, 8)
# Few machines have a card of more GiB, so a set of smaller ones is offered beside it.
LARGEST_COMMON = 95

# Returns the trial with these devices and changes of the model if it helps, and otherwise None.
Helped = Callable[[Inventory, Changes], Trial | None]


def least_hardware(name: str, trial: Trial) -> tuple[Fix, ...]:
    """Returns the fixes with the smallest card and the least set of equal cards that place one model and break no
    other, or nothing if none does."""
    return _least(name, trial, lambda inventory, changes: trial.helped(name, {name: changes}, inventory))


def least_hardware_for_all(trial: Trial) -> tuple[Fix, ...]:
    """Returns the fix with the smallest card, or otherwise the least set, that makes all models fit, or nothing if none
    does."""
    name = trial.plan.problems[0].model

    def fits(inventory: Inventory, changes: Changes) -> Trial | None:
        after = trial.with_changes({name: changes}, inventory)
        return after if after is not None and after.plan.fits else None

    return _least(name, trial, fits)[:1]


def with_hardware(inventory: Inventory, change: Change) -> Inventory:
    """Returns the inventory with one more card, with a card in the place of another, or with one more node of equal
    cards, as the change says."""
    size = int(float(change.value["size"].removesuffix("GiB")) * GIB)
    if "instead_of" in change.value:
        devices = tuple(
            replace(device, name="GPU", total_bytes=size, free_bytes=size)
            if device.id == change.value["instead_of"]
            else device
            for device in inventory.devices
        )
        return replace(inventory, devices=devices)
    if "count" in change.value:
        return _with_node(inventory, size, change.value["count"])
    node = change.value["node"]
    gpus = [gpu for gpu in inventory.gpus if gpu.node == node]
    index = max((gpu.index or 0 for gpu in gpus), default=-1) + 1
    by_index = gpus[0].by_index if gpus else None
    return replace(inventory, devices=(*inventory.devices, Device(node, index, "GPU", size, size, by_index)))


def _with_node(inventory: Inventory, size: int, count: int) -> Inventory:
    """Returns the inventory with a node of equal cards, which Ray counts as it counts the others."""
    nodes = {device.node for device in inventory.devices}
    name = next(f"n{number}" for number in range(len(nodes) + 1, 2 * len(nodes) + 2) if f"n{number}" not in nodes)
    by_index = next((gpu.by_index for gpu in inventory.gpus), None)
    cards = (Device(name, index, "GPU", size, size, by_index) for index in range(count))
    return replace(inventory, devices=(*inventory.devices, *cards))


def _least(name: str, trial: Trial, helped: Helped) -> tuple[Fix, ...]:
    if trial.request(name).config.device == "cpu":
        return ()
    card = _least_card(name, trial, helped)
    if card is not None and _size(card) <= LARGEST_COMMON:
        return (card,)
    return tuple(fix for fix in (card, _least_set(name, trial, helped)) if fix is not None)


def _least_card(name: str, trial: Trial, helped: Helped) -> Fix | None:
    """Returns the smallest card: one more on a node, or one in the place of a smaller one."""
    sizes = sorted({gpu.total_bytes / GIB for gpu in trial.inventory.gpus} | {*SIZES})
    found = [
        _least_size(name, trial, helped, place, [size for size in sizes if size * GIB > now], ())
        for place, now in _places(trial.inventory)
    ]
    return min(filter(None, found), key=_size, default=None)


def _least_set(name: str, trial: Trial, helped: Helped) -> Fix | None:
    """Returns the set of equal cards with the least memory in all, and of equals the one with the fewest cards."""
    ways = _ways_to_take(trial.request(name))
    found = [_least_size(name, trial, helped, {"count": count}, SIZES, changes) for count, changes in ways]
    return min(filter(None, found), key=lambda fix: fix.changes[0].value["count"] * _size(fix), default=None)


def _least_size(
    name: str, trial: Trial, helped: Helped, place: Mapping[str, Any], sizes: Sequence[float], changes: Changes
) -> Fix | None:
    """Returns the fix with the smallest of these sizes in GiB that helps at a place, found by bisection, or None. Since
    a larger card may draw others to it, the sizes below are tried too as long as they help."""

    def after(index: int) -> Trial | None:
        return helped(with_hardware(trial.inventory, _card(sizes[index], place)), changes)

    low, high = 0, len(sizes) - 1
    if not sizes or after(high) is None:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if after(middle) is not None else (middle + 1, high)
    while low > 0 and after(low - 1) is not None:
        low -= 1
    found = after(low)
    if found is None:
        return None
    loses, gains = costs_for_others(name, trial.plan, found.plan), gains_of(name, trial.plan, found.plan)
    return Fix(name if changes else "", (_card(sizes[low], place), *changes), price.CARD, loses, gains)


def _ways_to_take(request: ModelRequest) -> Iterator[tuple[int, Changes]]:
    """Yields numbers of equal cards with the change that lets a replica have so many. A config that names cards, limits
    or shares has none, because a set would not be what it names."""
    config, backend = request.config, backend_of(request.config)
    if config.gpu_indices or config.share is not None or config.accelerator_type is not None:
        return
    if backend == "vllm" and config.ranks > 1:
        yield config.ranks, ()
        return
    if backend == "pt" and config.num_gpus is not None and config.num_gpus > 1:
        yield int(config.num_gpus), ()
        return
    sizes = request.valid_tensor_parallel_sizes() if backend == "vllm" and request.is_planned_for_vllm else []
    for count in COUNTS:
        if backend == "auto":
            yield count, ()
        elif backend == "pt":
            yield count, rung("num_gpus", count)
        elif count in sizes:
            yield count, rung("tensor_parallel_size", count)
        elif count <= len(request.architecture.layers):
            yield count, rung("pipeline_parallel_size", count)


def _card(size: float, place: Mapping[str, Any]) -> Change:
    return Change("gpus", {"size": f"{size:g}GiB", **place})


def _size(fix: Fix) -> float:
    return float(fix.changes[0].value["size"].removesuffix("GiB"))


def _places(inventory: Inventory) -> Iterator[tuple[Mapping[str, str], int]]:
    """Yields one more card on each node, and one in the place of each other, with the bytes of that other one or 0. Of
    nodes and cards that are alike it offers only the first."""
    seen = set()
    for node in dict.fromkeys(device.node for device in inventory.devices):
        gpus = [gpu for gpu in inventory.gpus if gpu.node == node]
        likeness = tuple((gpu.total_bytes, gpu.free_bytes, gpu.by_index, gpu.name) for gpu in gpus)
        if likeness in seen:
            continue
        seen.add(likeness)
        yield {"node": node}, 0
        kinds = {(gpu.total_bytes, gpu.free_bytes): gpu for gpu in reversed(gpus)}
        for gpu in sorted(kinds.values(), key=lambda gpu: gpu.index or 0):
            yield {"instead_of": gpu.id}, gpu.total_bytes
