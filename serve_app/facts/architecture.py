"""Reads from a model's config.json what memory depends on: the model's shape.

It reads only the JSON, without transformers, because a plan must not wait seconds for imports. Of an architecture that
is not known here it reads an outline. The engine's own code says what such a model takes (`facts/engine_facts.py`),
because a guess of its KV cache would have no basis.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

from serve_app.errors import ConfigError
from serve_app.facts.config_fields import MOST_OUTLINE, check_divides, check_outer, check_outline, check_shape
from serve_app.facts.field_kind import is_whole

# The layers of these decoders are standard attention and standard (or mixture-of-experts) feed-forward blocks.
STANDARD = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"}
    | {"phi3", "olmo2", "granite", "starcoder2", "stablelm", "cohere"}
)
MLA = frozenset({"deepseek_v2", "deepseek_v3"})
HYBRID = frozenset({"qwen3_next"})
# vLLM does not shard these architectures in the way for which this project has formulas. pt serves them.
PT_ONLY = frozenset({"gpt2", "bloom"})

LayerKind = Literal["full", "sliding", "mla", "linear", "unknown"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Architecture:
    """This is the shape of a model. Sizes are in elements and lengths in tokens. `layers` has the kind of each layer's
    memory, in order."""

    name: str
    model_type: str
    dtype: str
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    max_model_len: int
    layers: tuple[LayerKind, ...]
    tied: bool = False
    sliding_window: int | None = None
    # MLA: the width of the compressed keys and values, of the rotary part, and of the expanded heads.
    latent_size: int = 0
    rope_size: int = 0
    key_size: int = 0
    value_size: int = 0
    # Linear attention: heads and sizes of its states.
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_key_size: int = 0
    linear_value_size: int = 0
    linear_kernel: int = 0
    # This says whether the positions are scaled, so that an engine may take more than `max_model_len`.
    has_scaled_positions: bool = False
    # Elements of the tables of rotary position embeddings, as vLLM keeps them: positions × size, for each kind.
    rotary_elements: int = 0
    quantization: str | None = None
    # This says whether the checkpoint itself names the type of its KV cache, which vLLM takes under `auto`.
    names_kv_cache: bool = False
    # An outline has none of the shapes that the formulas need: an engine's own code says what such a model takes.
    has_formulas: bool = True
    # The width of what one layer of the widest encoder for images or sound computes for a patch.
    encoder_width: int = 0
    # A tensor parallel size must divide these numbers, which are named by what they count.
    shardable: Mapping[str, int] | None = None

    @property
    def is_known_to_vllm(self) -> bool:
        """Returns whether there are formulas for vLLM here."""
        return self.has_formulas and self.model_type in STANDARD | MLA | HYBRID

    def valid_tensor_parallel_sizes(self, most: int = 16) -> list[int]:
        """Returns the sizes that vLLM takes. They divide the heads and the feed-forward width, and divide the KV
        heads or are a multiple of them."""
        return [size for size in range(1, most + 1) if not self.tensor_parallel_problem(size)]

    def tensor_parallel_problem(self, size: int) -> str:
        """Returns why vLLM refuses the size, or an empty text if it takes it."""
        for what, count in (self.shardable or {}).items():
            if count % size:
                return f"{count} {what} cannot be divided by {size}"
        if "mla" not in self.layers and self.kv_heads % size and size % self.kv_heads:
            return f"{self.kv_heads} KV heads can neither be divided by {size} nor repeated to it"
        return ""


def read_architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Returns the shape that a decoded config.json describes, or the outline of a model of another type.

    Raises ConfigError that names `where`, the field, what was found there and what is needed."""
    file = f"{where}: config.json"
    config = {name: value for name, value in config.items() if value is not None}  # Engines take a default for null.
    text = {name: value for name, value in check_outline(config, file).items() if value is not None}
    model_type, outer = text.get("model_type") or "", config.get("model_type") or ""
    known = STANDARD | MLA | HYBRID | PT_ONLY
    # A model around a known text model may have encoders under any name, so its own type decides.
    if model_type not in known or outer not in known | {""} or any(config.get(name) for name in ENCODERS):
        return _with_known_dtype(_outline(config, file), file)
    check_shape(text, file, "text_config." if "text_config" in config else "")
    try:
        architecture = _read(config, text, model_type, file)
    except KeyError as error:
        raise ConfigError(
            f"{where}: config.json has no {error}, which a model of the model_type {model_type} needs."
        ) from None
    return _with_known_dtype(architecture, file)


