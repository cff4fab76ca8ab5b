"""Finds out how a model is laid out in memory from transformers' own code, without weights and without a GPU.

The model is built on the meta device, whose tensors have shapes and types but no storage, and computes a few tokens
there with pt's own cache. So the sizes are those of the code that will run.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from serve_app.engines.pt.core.cache_codec import CacheCodec
from serve_app.engines.pt.core.kv_cache import BatchCache
from serve_app.engines.pt.core.model_runner import arguments_of, forward_inputs
from serve_app.engines.pt.load.block_names import block_names
from serve_app.engines.pt.load.model_class import model_class
from serve_app.engines.pt.load.probe import ALONE
from serve_app.engines.pt.load.quantization import quantized_sizes
from serve_app.engines.pt.transformers_internals import loaded_dtypes
from serve_app.engines.torch_internals import WithoutData
from serve_app.facts.engine_facts import BlockNames, PtFacts
from serve_app.facts.pooling import Task
from serve_app.planning.layer_map import block_number

# The sizes of two passes must agree, so what depends on the tokens in another way is found.
PASSES = ((1, 3), (2, 40))


def read_config(folder: Path, dtype: str, trust_remote_code: bool) -> tuple[Any, torch.dtype]:
    """Returns a folder's config as transformers has it, and the type that the model is loaded in. `auto` is the
    config's own type.

    Raises what transformers raises for a config that it does not know.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    if dtype != "auto":
        return config, getattr(torch, dtype)
    return config, config.dtype or config.get_text_config().dtype or torch.float32


def layout_of(
    hf_config: Any,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    kv_cache_dtype: str | None = None,
) -> PtFacts:
    """Returns the sizes of a model that is loaded in `dtype`, and quantised by one of pt's methods if it is given. Its
    KV cache is in 8 bits if one of pt's types for it is given.

    Raises what transformers raises if it cannot build the model, and ValueError for a model whose layers are not found.
    """
    model = model_without_storage(hf_config, dtype, trust_remote_code)
    return layout_of_model(model, dtype, quantization, kv_cache_dtype)


def model_without_storage(
    hf_config: Any, dtype: torch.dtype, trust_remote_code: bool, task: Task = "generate"
) -> PreTrainedModel:
    """Returns a model on the meta device. Raises what transformers raises if it cannot build it."""
    # Faster ways to compute experts need a GPU or a type, and change no size.
    options = {"trust_remote_code": trust_remote_code, "dtype": dtype, "experts_implementation": "eager"}
    with torch.device("meta"), WithoutData():
        model: PreTrainedModel = model_class(hf_config, task).from_config(deepcopy(hf_config), **options)
    model = model.eval()
    model.tie_weights()
    return model


def layout_of_model(
    model: PreTrainedModel,
    dtype: torch.dtype,
    quantization: str | None = None,
    kv_cache_dtype: str | None = None,
    task: Task = "generate",
) -> PtFacts:
    """Returns the sizes of a model on the meta device. A model that generates no text has no cache. Raises ValueError
    if its layers are not found."""
    names = block_names(model)
    rounded = {} if quantization is None else quantized_sizes(model, quantization)
    weights, buffers = _by_block(_loaded_sizes(model, dtype, rounded), names), _by_block(_buffer_sizes(model), names)
    none = (0,) * names.count
    cache, alone = _CacheSizes(none, none, none), ""
    if task == "generate":
        cache, alone = _cache_sizes(model, names, CacheCodec(kv_cache_dtype))
    return PtFacts(
        layers=weights[1:-1], before=weights[0], after=weights[-1], kv=cache.kv, state=cache.state, buffers=buffers,
        names=names, tied_head=_tied_head(model), alone=alone, read=() if kv_cache_dtype is None else cache.read,
    )  # fmt: skip


def _loaded_sizes(model: PreTrainedModel, dtype: torch.dtype, rounded: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Returns the bytes of each tensor that a checkpoint has: parameters, the shared ones once, and buffers that are
    saved. `rounded` are those of quantised weights."""
    dtypes = loaded_dtypes(model, dtype)
    saved = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in saved or isinstance(tensor, nn.Parameter):
            yield name, rounded.get(name, tensor.numel() * dtypes.get(name, tensor.dtype).itemsize)


def _buffer_sizes(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Returns the bytes of each buffer that the model makes itself, such as tables of positions."""
    saved = model.state_dict().keys()
    return ((name, buffer.nbytes) for name, buffer in model.named_buffers() if name not in saved)


def _tied_head(model: PreTrainedModel) -> int:
    """Returns the bytes of a head whose weight is also the embedding's, or 0."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return int(weight.nbytes) if weight is not None and weight is model.get_input_embeddings().weight else 0


def _by_block(sizes: Iterator[tuple[str, int]], names: BlockNames) -> tuple[int, ...]:
    sums = [0] * (names.count + 2)
    for name, size in sizes:
        sums[block_number(name, names) + 1] += size
    return tuple(sums)


class _CacheSizes(NamedTuple):
    """The bytes of cache by layer: for a token as it is kept, for a token while it is read from 8 bits, and for a
    sequence."""

    kv: tuple[int, ...]
    read: tuple[int, ...]
    state: tuple[int, ...]


def _cache_sizes(model: PreTrainedModel, names: BlockNames, codec: CacheCodec) -> tuple[_CacheSizes, str]:
    """Returns the bytes of cache, and why pt runs one request at a time if it does."""
    none = (0,) * names.count
    no_cache = _CacheSizes(none, none, none)
    try:
        if not BatchCache(model.config).is_joinable:
            return no_cache, "its cache has layers of a kind that cannot be joined"
        first, second = (_measured(model, names, rows, tokens, codec) for rows, tokens in PASSES)
    except Exception as error:
        return no_cache, f"it does not run with a cache: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if first != second:
        raise ValueError(f"the cache of {type(model).__name__} does not grow by the same bytes for each token")
    return first, "other rows change its answers" if model.config.model_type in ALONE else ""


def _measured(model: PreTrainedModel, names: BlockNames, rows: int, tokens: int, codec: CacheCodec) -> _CacheSizes:
    """Returns what a pass of `rows` sequences of `tokens` tokens puts into the cache, by the layer that was running
    when it came in."""
    cache = BatchCache(model.config, codec)
    cache.window.rows = rows
    cache.reserve(rows, tokens)
    kv, read, state = ([0] * names.count for _ in range(3))
    seen: Mapping[str, int] = {"kv": 0, "read": 0, "state": 0}

    def note(number: int) -> None:
        nonlocal seen
        now = {"kv": cache.buffer_bytes, "read": cache.read_bytes, "state": cache.state_bytes}
        kv[number] += (now["kv"] - seen["kv"]) // cache.cells
        read[number] += (now["read"] - seen["read"]) // cache.cells
        state[number] += (now["state"] - seen["state"]) // rows
        seen = now

    hooks = [
        module.register_forward_hook(lambda *_, number=number: note(number))
        for path in names.layers
        for number, module in enumerate(model.get_submodule(path).children())
    ]
    try:
        with torch.no_grad(), WithoutData(), torch.device("meta"):
            for columns in (tokens, 1):  # One more token shows whether the model can go on with the cache.
                ids = torch.zeros(rows, columns, dtype=torch.long)
                positions = torch.arange(columns).expand(rows, columns) + cache.window.width
                model(**forward_inputs(arguments_of(model), ids.device, ids, positions, None, cache))
                cache.advance(columns)
    finally:
        for hook in hooks:
            hook.remove()
    note(names.count - 1)  # It is what a module outside of the layers has put there.
    return _CacheSizes(tuple(kv), tuple(read), tuple(state))
