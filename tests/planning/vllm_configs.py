"""Makes a config.json for every architecture of vLLM's registry, from the defaults of its config class.

Sizes stay as the class has them, so they fit together, and only the number of layers is made small. The classes are
those of transformers and vLLM. `BY_HAND` has what cannot be found by name or does not work by default.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "configs"
LAYERS = 8
# Names of the number of layers, and of lists with one entry for each layer.
COUNTS = frozenset(
    {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers"}
    | {"num_encoder_layers", "num_decoder_layers", "layers", "num_hidden_layers_vision", "audio_num_layers"}
)
SUFFIXES = (
    "ForConditionalGeneration", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "LMHeadModel",
    "ForQuestionAnswering", "ForMaskedLM", "ForEmbedding", "ForImageTextToText", "ForRewardModel", "ForVec", "Model",
)  # fmt: skip


def plain(name: str) -> str:
    """A name without what differs between a model type and a class."""
    return name.lower().replace("_", "").replace("-", "").replace(".", "")


def stem(architecture: str) -> str:
    """The name of an architecture without its task."""
    for suffix in SUFFIXES:
        architecture = architecture.removesuffix(suffix)
    return architecture


def with_few_layers(config: Mapping[str, Any], most: int = LAYERS) -> dict[str, Any]:
    """The config with at most that many layers, also in its parts."""
    count = next((value for name, value in config.items() if name in COUNTS and isinstance(value, int)), 0)
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name in COUNTS and isinstance(value, int):
            small[name] = min(value, most)
        elif isinstance(value, dict):
            small[name] = with_few_layers(value, most) if name.endswith("_config") else value
        elif isinstance(value, list) and count > most and len(value) == count:
            small[name] = value[:most]
        else:
            small[name] = value
    return small


def model_types() -> dict[str, str]:
    """The model type of each class of transformers that has a task."""
    from transformers.models.auto import modeling_auto

    types: dict[str, str] = {}
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES"):
            for model_type, classes in mapping.items():
                for one in [classes] if isinstance(classes, str) else classes:
                    types.setdefault(one, model_type)
    return types


def config_classes() -> Iterator[tuple[str, Any]]:
    """The config classes by model type: vLLM's own first, as vLLM prefers them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    for name in _CONFIG_REGISTRY:
        yield name, _CONFIG_REGISTRY[name]
    for name in CONFIG_MAPPING:
        yield name, CONFIG_MAPPING[name]


# The config class of a model that brings its own code, as vLLM reads it from the model's folder.
OWN_CODE = """
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

class OwnConfig(PreTrainedConfig):
    model_type = "{model_type}"

    def __init__(self, **fields):
        parts = {{}}
        for name in [name for name in fields if name.endswith("_config") and isinstance(fields[name], dict)]:
            part = dict(fields.pop(name))
            if part.get("model_type") in CONFIG_MAPPING:
                parts[name] = AutoConfig.for_model(part.pop("model_type"), **part)
            else:
                parts[name] = part
        super().__init__(**fields)
        for name, part in parts.items():
            setattr(self, name, part)
        for name, part in parts.items():
            if isinstance(part, dict):
                setattr(self, name, PreTrainedConfig(**part))
"""


