"""What this project uses of transformers beyond its documentation."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from serve_app.engines.pt import transformers_internals
from serve_app.engines.pt.api.tool_calls import HERMES, TemplateReader
from serve_app.engines.pt.load.attention import grouped_sdpa
from serve_app.engines.pt.transformers_internals import (
    FLAGS,
    STATES,
    GrowingLayer,
    byte_of_character,
    cache_with,
    convertible_linears,
    decodes_byte_pieces,
    has_only_state,
    has_state,
    join_states,
    linear_shape,
    loaded_device_map,
    loaded_dtypes,
    own_response_template,
    remove_state,
    replace_attention,
    response_parser,
    special_ids,
    states_of,
    stock_attention,
    unsplit_blocks,
)
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.contracts.contract import contract, untested
from tests.engines.pt.tiny_models import CONFIGS, JOINED, VOCABULARY, tiny_model
from tests.engines.pt.tiny_tokenizers import byte_fallback, byte_level

# What a linear attention layer keeps beside `STATES` and `FLAGS`: its size, its place, and what crops it.
KNOWN_OF_LINEAR_LAYERS = frozenset({"number_of_states", "device", "dtype", "record_past"})


def test_each_part_has_a_test() -> None:
    """So that an upgrade shows what breaks."""
    assert untested(transformers_internals) == []


class Recorder(GrowingLayer):
    """Keeps keys and values in the plainest way, and notes which of its methods are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()
        self.kept: list[torch.Tensor] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """See the class."""
        self.called.add("update")
        new = [key_states, value_states]
        self.kept = [torch.cat(pair, -2) for pair in zip(self.kept, new, strict=True)] if self.kept else new
        return self.kept[0], self.kept[1]

    def get_seq_length(self) -> int:
        """See the class."""
        self.called.add("get_seq_length")
        return self.kept[0].shape[-2] if self.kept else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See the class."""
        self.called.add("get_mask_sizes")
        return (self.kept[0].shape[-2] if self.kept else 0) + query_length, 0


def prompt(rows: int, columns: int) -> torch.Tensor:
    """Token ids of shape (rows, columns), the same each time."""
    return (7 * torch.arange(rows * columns).reshape(rows, columns)) % VOCABULARY


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek-v3"])
@contract("transformers", "which methods of a cache layer a model calls", GrowingLayer)
@torch.inference_mode()
def test_a_model_asks_a_cache_layer_three_things(name: str) -> None:
    """Keys and values that we keep give the logits of one pass without a cache, also where the layer slides."""
    model, ids = tiny_model(name), prompt(2, 24)
    cache = cache_with(model.config, Recorder)
    for begin in (0, 12, 23):
        end = {0: 12, 12: 23, 23: 24}[begin]
        logits = model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits[:, -1], model(input_ids=ids, use_cache=False).logits[:, -1], atol=1e-4, rtol=1e-4)
    assert {name for layer in cache.layers for name in layer.called} == {"update", "get_seq_length", "get_mask_sizes"}


@pytest.mark.parametrize("name", JOINED)
@contract("transformers", "the layers of a DynamicCache", cache_with)
def test_a_cache_has_a_layer_of_a_known_kind_for_each_of_the_models(name: str) -> None:
    """Else the model would run one sequence at a time."""
    config = CONFIGS[name]
    layers = cache_with(config, Recorder).layers
    assert len(layers) == len(DynamicCache(config=config).layers) == config.num_hidden_layers
    unknown = {
        type(layer).__name__ for layer in layers if not isinstance(layer, Recorder) and not has_only_state(layer)
    }
    assert unknown == set()


@contract("transformers", "the cache layers with a state", has_state, has_only_state)
def test_layers_with_a_state_are_told_from_those_that_grow() -> None:
    """Rows of a hybrid cannot be padded, so prompts of different lengths are computed apart."""
    hybrid = DynamicCache(config=CONFIGS["qwen3-next"]).layers
    assert [has_state(layer) for layer in hybrid] == [True, True, True, False]
    assert [has_only_state(layer) for layer in hybrid] == [True, True, True, False]
    assert not any(map(has_state, DynamicCache(config=CONFIGS["gemma3"]).layers))


def run_hybrid(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    """A stock cache after these tokens."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


@contract("transformers", "the attributes of a linear attention layer's state", join_states)
@torch.inference_mode()
def test_states_of_two_batches_are_joined() -> None:
    """They become those of the same rows computed together, and nothing of a layer is forgotten."""
    model, ids = tiny_model("qwen3-next"), prompt(3, 9)
    empty, first, second = DynamicCache(config=model.config), run_hybrid(model, ids[:1]), run_hybrid(model, ids[1:])
    together = run_hybrid(model, ids)
    for mine, *others, expected in zip(empty.layers, first.layers, second.layers, together.layers, strict=True):
        if has_only_state(mine):
            for theirs in others:
                join_states(mine, theirs)
            assert len(states_of(mine)) == len(states_of(expected)) > 0
            for got, wanted in zip(states_of(mine), states_of(expected), strict=True):
                torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
            assert [getattr(mine, name) for name in FLAGS] == [getattr(expected, name) for name in FLAGS]
    unknown = set(vars(LinearAttentionLayer())) - KNOWN_OF_LINEAR_LAYERS - {*STATES, *FLAGS}
    assert unknown == set(), f"a layer keeps more than join_states copies: {sorted(unknown)}"


