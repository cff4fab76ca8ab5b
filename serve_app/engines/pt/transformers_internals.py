"""Has every private or undocumented part of transformers that this project uses.
`tests/contracts/test_transformers.py` has a test of each. What transformers documents, such as the Auto classes, is
used where it is needed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

# Layers of hybrids keep a state for each row that does not grow: dictionaries of tensors with rows first, and
# dictionaries of what is known of them. They are attributes of
# `transformers.cache_utils.LinearAttentionCacheLayerMixin`.
STATES = ("conv_states", "recurrent_states")
FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """This is the base of a cache layer that keeps its keys and values itself. A model's forward pass uses only
    `update`, `get_seq_length` and `get_mask_sizes`.

    Uses `transformers.cache_utils.DynamicLayer`, seen in transformers 5.19.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True  # The stock layer would allocate at the first `update`.

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Takes the new tokens' keys and values, of shape (rows, heads, tokens, size), and returns all of both."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """Returns the number of kept tokens before those of the running forward pass."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the length and offset of what `update` will return for that many new tokens."""
        raise NotImplementedError


def cache_with(config: Any, layer: Callable[[], GrowingLayer]) -> DynamicCache:
    """Returns a stock cache for a model of this config, in which new layers of ours stand for those that keep keys and
    values, all of them or a sliding window of them. The other layers stay.

    Uses `layers` of `DynamicCache`, and the exact classes `DynamicLayer` and `DynamicSlidingWindowLayer` of
    `transformers.cache_utils`; seen in transformers 5.19.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        layer() if type(item) in (DynamicLayer, DynamicSlidingWindowLayer) else item for item in cache.layers
    ]
    return cache


def has_state(layer: Any) -> bool:
    """Returns whether the cache layer keeps a state for each row, perhaps beside keys and values.

    Uses `transformers.cache_utils.LinearAttentionCacheLayerMixin`, seen in transformers 5.19.
    """
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def has_only_state(layer: Any) -> bool:
    """Returns whether the cache layer keeps a state for each row, and no keys and values.

    Uses the classes of `has_state` and `GrowingLayer`; seen in transformers 5.19.
    """
    return has_state(layer) and not isinstance(layer, DynamicLayer)


def states_of(layer: Any) -> list[torch.Tensor]:
    """Returns the tensors of a layer's state, each with a row for each sequence.

    Uses the attributes `STATES`; seen in transformers 5.19.
    """
    return [state for name in STATES for state in getattr(layer, name).values() if state is not None]


def join_states(mine: Any, theirs: Any) -> None:
    """Appends the rows of one layer's state to those of another layer of the same model, which may have none.

    Uses the attributes `STATES` and `FLAGS`, and `dtype` and `device`; seen in transformers 5.19.
    """
    for name in STATES:
        states = getattr(mine, name)
        for index, state in getattr(theirs, name).items():
            if state is not None:
                own = states[index]
                states[index] = state.clone() if own is None or own.shape[0] == 0 else torch.cat([own, state])
    for name in FLAGS:
        setattr(mine, name, dict(getattr(theirs, name)))
    mine.dtype, mine.device = theirs.dtype, theirs.device


def remove_state(layer: Any, row: int, last: int) -> None:
    """Removes one row of a layer's state. The last row, whose number is `last`, takes its number.

    Uses the attributes `STATES`; seen in transformers 5.19.
    """
    for name in STATES:
        states = getattr(layer, name)
        for index, state in states.items():
            if state is not None:
                if row != last:
                    state[row] = state[last]
                states[index] = state[:last]


def stock_attention(*arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """Returns what transformers' own attention function of the name "sdpa" returns.

    Uses `transformers.integrations.sdpa_attention.sdpa_attention_forward`, seen in transformers 5.19.
    """
    answer: tuple[torch.Tensor, None] = sdpa_attention_forward(*arguments, **options)
    return answer


def replace_attention(function: Callable[..., Any]) -> None:
    """Puts the function in the place of "sdpa" for every model of this process. The masks stay those of "sdpa".

    Uses `transformers.AttentionInterface.register` with a name that is taken, which its documentation does not mention,
    seen in transformers 5.19.
    """
    AttentionInterface.register("sdpa", function)


def unsplit_blocks(model: PreTrainedModel) -> list[str]:
    """Returns the classes of modules that have to be on one device as a whole.

    Uses the attribute `_no_split_modules` of a model, seen in transformers 5.19.
    """
    return sorted(model._no_split_modules or ())


def loaded_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Returns the type of each tensor that `from_pretrained` loads in another type than the model has it in, by its
    name. Some models keep a few of them in float32.

    Uses `_get_dtype_plan` of a model, and `build_glob_alternation` of `transformers.core_model_loading`; seen in
    transformers 5.19.
    """
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    if not plan:
        return {}
    pattern, key_of, _ = build_glob_alternation(list(plan))
    found = ((name, pattern.search(name)) for name in model.state_dict())
    return {name: plan[key_of[match.lastgroup]] for name, match in found if match}


