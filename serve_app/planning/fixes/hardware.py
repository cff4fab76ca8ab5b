"""Finds the smallest card that would make a model fit, where no change of its config does."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from serve_app.facts.inventory import Device, Inventory
from serve_app.planning.fixes import price
from serve_app.planning.fixes.trial import Trial
from serve_app.planning.fixes.wording import gains_of
from serve_app.planning.memory import GIB
from serve_app.planning.plan import Change, Fix

# These are the sizes of cards that can be bought, in GiB as drivers report them at least. The sizes that are there are
# tried too.
SIZES = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 95, 140, 179, 192, 288)


def least_card(name: str, trial: Trial) -> tuple[Fix, ...]:
    """Returns the fix with the smallest card that places one model and breaks no other, or nothing if none does."""
    return _least(name, trial, lambda inventory: trial.helped(name, {}, inventory))


def least_card_for_all(trial: Trial) -> tuple[Fix, ...]:
    """Returns the fix with the smallest card that makes all models fit, or nothing if none does."""

    def fits(inventory: Inventory) -> Trial | None:
        after = trial.with_changes({}, inventory)
        return after if after is not None and after.plan.fits else None

    return _least(trial.plan.problems[0].model, trial, fits)


def with_card(inventory: Inventory, change: Change) -> Inventory:
    """Returns the inventory with one more card, or with a card in the place of another, as the change says."""
    size = int(float(change.value["size"].removesuffix("GiB")) * GIB)
    if "instead_of" in change.value:
        devices = tuple(
            replace(device, name="GPU", total_bytes=size, free_bytes=size)
            if device.id == change.value["instead_of"]
            else device
            for device in inventory.devices
        )
        return replace(inventory, devices=devices)
    node = change.value["node"]
    gpus = [gpu for gpu in inventory.gpus if gpu.node == node]
    index = max((gpu.index or 0 for gpu in gpus), default=-1) + 1
    by_index = gpus[0].by_index if gpus else None
    return replace(inventory, devices=(*inventory.devices, Device(node, index, "GPU", size, size, by_index)))


def _least(name: str, trial: Trial, helped: Callable[[Inventory], Trial | None]) -> tuple[Fix, ...]:
    if trial.request(name).config.device == "cpu":
        return ()
    sizes = sorted({gpu.total_bytes for gpu in trial.inventory.gpus} | {size * GIB for size in SIZES})
    present = {gpu.total_bytes for gpu in trial.inventory.gpus} | {sizes[-1]}
    if not any(helped(with_card(trial.inventory, card)) for size in present for card in _cards(trial.inventory, size)):
        return ()
    for size in sizes:
        for card in _cards(trial.inventory, size):
            after = helped(with_card(trial.inventory, card))
            if after is not None:
                gains = gains_of(name, trial.plan, after.plan)
                return (Fix("", (card,), price.CARD, "", gains),)
    return ()


def _cards(inventory: Inventory, size: int) -> Iterator[Change]:
    """Yields one more card of this size for each node, and one in the place of each smaller card. Of nodes and cards
    that are alike it offers only the first."""
    text = f"{size / GIB:g}GiB"
    seen = set()
    for node in dict.fromkeys(device.node for device in inventory.devices):
        gpus = [gpu for gpu in inventory.gpus if gpu.node == node]
        likeness = tuple((gpu.total_bytes, gpu.free_bytes, gpu.by_index, gpu.name) for gpu in gpus)
        if likeness in seen:
            continue
        seen.add(likeness)
        yield Change("gpus", {"size": text, "node": node})
        kinds = {(gpu.total_bytes, gpu.free_bytes): gpu for gpu in reversed(gpus) if gpu.total_bytes < size}
        for gpu in sorted(kinds.values(), key=lambda gpu: gpu.index or 0):
            yield Change("gpus", {"size": text, "instead_of": gpu.id})