@contract("transformers", "the attributes of a linear attention layer's state", remove_state)
@torch.inference_mode()
def test_a_row_leaves_a_state() -> None:
    """The last row takes its place."""
    model, ids = tiny_model("qwen3-next"), prompt(3, 9)
    cache, expected = run_hybrid(model, ids), run_hybrid(model, ids[[2, 1]])
    for layer, wanted in zip(cache.layers, expected.layers, strict=True):
        if has_only_state(layer):
            remove_state(layer, 0, 2)
            for pair in zip(states_of(layer), states_of(wanted), strict=True):
                torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)


@contract("transformers", "the tensors of a linear attention layer's state", states_of)
@torch.inference_mode()
def test_a_state_has_a_row_for_each_sequence() -> None:
    """Nothing else of the layer is a tensor."""
    cache = run_hybrid(tiny_model("qwen3-next"), prompt(3, 9))
    for layer in filter(has_only_state, cache.layers):
        states = states_of(layer)
        assert [len(state) for state in states] == [3, 3]
        held = [value for values in vars(layer).values() if isinstance(values, dict) for value in values.values()]
        assert {id(value) for value in held if isinstance(value, torch.Tensor)} == {id(state) for state in states}


@contract("transformers", "_get_dtype_plan and build_glob_alternation", loaded_dtypes)
def test_some_tensors_are_loaded_in_float32(tmp_path: Path) -> None:
    """The same ones that `from_pretrained` keeps, by their names."""
    tiny_model("deepseek-v3").to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name: tensor.dtype for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    assert loaded_dtypes(tiny_model("deepseek-v3"), torch.bfloat16) == kept
    assert [name.rpartition(".")[2] for name in kept] == ["e_score_correction_bias"]
    assert loaded_dtypes(tiny_model("llama"), torch.bfloat16) == {}


class Attention(nn.Module):
    """What transformers' function reads of an attention module."""

    num_key_value_groups = 3
    is_causal = True


@contract("transformers", "sdpa_attention_forward", stock_attention)
@torch.inference_mode()
def test_the_stock_function_is_attention() -> None:
    """Query (rows, heads, tokens, size) to (rows, tokens, heads, size), with a mask and grouped heads."""
    query, key, value = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[..., -1] = True
    output, weights = stock_attention(Attention(), query, key, value, mask, dropout=0.0, scaling=0.5)
    scores = (query @ key.repeat_interleave(3, 1).transpose(-1, -2) * 0.5).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ value.repeat_interleave(3, 1)).transpose(1, 2)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert weights is None


@contract("transformers", "the arguments of sdpa_attention_forward", grouped_sdpa)
def test_attention_is_asked_for_nothing_unknown() -> None:
    """`grouped_sdpa` leaves a bias and a paged cache to the stock function; a new argument it would drop."""
    known = ["module", "query", "key", "value", "attention_mask", "dropout", "scaling"]
    handed_over = ["is_causal", "position_bias", "cache", "kwargs"]
    found = list(inspect.signature(sdpa_attention_forward).parameters)
    assert found[: len(known)] == known, f"its first arguments are {found[: len(known)]}"
    assert set(found) == {*known, *handed_over}, f"other arguments: {sorted(set(found) ^ {*known, *handed_over})}"


@pytest.fixture
def stock() -> Iterator[None]:
    """Puts transformers' own function back at the end."""
    yield
    replace_attention(sdpa_attention_forward)


@contract("transformers", "AttentionInterface.register with the name sdpa", replace_attention)
@torch.inference_mode()
def test_a_registered_function_is_called_in_the_place_of_the_stock_one(stock: None) -> None:
    """By a model that was made before, with the mask of the stock one."""
    model, ids, masks = tiny_model("llama"), prompt(2, 6), []

    def attention(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        masks.append(mask)
        return stock_attention(module, query, key, value, mask, **options)

    replace_attention(attention)
    model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6]))
    assert len(masks) == model.config.num_hidden_layers, f"it was called {len(masks)} times"
    assert [(mask.dtype, tuple(mask.shape)) for mask in masks] == [(torch.bool, (2, 1, 6, 6))] * len(masks)


@contract("transformers", "the attribute _no_split_modules", unsplit_blocks)
def test_a_model_says_which_modules_stay_whole() -> None:
    """accelerate is told, so that no block is split over two devices."""
    assert unsplit_blocks(tiny_model("llama")) == ["LlamaDecoderLayer"]
    assert unsplit_blocks(tiny_model("gpt2")) == ["GPT2Block"]


@contract("transformers", "the attribute hf_device_map", loaded_device_map)
def test_a_loaded_model_says_where_its_modules_are(tmp_path: Path) -> None:
    """Of a model on one device and of one with a map."""
    tiny_model("llama").save_pretrained(tmp_path)
    asked = {"model": "cpu", "lm_head": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=asked, offload_folder=tmp_path / "offload")
    assert loaded_device_map(spread) == asked
    whole = loaded_device_map(AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}))
    assert {str(device) for device in whole.values()} == {"cpu"}
    assert loaded_device_map(tiny_model("llama")) == {"": "cpu"}


