"""Turns the replica's plan into accelerate's device map."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from serve_app.engines.pt.load.block_names import block_names, is_table, outer_parts
from serve_app.facts.engine_facts import BlockNames
from serve_app.planning.layer_map import block_number
from serve_app.planning.plan import ModelPlan

DeviceName = int | str


def device_map_of(planned: ModelPlan, model: PreTrainedModel) -> dict[str, DeviceName]:
    """Returns the device of each module, which is a GPU by the plan's layers, and a slower tier for what is left over.

    `model` has no weights, but its final dtype. The plan's devices have the numbers of this process. Raises ValueError
    for a model whose layers are not found.
    """
    names = block_names(model)
    places: dict[int, DeviceName] = {}
    for rank in planned.ranks:
        if rank.layers is not None:
            assert rank.device.index is not None
            places |= dict.fromkeys(range(rank.layers[0], rank.layers[1] + 1), rank.device.index)
    return _by_module(model, names, places | _left_over(planned, names, model, places))


def _left_over(
    planned: ModelPlan, names: BlockNames, model: PreTrainedModel, on_gpus: Mapping[int, DeviceName]
) -> dict[int, DeviceName]:
    """Returns the places of blocks that no GPU takes, in order: the CPU up to what the plan spills there, then the
    disk."""
    sizes = dict.fromkeys(range(-1, names.count + 1), 0)
    for name, parameter in model.named_parameters():
        sizes[block_number(name, names)] += parameter.numel() * parameter.element_size()
    if "disk" not in planned.spilled:
        return dict.fromkeys(sizes.keys() - on_gpus.keys(), "cpu")
    room, found = planned.spilled.get("cpu", 0), dict[int, DeviceName]()
    for number in sorted(sizes.keys() - on_gpus.keys()):
        found[number] = "cpu" if sizes[number] <= room else "disk"
        room -= sizes[number] if found[number] == "cpu" else room
    return found


def _by_module(model: PreTrainedModel, names: BlockNames, places: Mapping[int, DeviceName]) -> dict[str, DeviceName]:
    first = min((place for place in places.values() if isinstance(place, int)), default=0)
    device_map: dict[str, DeviceName] = {}
    for path, part in outer_parts(model, names.layers):
        if part is None:
            device_map |= {f"{path}.{number}": places[number] for number in range(names.count)}
        else:  # Tables of positions have buffers and no parameter.
            device_map[path] = first if is_table(part) else places[block_number(path, names)]
    return device_map
