"""Finds out from a model's own structure which of its modules are layers, and which lie with the embedding."""

from collections.abc import Iterator, Sequence
from itertools import chain

from torch import nn
from transformers import PreTrainedModel

from serve_app.engines.pt.transformers_internals import unsplit_blocks
from serve_app.facts.engine_facts import BlockNames


def block_names(model: PreTrainedModel) -> BlockNames:
    """Returns the names of the model's blocks, which need no weights.

    The layers are the outermost list of modules with the most parameters. Lists of the same length beside it belong to
    it, because some models (XLM) have a list for each part of a layer. Parts that come before the layers lie with the
    embedding, and so does one that shares a parameter with them, such as a tied head, and a table of positions, which
    every layer wants. Raises ValueError for a model without such a list.
    """
    lists = dict(_outermost_lists(model, ""))
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of layers")
    whole = set(unsplit_blocks(model))
    main = max(lists, key=lambda name: (type(lists[name][0]).__name__ in whole, _elements(lists[name])))
    parent, count = main.rpartition(".")[0], len(lists[main])
    layers = tuple(name for name in lists if name.rpartition(".")[0] == parent and len(lists[name]) == count)
    return BlockNames(layers, tuple(_before(model, layers)), count)


def outer_parts(model: nn.Module, layers: Sequence[str]) -> Iterator[tuple[str, nn.Module | nn.Parameter | None]]:
    """Returns what the model has beside its layers, in its order: the outermost modules with tensors of their own, and
    parameters of a module that also holds layers. The value is None where a list of layers stands."""
    return _parts(model, "", layers)


def _parts(
    module: nn.Module, name: str, layers: Sequence[str]
) -> Iterator[tuple[str, nn.Module | nn.Parameter | None]]:
    for key, parameter in module.named_parameters(recurse=False):
        yield _path(name, key), parameter
    for key, child in module.named_children():
        path = _path(name, key)
        if path in layers:
            yield path, None
        elif any(layer.startswith(f"{path}.") for layer in layers) or not _has_own(child):
            yield from _parts(child, path, layers)
        else:
            yield path, child


def is_table(part: nn.Module | nn.Parameter) -> bool:
    """Returns whether a part has buffers alone."""
    return isinstance(part, nn.Module) and not any(True for _ in part.parameters())


def _outermost_lists(module: nn.Module, name: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for key, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield _path(name, key), child
        else:
            yield from _outermost_lists(child, _path(name, key))


def _path(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _has_own(module: nn.Module) -> bool:
    return any(True for _ in chain(module.parameters(recurse=False), module.buffers(recurse=False)))


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _before(model: PreTrainedModel, layers: Sequence[str]) -> Iterator[str]:
    """Yields the parts that lie with the embedding."""
    shared: set[int] = set()
    is_before = True
    for path, part in outer_parts(model, layers):
        if part is None:
            is_before = False
            continue
        own = {id(part)} if isinstance(part, nn.Parameter) else {id(parameter) for parameter in part.parameters()}
        if is_before or is_table(part) or own & shared:
            shared |= own
            yield path