def _with_known_dtype(architecture: Architecture, file: str) -> Architecture:
    if architecture.dtype not in DTYPE_BYTES:
        raise ConfigError(
            f"{file}: the dtype '{architecture.dtype}' is unknown. The known ones are {', '.join(DTYPE_BYTES)}."
        )
    return architecture


# The names that families have for the same number. An outline takes the first that is there.
_OUTLINE: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embed_dim"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "ffn_hidden_size"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "multi_query_group_num", "n_head_kv", "num_kv_heads"),
    "vocabulary": ("vocab_size", "padded_vocab_size"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "max_model_len": ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "max_sequence_length",
                      "n_ctx", "model_max_length", "max_target_positions"),
}  # fmt: skip
# The parts of a config.json that hold the model of text, and those that hold encoders.
_TEXT = ("thinker_config", "text_config", "llm_config", "language_config")
ENCODERS = ("vision_config", "audio_config", "thinker_config")
# A config.json that leaves its vocabulary out (Gemma 3) means that of its class in transformers. Only guesses of
# logits depend on it, so they count the largest vocabulary of public models.
DEFAULT_VOCABULARY = 262_208
# vLLM takes this length for a model whose config.json names none, such as Mamba.
DEFAULT_CONTEXT = 2048


def _outline(config: Mapping[str, Any], where: str) -> Architecture:
    """Returns what can be read of any model: its sizes without the shapes of its layers, under any of their names."""
    text, parts, inside = config, [config], ""
    while name := next((name for name in _TEXT if isinstance(text.get(name), Mapping)), None):
        text, inside = text[name], f"{inside}{name}."
        check_outer(text, where, inside)
        parts.append(text)

    def number(name: str, part: Mapping[str, Any], default: int | None = None) -> int:
        most = MOST_OUTLINE[name]
        found = next((part[key] for key in _OUTLINE[name] if is_whole(part.get(key), 1, most)), default)
        if found is None:
            raise ConfigError(f"{where}: none of {', '.join(inside + key for key in _OUTLINE[name])} is a whole "
                              f"number from 1 to {most}.")  # fmt: skip
        return int(found)

    def first(*names: str) -> Any:
        return next((part[name] for name in names for part in reversed(parts) if part.get(name)), None)

    encoders = [part[name] for part in parts for name in ENCODERS if isinstance(part.get(name), Mapping)]
    hidden, heads, quantization = number("hidden_size", text), number("heads", text, 1), first("quantization_config")
    kind = str(first("model_type") or "")
    return Architecture(
        name=str((first("architectures") or [kind or "a model without model_type"])[0]),
        model_type=kind,
        dtype=str(first("dtype", "torch_dtype") or "float32").removeprefix("torch."),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size", text, 4 * hidden),
        heads=heads,
        kv_heads=number("kv_heads", text, heads),
        head_size=max(1, hidden // heads),
        vocabulary=number("vocabulary", text, DEFAULT_VOCABULARY),
        max_model_len=number("max_model_len", text, DEFAULT_CONTEXT),
        layers=tuple(repeat("unknown", number("layers", text))),
        quantization=_quantization_method(quantization) if isinstance(quantization, Mapping) else None,
        names_kv_cache=_names_kv_cache(quantization),
        has_scaled_positions=_has_scaled_positions(text),
        has_formulas=False,
        encoder_width=max((_encoder_width(part) for part in encoders), default=0),
    )


def _quantization_method(quantization: Mapping[str, Any]) -> str:
    """Returns the method of a quantization_config by its name. Older checkpoints of bitsandbytes have none."""
    if quantization.get("quant_method") is None and quantization.keys() & {"load_in_4bit", "load_in_8bit"}:
        return "bitsandbytes"
    return str(quantization.get("quant_method"))


def _names_kv_cache(quantization: Any) -> bool:
    """Returns whether a quantization_config has a type for the KV cache, by compressed-tensors' name or ModelOpt's."""
    if not isinstance(quantization, Mapping):
        return False
    inner = quantization.get("quantization")
    parts = (quantization, inner if isinstance(inner, Mapping) else {})
    return any(part.get(name) for part in parts for name in ("kv_cache_scheme", "kv_cache_quant_algo"))


def _encoder_width(part: Mapping[str, Any]) -> int:
    """Returns what a layer of an encoder computes for a patch: elements of its residual and its feed-forward block."""
    hidden, inner = (
        next((part[key] for key in _OUTLINE[name] if is_whole(part.get(key), 1, MOST_OUTLINE[name])), 0)
        for name in ("hidden_size", "intermediate_size")
    )
    return int(2 * hidden + 3 * (inner or 4 * hidden))


def _read(config: Mapping[str, Any], text: Mapping[str, Any], model_type: str, file: str) -> Architecture:
    names, defaults = _NAMES.get(model_type, {}), _DEFAULTS.get(model_type, {})

    def value(name: str, default: Any = ...) -> Any:
        found = text.get(names.get(name, name))
        if found is not None:
            return found
        if default is ...:
            raise KeyError(names.get(name, name))
        return default

    def size(name: str) -> Any:
        return value(name, defaults.get(name, 0))

    hidden, heads = value("hidden_size"), value("num_attention_heads")
    intermediate, kv_heads = value("intermediate_size", 4 * hidden), value("num_key_value_heads", heads)
    _check_heads(text, model_type, file, hidden=hidden, heads=heads, kv_heads=kv_heads)
    quantization = config.get("quantization_config") or text.get("quantization_config")
    return Architecture(
        name=(config.get("architectures") or text.get("architectures") or [model_type])[0],
        model_type=model_type,
        dtype=str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "float32").removeprefix(
            "torch."
        ),
        hidden_size=hidden,
        intermediate_size=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_size=value("head_dim", hidden // heads),
        vocabulary=value("vocab_size"),
        max_model_len=value("max_position_embeddings", 2048 if model_type == "bloom" else ...),
        layers=_layers(text, model_type, value("num_hidden_layers"), file),
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", model_type in _TIED))),
        sliding_window=text.get("sliding_window"),
        latent_size=size("kv_lora_rank"),
        rope_size=size("qk_rope_head_dim"),
        key_size=size("qk_nope_head_dim") + size("qk_rope_head_dim"),
        value_size=size("v_head_dim"),
        quantization=_quantization_method(quantization) if quantization else None,
        names_kv_cache=_names_kv_cache(quantization),
        has_scaled_positions=_has_scaled_positions(text),
        rotary_elements=_rotary_elements(
            text, model_type, size("qk_rope_head_dim") or value("head_dim", hidden // heads)
        ),
        shardable=_shardable(text, heads, intermediate, defaults),
        **{field: size(name) for field, name in _LINEAR.items()},
    )


def _check_heads(
    text: Mapping[str, Any], model_type: str, file: str, *, hidden: int, heads: int, kv_heads: int
) -> None:
    """Raises ConfigError for heads that no attention can have. The heads of MLA have sizes of their own."""
    names = _NAMES.get(model_type, {})
    heads_name = names.get("num_attention_heads", "num_attention_heads")
    if model_type in MLA:
        return
    check_divides(("num_key_value_heads", kv_heads), (heads_name, heads), file)
    if text.get("head_dim") is None:
        check_divides((heads_name, heads), (names.get("hidden_size", "hidden_size"), hidden), file)


# Older families have other names for these fields.
_NAMES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
    },
    "bloom": {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
}
_LINEAR = {
    "linear_key_heads": "linear_num_key_heads",
    "linear_value_heads": "linear_num_value_heads",
    "linear_key_size": "linear_key_head_dim",
    "linear_value_size": "linear_value_head_dim",
    "linear_kernel": "linear_conv_kernel_dim",
}
# Where these families' configs leave a field out, transformers (5.19) and vLLM take this value.
_MLA_DEFAULTS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "deepseek_v2": _MLA_DEFAULTS,
    "deepseek_v3": _MLA_DEFAULTS,
    "qwen3_next": {
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    },
}
# The embedding of these families is also the head unless the config says otherwise.
_TIED = frozenset({"gpt2", "bloom", "gemma", "gemma2", "gemma3_text"})


