"""Small configs of every causal model type of transformers, made from the defaults of each config class."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 97
LAYERS = 4
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
# A field that the defaults have as a number gets the number of its name here.
SIZES: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim_model", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "backbone_hidden_size", "emb_dim", "embedding_dim"), 64),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 96),
    **dict.fromkeys(("ffn_hidden_size", "d_inner", "dim_ff", "feed_forward_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size"), 96),
    **dict.fromkeys((*_LAYER_COUNTS, "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "kv_channels", "v_head_dim", "qk_nope_head_dim", "d_head"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "index_head_dim", "attention_head_size"), 16),
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "rotary_dim": 8,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size"), 8),
}
# What the defaults of these types need besides.
_MAMBA: Mapping[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2}
_HALF_LINEAR = ["linear_attention", "full_attention"] * 2
_ROPE_3D: Mapping[str, Any] = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [3, 3, 2]}
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE_3D, "sliding_attention": _ROPE_3D}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "intermediate_size": [96] * LAYERS, "activation_sparsity_pattern": [0.0] * LAYERS,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 16,
    },
    "granitemoehybrid": {**_MAMBA, "layer_types": _HALF_LINEAR},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "kimi_linear": {"num_experts_per_token": 2, "layer_types": _HALF_LINEAR},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "state_size": 16, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
        "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64, "ple_embed_dim": 16, "hc_lowrank": 8,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
# Parts of a config that have no default, by the type of the part.
_PARTS: Mapping[str, Mapping[str, str]] = {
    "gemma4_assistant": {"text_config": "gemma4_text"},
    "gemma4_unified_assistant": {"text_config": "gemma4_unified_text"},
    "gemma4": {"text_config": "gemma4_text"},
    "gemma4_unified": {"text_config": "gemma4_unified_text"},
    "qwen4_exp": {"text_config": "qwen4_exp_text"},
    "musicgen": {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"},
    "musicgen_melody": {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_melody_decoder"},
}


def small_config(model_type: str) -> PreTrainedConfig:
    """A config of four narrow layers. Raises what the config class raises."""
    config_class = CONFIG_MAPPING[model_type]
    special = dict(SPECIAL.get(model_type, {}))
    for name, part in _PARTS.get(model_type, {}).items():
        special[name] = small_config(part).to_dict()
    # Some classes change the parts that they are given.
    parts = deepcopy({name: value for name, value in special.items() if isinstance(value, dict)})
    return config_class(**(_shrunk(config_class(**parts).to_dict()) | special))


def _shrunk(defaults: Mapping[str, Any]) -> dict[str, Any]:
    layers = next((defaults[name] for name in _LAYER_COUNTS if isinstance(defaults.get(name), int)), 0)
    fields: dict[str, Any] = {}
    for name, value in defaults.items():
        if isinstance(value, dict) and "model_type" in value:
            fields[name] = _shrunk(value)
        elif isinstance(value, list) and len(value) == layers:
            fields[name] = _few(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            fields |= _number(name, value, defaults)
        elif name == "model_type":
            fields[name] = value
    return fields


def _number(name: str, value: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
    if name.endswith(("_token_id", "_token_index", "_token")):
        return {name: min(value, VOCABULARY - 1)}
    if name == "head_dim" and "qk_rope_head_dim" in defaults:  # It is the size of the rotary part there.
        return {name: SIZES["qk_rope_head_dim"]}
    if name in ("num_key_value_heads", "num_kv_heads") and value == defaults.get("num_attention_heads"):
        return {name: SIZES["num_attention_heads"]}
    return {name: min(value, SIZES[name])} if name in SIZES else {}


def _few(values: list[Any]) -> list[Any]:
    """The first of each kind of layer, in their order, and then the last again."""
    kinds = [value for number, value in enumerate(values) if value not in values[:number]]
    return (kinds + [kinds[-1]] * LAYERS)[:LAYERS]