class Configs:
    """Finds a config for an architecture."""

    def __init__(self) -> None:
        self.types = model_types()
        self.classes: dict[str, tuple[str, Any]] = {}
        for name, config_class in config_classes():
            self.classes.setdefault(plain(name), (name, config_class))

    def class_of(self, architecture: str) -> tuple[str, Any]:
        """The model type and the config class. Raises LookupError if there is none."""
        known = BY_HAND.get(architecture, {})
        model_type = known.get("model_type") or known.get("like") or self.types.get(architecture)
        own = plain(stem(architecture))
        keys = [plain(model_type)] if model_type else [own, own + "text"]
        found = next((self.classes[key] for key in keys if key in self.classes), None)
        if found is None:
            raise LookupError("neither transformers nor vLLM has its config class, so it needs code of its own")
        return found

    def of(self, architecture: str, extras: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults of its config class with further fields."""
        known = BY_HAND.get(architecture, {})
        if known.get("like") in WHOLE:
            own = f"own_{plain(stem(architecture))}"
            config = {**WHOLE[known["like"]], "model_type": own, "architectures": [architecture], "dtype": "bfloat16"}
            return {**config, "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
        name, config_class = self.class_of(architecture)
        config = json.loads(config_class(**known.get("init", {})).to_json_string(use_diff=False))
        for part in [config, *(part for part in config.values() if isinstance(part, dict))]:
            for field in ("_name_or_path", "transformers_version", "output_attentions"):
                part.pop(field, None)
        merge(config, known.get("fields", {}))
        for field, value in extras.items():
            for part in [config, *(config[name] for name in config if name.endswith("_config") and config[name])]:
                part.setdefault(field, value)
        if "like" in known:
            name = f"own_{plain(stem(architecture))}"
            config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig"}
        return {**config, "model_type": name, "architectures": [architecture], "dtype": "bfloat16"}

    def write(
        self, architecture: str, folder: Path, most: int = LAYERS, extras: Mapping[str, Any] | None = None
    ) -> Path:
        """A folder with its config.json, and with a config class if the libraries have none."""
        config = with_few_layers(self.of(architecture, extras or {}), most)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        if "auto_map" in config:
            (folder / "configuration_own.py").write_text(OWN_CODE.format(model_type=config["model_type"]))
        return folder


def merge(config: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Sets fields, also in the parts of a config."""
    for name, value in fields.items():
        if isinstance(value, dict) and isinstance(config.get(name), dict):
            merge(config[name], value)
        else:
            config[name] = value


DECI_BLOCKS = [
    {"attention": {"n_heads_in_group": 4, "no_op": False, "replace_with_linear": False},
     "ffn": {"ffn_mult": 2.625, "no_op": False, "replace_with_linear": False}}
] * 32  # fmt: skip
# The model type where the name does not give it, or the type that a model with code of its own is `like`, arguments of
# the config class, and fields that are set afterwards.
BY_HAND: Mapping[str, Mapping[str, Any]] = {
    "BgeM3EmbeddingModel": {"model_type": "xlm-roberta", "fields": {"position_embedding_type": "absolute"}},
    "BertSpladeSparseEmbeddingModel": {"model_type": "bert"},
    "HF_ColBERT": {"model_type": "bert"},
    "ColBERTModernBertModel": {"model_type": "modernbert"},
    "ColBERTLfm2Model": {"model_type": "lfm2"},
    "ColBERTJinaRobertaModel": {"model_type": "xlm-roberta"},
    "DeepseekV3BidirectionalModel": {"model_type": "deepseek_v3"},
    "DeepseekV2ForCausalLM": {"fields": {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}},
    "LlamaBidirectionalForSequenceClassification": {"model_type": "llama", "fields": {"pooling": "avg"}},
    "LlamaBidirectionalModel": {"model_type": "llama", "fields": {"pooling": "avg"}},
    "Llama4ForCausalLM": {"model_type": "llama4_text"},
    "AfmoeForCausalLM": {"fields": {"route_norm": True, "route_scale": 1.0, "score_func": "sigmoid"}},
    "BailingMoeV2_5ForCausalLM": {"like": "qwen3_moe"},
    "ColQwen3_5": {"model_type": "qwen3_5"},
    "CohereCompassForConditionalGeneration": {"fields": {"tie_word_embeddings": True}},
    "DeciLMForCausalLM": {"like": "llama", "fields": {"block_configs": DECI_BLOCKS}},
    "DeepseekForCausalLM": {
        "like": "deepseek_v2",
        "fields": {
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "kv_lora_rank": None,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "qk_rope_head_dim": 0,
            "qk_nope_head_dim": 0,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
        },
    },
    "DeepseekV4ForCausalLM": {"fields": json.loads((CONFIGS / "deepseek-v4-small" / "config.json").read_text())},
    "DeepseekV32ForCausalLM": {
        "model_type": "deepseek_v3",
        "fields": {"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048},
    },
    "GLM4VForCausalLM": {
        "like": "chatglm",
        "fields": {
            "vision_config": {
                "hidden_size": 1792,
                "num_hidden_layers": 8,
                "num_heads": 16,
                "num_positions": 6401,
                "intermediate_size": 15360,
                "patch_size": 14,
                "in_channels": 3,
                "image_size": 1120,
                "scaling_factor": 8,
                "dropout_prob": 0.0,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-6,
            },
        },
    },
    "H2OVLChatModel": {"like": "internvl_chat_of_llama"},
    "HYV3ForCausalLM": {"fields": {"first_k_dense_replace": 1}},
    "HunYuanDenseV1ForCausalLM": {
        "fields": {
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0},
        }
    },
    "HunYuanMoEV1ForCausalLM": {
        "fields": {
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0},
        }
    },
    "InternVLChatModel": {"like": "internvl_chat"},
    "KimiLinearForCausalLM": {
        "fields": {
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "kv_lora_rank": 512,
            "mla_use_nope": True,
            "hidden_size": 2304,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 72,
            "num_experts": 16,
            "num_experts_per_token": 8,
            "moe_intermediate_size": 1024,
            "num_shared_experts": 1,
            "vocab_size": 163840,
            "first_k_dense_replace": 1,
            "intermediate_size": 9216,
            "num_hidden_layers": 8,
            "linear_attn_config": {
                "full_attn_layers": [4, 8],
                "kda_layers": [1, 2, 3, 5, 6, 7],
                "head_dim": 128,
                "num_heads": 32,
                "short_conv_kernel_size": 4,
            },
        }
    },
    "KimiVLForConditionalGeneration": {
        "fields": {"text_config": {"n_group": 1, "topk_group": 1, "intermediate_size": 11264}}
    },
    "NVLM_D": {"like": "internvl_chat"},
    "NemotronForCausalLM": {"fields": {"num_key_value_heads": 8}},
    "Qwen2ForProcessRewardModel": {"model_type": "qwen2"},
    "Rnj1ForCausalLM": {"model_type": "gemma3_text"},
    "SarvamMLAForCausalLM": {"like": "deepseek_v3"},
    "SarvamMoEForCausalLM": {"like": "qwen3_moe"},
    "SkyworkR1VChatModel": {"like": "internvl_chat"},
    "SolarForCausalLM": {"like": "llama"},
    "Step1ForCausalLM": {"like": "llama"},
    "TeleChat2ForCausalLM": {"like": "llama"},
    "TeleChat3ForCausalLM": {"like": "llama"},
    "TeleFLMForCausalLM": {"like": "llama"},
    "TransformersEmbeddingModel": {"model_type": "qwen3"},
    "TransformersForSequenceClassification": {"model_type": "qwen3"},
    "TransformersMoEEmbeddingModel": {"model_type": "qwen3_moe"},
    "TransformersMoEForSequenceClassification": {"model_type": "qwen3_moe"},
    "TransformersMultiModalForCausalLM": {"model_type": "idefics3"},
    "VoxtralRealtimeGeneration": {"model_type": "voxtral_realtime"},
    "VoyageQwen3BidirectionalEmbedModel": {"model_type": "qwen3"},
    "XLMRobertaModel": {"fields": {"position_embedding_type": "absolute"}},
    "XLMRobertaForSequenceClassification": {"fields": {"position_embedding_type": "absolute"}},
    "RobertaModel": {"fields": {"position_embedding_type": "absolute"}},
    "RobertaForSequenceClassification": {"fields": {"position_embedding_type": "absolute"}},
    "MiMoForCausalLM": {"like": "qwen2"},
    "MiniCPMForCausalLM": {"like": "llama"},
    "InternLM2ForCausalLM": {"like": "llama"},
    "InternLM2ForRewardModel": {"like": "llama"},
    "InternLM3ForCausalLM": {"like": "llama"},
    "ExaoneForCausalLM": {"like": "llama", "fields": {"activation_function": "silu"}},
    "BailingMoeForCausalLM": {"like": "qwen3_moe"},
    "BailingMoeV2ForCausalLM": {"like": "qwen3_moe"},
    "IQuestCoderForCausalLM": {"like": "llama"},
    "IQuestLoopCoderForCausalLM": {"like": "llama"},
    "MistralLarge3ForCausalLM": {"model_type": "deepseek_v3"},
    "OrionForCausalLM": {"like": "llama"},
    "NanbeigeForCausalLM": {"like": "llama"},
    "PanguEmbeddedForCausalLM": {"like": "llama"},
    "PanguProMoEV2ForCausalLM": {"like": "qwen3_moe"},
    "PanguUltraMoEForCausalLM": {"like": "deepseek_v3"},
    "Param2MoEForCausalLM": {"like": "qwen3_moe"},
    "Plamo3ForCausalLM": {"like": "gemma3_text"},
    "GteNewModel": {"like": "bert"},
    "GteNewForSequenceClassification": {"like": "bert"},
    "LongcatFlashNgramForCausalLM": {"model_type": "longcat_flash"},
    "MiMoV2ForCausalLM": {"model_type": "mimo_v2_flash"},
    "MiniMaxM3SparseForCausalLM": {"model_type": "minimax_m3_vl"},
    "NemotronHPuzzleForCausalLM": {"model_type": "nemotron_h"},
    "JinaEmbeddingsV5Model": {"like": "qwen3"},
    "JinaForRanking": {"model_type": "qwen3"},
    "TransformersForCausalLM": {"model_type": "llama"},
    "TransformersMoEForCausalLM": {"model_type": "qwen3_moe"},
}
# Fields that the config.json of real models have and the config classes do not, by the name that vLLM misses.
EXTRAS: Mapping[str, Any] = {
    "score_func": "sigmoid", "head_dim": 128, "original_rope": True, "padded_vocab_size": 65024,
    "position_embedding_type": "rope", "first_k_dense_replace": 1, "num_local_experts": 8, "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True, "rotary_dim": 64, "activation_function": "gelu", "use_bias": False,
    "use_qkv_bias": False, "embedding_dropout": 0.0, "output_dropout": 0.0,
    "bias": False, "num_experts": 8, "num_shared_experts": 1, "norm_head": False,
    "num_nextn_predict_layers": 0, "qkv_bias": False, "scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256,
    "block_dim": 2560, "conv_dim": 2560, "layer_norm_epsilon": 1e-5, "activation_function_name": "silu",
    "embed_dim": 1280, "norm_topk_prob": True, "moe_layer_freq": 1, "use_qk_norm": True, "n_inner": 4096,
    "num_experts_per_tok": 2, "moe_intermediate_size": 1024, "attention_bias": False, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "layernorm_epsilon": 1e-6, "sandwich_norm": True, "routed_scaling_factor": 1.0,
    "n_group": 1, "topk_group": 1, "loop_num": 2, "loop_window_size": 64, "moe_router_topk_scaling_factor": 1.0,
    "hybrid_layer_pattern": [0, 1] * 24, "qk_rope_head_dim": 64, "num_loops": 2, "type_vocab_size": 2,
    "attention_value_scale": 1.0, "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8, "swa_head_dim": 192,
    "swa_v_head_dim": 128, "v_head_dim": 128, "interleaved_sliding_window": [], "window_size": 2048,
    "shared_expert_sink": True, "n_shared_experts": 1, "use_mla": True, "tie_word_embeddings": False,
    "scoring_func": "sigmoid", "use_routing_bias": True, "zero_expert_type": "identity", "sliding_window_size": 128,
    "mlp_fc1_bias": True, "mlp_fc2_bias": True, "vision_feature_layer": -1, "route_norm": True, "route_scale": 1.0,
    "rope_theta": 10000.0, "mlp_ratio": 4.0, "use_embed_norm": True, "n_routed_experts": 8,
    "rotary_scaling_factor": None,
    "rotary_emb_fraction": 1.0, "rotary_emb_base": 1000, "rotary_emb_interleaved": False, "spatial_merge_size": 2,
    "max_position_embeddings": 4096, "zero_expert_num": 8, "pixel_hidden_size": 1280,
    "rotary_kwargs": {}, "vision_start_token_id": 1, "image_token_id": 2, "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 1.0, "n_layer": 8, "use_mup": False, "qkv_proj_bias": True, "expert_hidden_dim": 1536,
    "projector_hidden_act": "gelu",
}  # fmt: skip

_INTERN_VISION = {
    "model_type": "intern_vit_6b", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16,
    "intermediate_size": 4096, "image_size": 448, "patch_size": 14, "qkv_bias": True, "qk_normalization": False,
    "norm_type": "layer_norm", "layer_norm_eps": 1e-6, "hidden_act": "gelu", "num_channels": 3,
    "initializer_factor": 0.1,
}  # fmt: skip
_CHAT = {
    "vision_config": _INTERN_VISION, "select_layer": -1, "downsample_ratio": 0.5, "ps_version": "v2",
    "force_image_size": 448, "template": "internvl2_5", "dynamic_image_size": True, "max_dynamic_patch": 12,
    "min_dynamic_patch": 1, "use_thumbnail": True, "pad2square": False,
}  # fmt: skip
# Configs of models that bring their own code, as their repositories have them, with few layers.
WHOLE: Mapping[str, Mapping[str, Any]] = {
    "internvl_chat": {**_CHAT, "llm_config": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 151674,
        "max_position_embeddings": 32768}},
    "internvl_chat_of_llama": {**_CHAT, "llm_config": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 32000,
        "max_position_embeddings": 32768}},
}  # fmt: skip
