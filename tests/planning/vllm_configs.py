"""Makes a config.json for every architecture of vLLM's registry, from the defaults of its config class.

Sizes stay as the class has them, so they fit together, and only the number of layers is made small. The classes are
those of transformers and vLLM. `BY_HAND` has what cannot be found by name or does not work by default.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
from transformers import AutoConfig, PreTrainedConfig

class OwnConfig(PreTrainedConfig):
    model_type = "{model_type}"

    def __init__(self, **fields):
        parts = {{}}
        for name in [name for name in fields if name.endswith("_config") and isinstance(fields[name], dict)]:
            part = dict(fields.pop(name))
            if part.get("model_type"):
                parts[name] = AutoConfig.for_model(part.pop("model_type"), **part)
            else:
                parts[name] = part
        super().__init__(**fields)
        for name, part in parts.items():
            setattr(self, name, part)
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
        name, config_class = self.class_of(architecture)
        config = json.loads(config_class(**known.get("init", {})).to_json_string(use_diff=False))
        for field in ("_name_or_path", "transformers_version"):
            config.pop(field, None)
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


# The model type where the name does not give it, or the type that a model with code of its own is `like`, arguments of
# the config class, and fields that are set afterwards.
BY_HAND: Mapping[str, Mapping[str, Any]] = {
    "BgeM3EmbeddingModel": {"model_type": "xlm-roberta"},
    "BertSpladeSparseEmbeddingModel": {"model_type": "bert"},
    "HF_ColBERT": {"model_type": "bert"},
    "ColBERTModernBertModel": {"model_type": "modernbert"},
    "ColBERTLfm2Model": {"model_type": "lfm2"},
    "ColBERTJinaRobertaModel": {"model_type": "xlm-roberta"},
    "DeepseekV3BidirectionalModel": {"model_type": "deepseek_v3"},
    "DeepseekV2ForCausalLM": {"fields": {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}},
    "LlamaBidirectionalForSequenceClassification": {"model_type": "llama"},
    "LlamaBidirectionalModel": {"model_type": "llama"},
    "Llama4ForCausalLM": {"model_type": "llama4_text"},
    "MiMoForCausalLM": {"like": "qwen2"},
    "MiniCPMForCausalLM": {"like": "llama"},
    "InternLM2ForCausalLM": {"like": "llama"},
    "InternLM2ForRewardModel": {"like": "llama"},
    "InternLM3ForCausalLM": {"like": "llama"},
    "ExaoneForCausalLM": {"like": "llama"},
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
    "use_qkv_bias": False, "embedding_dropout": 0.0, "output_dropout": 0.0, "bias": False, "num_experts": 8, "num_shared_experts": 1, "norm_head": False,
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
    "vision_start_token_id": 1, "image_token_id": 2, "layer_norm_eps": 1e-5, "partial_rotary_factor": 1.0,
}  # fmt: skip