@contract("transformers", "bytes_to_unicode", byte_of_character)
def test_byte_level_tokens_are_written_in_256_characters() -> None:
    """One for each byte; letters stand for themselves, and a space is Ġ."""
    found = byte_of_character()
    assert sorted(found.values()) == list(range(256))
    assert (found["a"], found["Ġ"]) == (ord("a"), ord(" "))
    assert set("".join(byte_level().get_vocab())) - set("<|_>") <= set(found)


@contract("transformers", "backend_tokenizer and the text of its decoder", decodes_byte_pieces)
def test_a_decoder_of_byte_pieces_is_known_by_its_text() -> None:
    """Without it, part of a character would be given out as a replacement."""
    assert decodes_byte_pieces(byte_fallback())
    assert not decodes_byte_pieces(byte_level())


@contract("transformers", "the attribute added_tokens_decoder", special_ids)
def test_special_tokens_are_those_that_decoding_leaves_out() -> None:
    """An added token that is not special stays in the text."""
    tokenizer = byte_fallback()
    for number in tokenizer.added_tokens_decoder:
        is_left_out = tokenizer.decode([number], skip_special_tokens=True) == ""
        assert (number in special_ids(tokenizer)) == is_left_out, tokenizer.convert_ids_to_tokens(number)
    assert special_ids(tokenizer)


@contract("transformers", "the attribute response_template", own_response_template)
def test_a_tokenizer_says_how_its_model_writes_calls(tmp_path: Path) -> None:
    """It is read from tokenizer_config.json; None where that has none."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))
    assert own_response_template(tokenizer) is None
    tokenizer.response_template = HERMES
    tokenizer.save_pretrained(tmp_path)
    assert own_response_template(AutoTokenizer.from_pretrained(tmp_path)) == HERMES


@contract("transformers", "get_response_parser or its events", response_parser, TemplateReader)
def test_a_parser_tells_calls_from_text() -> None:
    """In pieces, with the fields that `TemplateReader` reads of each event."""
    parser = response_parser(byte_level(), HERMES, "", None)
    call = '{"name": "f", "arguments": {"x": 1}}'
    events = [event for piece in ("Hello", f"<tool_call>{call}", "</tool_call>") for event in parser.feed(piece)]
    message, last = parser.finalize()
    events += last
    text = "".join(event["text"] for event in events if event["type"] == "region_chunk" and event["field"] == "content")
    calls = [event["value"] for event in events if event["type"] == "region_close" and event["field"] == "tool_calls"]
    assert text == "Hello"
    assert [found["function"] for found in calls] == [{"name": "f", "arguments": {"x": 1}}]
    assert message["content"] == "Hello"


@pytest.mark.parametrize("name", JOINED)
@contract("transformers", "the arguments of a model's forward pass", "serve_app/engines/pt/core/model_runner.py")
def test_a_forward_pass_takes_what_makes_it_cheap_and_right(name: str) -> None:
    """Logits of the last column only, and positions of padded rows. BLOOM has no positions but those of its mask."""
    takes = set(inspect.signature(tiny_model(name).forward).parameters)
    asked = {"input_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep"}
    asked |= set() if name in ("bloom", "mamba2") else {"position_ids"}
    if name == "mamba2":  # It has no attention, and another name for its cache.
        asked = asked - {"past_key_values"} | {"cache_params"}
    assert sorted(asked - takes) == [], f"{type(tiny_model(name)).__name__} does not take {sorted(asked - takes)}"


@contract("transformers", "which modules a quantizer leaves whole", convertible_linears)
def test_head_embeddings_routers_and_experts_are_not_quantised() -> None:
    """The layers of GPT-2 have their weights the other way round, and count too."""
    mixture = convertible_linears(tiny_model("qwen2-moe"))
    assert mixture["model.layers.0.self_attn.k_proj"] == (16, 32)
    assert mixture["model.layers.1.mlp.shared_expert_gate"] == (1, 32)
    assert not [name for name in mixture if name.endswith((".gate", "lm_head", "embed_tokens")) or ".experts" in name]
    assert convertible_linears(tiny_model("gpt2"))["transformer.h.0.mlp.c_fc"] == (128, 32)


@contract("transformers", "Conv1D.nx and Conv1D.nf", linear_shape)
def test_linear_layers_say_their_inputs_and_outputs() -> None:
    """Those of GPT-2 have their weights the other way round, and embeddings and norms are none."""
    shapes = {name: linear_shape(module) for name, module in tiny_model("gpt2").named_modules()}
    assert shapes["transformer.h.0.attn.c_attn"] == (32, 96)
    assert shapes["transformer.h.0.mlp.c_proj"] == (128, 32)
    assert shapes["transformer.wte"] is None
    assert shapes["transformer.h.0.ln_1"] is None
    assert linear_shape(tiny_model("llama").model.layers[0].mlp.up_proj) == (32, 48)
