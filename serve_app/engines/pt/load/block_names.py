"""Finds out from a model's own structure which of its modules are layers, and which lie with the embedding."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from serve_app.engines.pt.transformers_internals import unsplit_blocks
from serve_app.facts.engine_facts import BlockNames


def block_names(model: PreTrainedModel) -> BlockNames:
    """Returns the names of the model's blocks, which need no weights.

    The layers are the outermost list of modules with the most parameters. Lists of the same length beside it belong to
    it, because some models (XLM) have a list for each part of a layer. Modules that come before the layers lie with the
    embedding, and so do those that share a parameter with one of them, such as a tied head. Tables of positions, which have no parameter,
    are wanted by every layer and lie there too. Raises ValueError for a
    model without such a list.
    """
    lists = dict(_outermost_lists(model, ""))
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of layers")
    whole = set(unsplit_blocks(model))
    main = max(lists, key=lambda name: (type(lists[name][0]).__name__ in whole, _elements(lists[name])))
    parent, count = main.rpartition(".")[0], len(lists[main])
    layers = tuple(name for name in lists if name.rpartition(".")[0] == parent and len(lists[name]) == count)
    return BlockNames(layers, _before(model, layers), count)


def _outermost_lists(module: nn.Module, name: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if isinstance(child, nn.ModuleList) and len(child):
            yield path, child
        else:
            yield from _outermost_lists(child, path)


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _before(model: PreTrainedModel, layers: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the modules with tensors of their own that lie with the embedding."""
    inside = tuple(f"{name}." for name in layers)
    first: list[str] = []
    shared: set[int] = set()
    is_before = True
    for name, module in model.named_modules(remove_duplicate=False):
        if name in layers or name.startswith(inside):
            is_before = False
            continue
        own = {id(tensor) for tensor in module.parameters(recurse=False)}
        has_buffers = any(True for _ in module.buffers(recurse=False))
        is_table = has_buffers and not any(True for _ in module.parameters())
        if is_table or ((own or has_buffers) and is_before) or own & shared:
            first.append(name)
            shared |= own
    return tuple(first)