def convertible_linears(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Returns the outputs and inputs of each linear layer that transformers' quantizers for bitsandbytes quantise while
    a model loads, by its name.

    Uses `transformers.quantizers.base.HfQuantizer.get_modules_to_not_convert`,
    `transformers.quantizers.quantizers_utils.should_convert_module`, `transformers.pytorch_utils.Conv1D` and the
    attribute `_keep_in_fp32_modules` of a model; seen in transformers 5.19.
    """
    whole = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if not should_convert_module(name, whole):
            continue
        if type(module) is nn.Linear:
            found[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            found[name] = (outputs, inputs)
    return found


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Returns the inputs and outputs of a linear layer, of whatever kind its weight is, or None for other modules.

    Uses `transformers.pytorch_utils.Conv1D` with `nx` and `nf`, and the attributes `in_features` and `out_features`
    that transformers' own quantised layers share with `nn.Linear`; seen in transformers 5.19.
    """
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (sizes[0], sizes[1]) if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None


def loaded_device_map(model: PreTrainedModel) -> dict[str, int | str]:
    """Returns the device of each module of a loaded model by its name. The name "" stands for the whole model.

    Uses the attribute `hf_device_map` of a loaded model, seen in transformers 5.19.
    """
    found: Mapping[str, int | str] = getattr(model, "hf_device_map", {"": str(model.device)})
    return dict(found)


def byte_of_character() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary stands for.

    Uses `transformers.convert_slow_tokenizer.bytes_to_unicode`, seen in transformers 5.19.
    """
    return {character: byte for byte, character in bytes_to_unicode().items()}


def decodes_byte_pieces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the decoder joins pieces such as <0xE2> to characters. It is true for a tokenizer without one of
    the library's decoders, which may do so.

    Uses the attribute `backend_tokenizer` and the text of its decoder in the library tokenizers; seen in transformers
    5.19 with tokenizers 0.23.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is None or "ByteFallback" in repr(backend.decoder)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the ids of tokens that `skip_special_tokens` leaves out.

    Uses the attribute `added_tokens_decoder`, seen in transformers 5.19.
    """
    return frozenset(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)


def own_response_template(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any] | None:
    """Returns how the model of this tokenizer writes tool calls, or None if its files do not say.

    Uses the attribute `response_template`, seen in transformers 5.19.
    """
    template: Mapping[str, Any] | None = getattr(tokenizer, "response_template", None)
    return template


def response_parser(tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any], prefix: str, tools: Any) -> Any:
    """Returns a parser that reads a message as it comes: `feed(text)` returns a list of events, and `finalize()`
    returns the message and the last events. An event has a `type`: "region_close" has `field` and `value`, and
    "region_chunk" has `field` and `text` and may be `dirty`.

    Uses `get_response_parser` and its parser's events, seen in transformers 5.19.
    """
    return tokenizer.get_response_parser(dict(template), prefix=prefix, tools=tools)