_MLA_LAYER: LayerKind = "mla"
_KINDS: Mapping[str, LayerKind] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "linear_attention": "linear",
}


def _layers(text: Mapping[str, Any], model_type: str, count: int, file: str) -> tuple[LayerKind, ...]:
    if model_type in MLA:
        return (_MLA_LAYER,) * count
    if not (named := text.get("layer_types")):
        return tuple(_kind(text, model_type, number) for number in range(count))
    known: dict[str, LayerKind] = {
        name: kind for name, kind in _KINDS.items() if kind != "linear" or model_type in HYBRID
    }
    if unknown := set(named) - known.keys():
        raise ConfigError(
            f"{file}: layer_types: the plan does not know layers of the type '{min(unknown)}' in a {model_type} model."
        )
    if len(named) != count:
        raise ConfigError(
            f"{file}: layer_types has {len(named)} items, and num_hidden_layers is {count}; one item for each layer is "
            "needed."
        )
    if "sliding_attention" in named and not text.get("sliding_window"):
        raise ConfigError(f"{file}: layer_types names sliding_attention, and sliding_window is missing or 0.")
    kinds: list[LayerKind] = [known[name] for name in named]
    return tuple(kinds)


def _kind(text: Mapping[str, Any], model_type: str, number: int) -> LayerKind:
    """Returns the kind of layer `number`, for a config that is older than `layer_types`."""
    if model_type in HYBRID:
        return "linear" if (number + 1) % text.get("full_attention_interval", 4) else "full"
    if not text.get("sliding_window"):
        return "full"
    if model_type == "gemma2":
        return "full" if number % 2 else "sliding"
    if model_type == "gemma3_text":
        return "sliding" if (number + 1) % text.get("sliding_window_pattern", 6) else "full"
    if model_type.startswith("qwen"):  # Qwen's window is off without `use_sliding_window: true`.
        first = text.get("max_window_layers", 28) if text.get("use_sliding_window") else number + 1
        return "sliding" if number >= first else "full"
    return "sliding"


