"""Turns the replica's plan into accelerate's device map."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from serve_app.errors import ConfigError
from serve_app.facts.architecture import Architecture, read_architecture
from serve_app.planning.layer_map import block_number
from serve_app.planning.plan import ModelPlan

DeviceName = int | str


def known_architecture(hf_config: Any) -> Architecture | None:
    """Returns the shape of the model, or None if the plan does not know its architecture."""
    try:
        found = read_architecture(hf_config.to_dict(), "model")
    except ConfigError:
        return None
    return found if found.has_formulas else None


def device_map_of(planned: ModelPlan, architecture: Architecture, model: PreTrainedModel) -> dict[str, DeviceName]:
    """Returns the device of each module, which is a GPU by the plan's layers, and a slower tier for what is left over.

    `model` has no weights, but its final dtype. The plan's devices have the numbers of this process.
    """
    places: dict[int, DeviceName] = {}
    for rank in planned.ranks:
        if rank.layers is not None:
            assert rank.device.index is not None
            places |= dict.fromkeys(range(rank.layers[0], rank.layers[1] + 1), rank.device.index)
    return _by_module(model, architecture, places | _left_over(planned, architecture, model, places))


def _left_over(
    planned: ModelPlan, architecture: Architecture, model: PreTrainedModel, on_gpus: Mapping[int, DeviceName]
) -> dict[int, DeviceName]:
    """Returns the places of blocks that no GPU takes, in order: the CPU up to what the plan spills there, then the
    disk."""
    sizes: dict[int, int] = {}
    for name, parameter in model.named_parameters():
        number = block_number(name, architecture)
        sizes[number] = sizes.get(number, 0) + parameter.numel() * parameter.element_size()
    if "disk" not in planned.spilled:
        return dict.fromkeys(sizes.keys() - on_gpus.keys(), "cpu")
    room, found = planned.spilled.get("cpu", 0), dict[int, DeviceName]()
    for number in sorted(sizes.keys() - on_gpus.keys()):
        found[number] = "cpu" if sizes[number] <= room else "disk"
        room -= sizes[number] if found[number] == "cpu" else room
    return found


def _by_module(
    model: PreTrainedModel, architecture: Architecture, places: Mapping[int, DeviceName]
) -> dict[str, DeviceName]:
    device_map: dict[str, DeviceName] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        layer = re.match(r"(.*?\.(?:layers|h|blocks)\.\d+)\.", name)
        device_map[layer[1] if layer else name.rpartition(".")[0]] = places[block_number(name, architecture)]
    first = min((place for place in places.values() if isinstance(place, int)), default=0)
    for name, module in model.named_modules():  # Tables of positions have buffers and no parameter.
        has_own = any(True for _ in module.buffers(recurse=False)) and not any(True for _ in module.parameters())
        if has_own and not any(name == key or name.startswith(f"{key}.") for key in device_map):
            device_map[name] = first
    return device_map
