"""Lists the weights of a loaded model for parking, in the order in which a pass reads them."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel

from serve_app.engines.measure import tensor_bytes
from serve_app.engines.pt.bitsandbytes_internals import is_quantized, scales_of
from serve_app.engines.pt.core.memory_part import Part
from serve_app.engines.pt.core.page_copy import PageCopy
from serve_app.engines.pt.core.pages import can_free_pages
from serve_app.engines.pt.core.parked_memory import MakeCopy
from serve_app.engines.pt.core.storage_copy import StorageCopy
from serve_app.engines.pt.load.block_names import block_names
from serve_app.engines.pt.load.packed_linear import PackedLinear
from serve_app.engines.pt.load.quantization import weight_tensors
from serve_app.engines.torch_internals import storages_of


def weight_parts(model: PreTrainedModel) -> list[Part]:
    """Returns the weights, buffers and scales of a model: first those outside of its layers, and then layer by layer.

    What an accelerate hook brings from the host or from disk at every pass has no tensors here.
    """
    layers = [[model.get_submodule(name) for name in names] for names in _layers(model)]
    inside = {id(module) for layer in layers for part in layer for module in part.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    parts = [Part(list(chain.from_iterable(map(_own_tensors, outside))))]
    for layer in layers:
        modules = [module for part in layer for module in part.modules()]
        # A layer of several modules (XLM) is not begun by one of them, so it has to be there before the pass.
        gate = layer[0] if len(layer) == 1 else None
        parts.append(Part(list(chain.from_iterable(map(_own_tensors, modules))), gate))
    return parts


def why_not_movable(model: PreTrainedModel, device: str) -> str:
    """Returns why the weights of a model cannot be parked, or an empty text if they can."""
    if device == "cpu" and not can_free_pages():
        return "only Linux frees the pages of weights on the CPU"
    for part in weight_parts(model):
        for tensor in part.tensors:
            try:
                sizes = [1] if tensor.is_mkldnn else [storage.nbytes() for storage in storages_of(tensor)]
            except (NotImplementedError, RuntimeError) as error:
                return f"a weight of the type {type(tensor).__name__} has no memory that is known ({error})"
            if not sizes:
                return f"a weight of the type {type(tensor).__name__} has no memory that is known"
    return ""


def weight_bytes(model: torch.nn.Module) -> dict[torch.device, int]:
    """Returns the bytes of all weights by device, including the scales of quantised ones and those in oneDNN's order,
    which are not parameters."""
    sizes = tensor_bytes(weight_tensors(model))
    for module in model.modules():
        if isinstance(module, PackedLinear):
            cpu = torch.device("cpu")
            sizes[cpu] = sizes.get(cpu, 0) + module.packed_bytes
    return sizes


def copy_on_host(device: str) -> MakeCopy:
    """Returns how weights on a device of this type are copied to the host."""
    return PageCopy if device == "cpu" else StorageCopy


def _layers(model: PreTrainedModel) -> list[list[str]]:
    """Returns the names of each layer's modules, or nothing for a model whose layers are not found, which is moved as a
    whole."""
    try:
        names = block_names(model)
    except ValueError:
        return []
    return [[f"{layers}.{number}" for layers in names.layers] for number in range(names.count)]


def _own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yields what a module itself holds on a device, without its children."""
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    scales = scales_of(module) if is_quantized(module) else []
    packed = [module.packed] if isinstance(module, PackedLinear) else []
    yield from (tensor for tensor in (*own, *scales, *packed) if tensor.device.type != "meta")
