"""The plan of one replica on the GPUs that it sees, as accelerate's device map and a budget of KV cache.

The same arithmetic as `serve-app plan`: what `max_memory` allows holds weights, KV cache, activations and context.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, EngineError
from serve_app.facts.architecture import Architecture, read_architecture
from serve_app.facts.inventory import Device
from serve_app.facts.weights import Tensor
from serve_app.planning.fit import ModelRequest, Shortage, fit_pt
from serve_app.planning.layer_map import block_number
from serve_app.planning.memory import context
from serve_app.planning.plan import ModelPlan

Place = int | str
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def known_architecture(hf_config: Any) -> Architecture | None:
    """The shape of the model, or None where the plan does not know its architecture."""
    try:
        return read_architecture(hf_config.to_dict(), "model")
    except ConfigError:
        return None


def plan_layers(
    config: ModelConfig,
    architecture: Architecture,
    model: PreTrainedModel,
    free_bytes: Mapping[int, int],
    limits: Mapping[Place, int],
) -> tuple[dict[str, Place], int]:
    """The device of each module, and the tokens of KV cache that fit beside.

    `model` has no weights; `free_bytes` and `limits` are by the GPU's number in this process. Raises EngineError, in
    the plan's words, when it does not fit.
    """
    tensors = tuple(
        Tensor(name, _TYPES.get(parameter.dtype, "F32"), tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    )
    request = ModelRequest("model", config, architecture, tensors)
    numbers = [number for number in limits if isinstance(number, int)]
    # What is free was read by this process, whose CUDA context is there already; the plan counts it.
    free = {number: free_bytes[number] + context("cuda").bytes for number in numbers}
    seats = [(Device("GPU", number, "GPU", free[number], free[number]), free[number]) for number in numbers]
    is_capped = config.max_memory is not None or config.share is not None
    fit = fit_pt(request, seats, [limits[number] if is_capped else free[number] for number in numbers], ())
    if isinstance(fit, Shortage):
        raise EngineError(f"max_memory: {fit.message}" if config.max_memory else fit.message)
    places = _places(fit, request, limits)
    return _by_module(model, architecture, places), fit.kv_tokens


def _places(fit: ModelPlan, request: ModelRequest, limits: Mapping[Place, int]) -> dict[int, Place]:
    """The device of each block: on a GPU, or what is left over on the CPU up to its limit, then on disk."""
    places: dict[int, Place] = {}
    for rank in fit.ranks:
        if rank.layers is not None:
            assert rank.device.index is not None
            places |= dict.fromkeys(range(rank.layers[0], rank.layers[1] + 1), rank.device.index)
    room = limits.get("cpu", 0)
    sizes: dict[int, int] = {}
    for tensor in request.tensors:
        number = block_number(tensor.name, request.architecture)
        sizes[number] = sizes.get(number, 0) + tensor.bytes_as(request.element_bytes)
    for number in sorted(sizes):
        if number not in places:
            places[number] = "cpu" if sizes[number] <= room else "disk"
            room -= sizes[number] if places[number] == "cpu" else room
    return places


def _by_module(model: PreTrainedModel, architecture: Architecture, places: Mapping[int, Place]) -> dict[str, Place]:
    device_map: dict[str, Place] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        layer = re.match(r"(.*?\.(?:layers|h|blocks)\.\d+)\.", name)
        device_map[layer[1] if layer else name.rpartition(".")[0]] = places[block_number(name, architecture)]
    first = min((place for place in places.values() if isinstance(place, int)), default=0)
    for name, module in model.named_modules():  # Tables of positions have buffers and no parameter.
        has_own = any(True for _ in module.buffers(recurse=False)) and not any(True for _ in module.parameters())
        if has_own and not any(name == key or name.startswith(f"{key}.") for key in device_map):
            device_map[name] = first
    return device_map