def _rotary_elements(text: Mapping[str, Any], model_type: str, size: int) -> int:
    """Returns the elements of one table for each distinct kind of rotary embedding. Linear scaling multiplies its
    positions."""
    if model_type in PT_ONLY:
        return 0
    positions = text.get("max_position_embeddings") or 0
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kinds = [kind for kind in scaling.values() if isinstance(kind, Mapping)] or [scaling]
    if model_type == "gemma3_text" and len(kinds) == 1:
        kinds.append({})  # The local kind is never scaled.
    shares = [kind["partial_rotary_factor"] for kind in (text, *kinds) if kind.get("partial_rotary_factor")]
    if model_type not in MLA:
        size = int(size * (shares[0] if shares else 1.0))
    return sum(int(positions * _linear_factor(kind)) * size for kind in kinds)


def _has_scaled_positions(text: Mapping[str, Any]) -> bool:
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kinds = [scaling, *(kind for kind in scaling.values() if isinstance(kind, Mapping))]
    return any(kind.get("factor") for kind in kinds)


def _linear_factor(kind: Mapping[str, Any]) -> float:
    is_linear = (kind.get("rope_type") or kind.get("type")) == "linear"
    return float(kind.get("factor") or 1.0) if is_linear else 1.0


def _shardable(text: Mapping[str, Any], heads: int, intermediate: int, defaults: Mapping[str, int]) -> dict[str, int]:
    counts = {"attention heads": heads, "channels of the feed-forward layer": intermediate}
    for name, what in (
        ("moe_intermediate_size", "channels of an expert"),
        ("linear_num_key_heads", "key heads of the linear attention"),
        ("linear_num_value_heads", "value heads of the linear attention"),
    ):
        if found := text.get(name) or defaults.get(name):
            counts[what] = found
    return counts
