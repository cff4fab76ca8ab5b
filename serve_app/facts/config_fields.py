"""Checks the fields of a foreign config.json that the plan reads, before anything is computed from them.

Each number has an upper bound far above what any public model has. The bounds keep what a plan computes and allocates
small, whatever the file says. Fields that are not listed here are not read.
"""

from collections.abc import Mapping
from typing import Any

from serve_app.errors import ConfigError
from serve_app.facts.field_kind import FLAG, OBJECT, FieldKind, check_fields, list_of, number, shown, text, whole

# The deepest public models, which are merged ones, have some 300 layers. The plan looks at each layer many times.
MOST_LAYERS = 512
# The widest public models have 18,432 channels, and 262,144 words.
MOST_WIDTH = 2**24
MOST_HEADS = 2**16
MOST_EXPERTS = 2**16
# The longest public context has ten million tokens.
MOST_TOKENS = 2**31 - 1
MOST_FACTOR = 1e6
MOST_NAME = 200

_WIDTH, _HEADS, _LAYERS = whole(1, MOST_WIDTH), whole(1, MOST_HEADS), whole(1, MOST_LAYERS)
_MAYBE_WIDTH, _EXPERTS, _NAME = whole(0, MOST_WIDTH), whole(0, MOST_EXPERTS), text(MOST_NAME)

# These fields are read on the outermost level, whether or not there is a text_config.
OUTER: Mapping[str, FieldKind] = {
    "text_config": OBJECT,
    "model_type": _NAME,
    "architectures": list_of(_NAME, 16),
    "quantization_config": OBJECT,
    "dtype": _NAME,
    "torch_dtype": _NAME,
    "tie_word_embeddings": FLAG,
}
# These fields describe the model's shape.
SHAPE: Mapping[str, FieldKind] = {
    **{name: kind for name, kind in OUTER.items() if name != "text_config"},
    "hidden_size": _WIDTH,
    "n_embd": _WIDTH,
    "intermediate_size": _WIDTH,
    "n_inner": _WIDTH,
    "vocab_size": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "n_layer": _LAYERS,
    "num_attention_heads": _HEADS,
    "n_head": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": whole(1, MOST_HEADS),
    "max_position_embeddings": whole(1, MOST_TOKENS),
    "n_positions": whole(1, MOST_TOKENS),
    "sliding_window": whole(0, MOST_TOKENS),
    "sliding_window_pattern": _LAYERS,
    "use_sliding_window": FLAG,
    "max_window_layers": whole(0, MOST_TOKENS),
    "full_attention_interval": _LAYERS,
    "layer_types": list_of(_NAME, MOST_LAYERS),
    "kv_lora_rank": _WIDTH,
    "qk_rope_head_dim": _WIDTH,
    "qk_nope_head_dim": _MAYBE_WIDTH,
    "v_head_dim": _WIDTH,
    "linear_num_key_heads": _HEADS,
    "linear_num_value_heads": _HEADS,
    "linear_key_head_dim": _WIDTH,
    "linear_value_head_dim": _WIDTH,
    "linear_conv_kernel_dim": whole(1, 1024),
    "moe_intermediate_size": _MAYBE_WIDTH,
    "shared_expert_intermediate_size": _MAYBE_WIDTH,
    "num_experts": _EXPERTS,
    "num_local_experts": _EXPERTS,
    "n_routed_experts": _EXPERTS,
    "n_shared_experts": _EXPERTS,
    "partial_rotary_factor": number(0, 1),
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
}
# These are the fields of rope_parameters and rope_scaling, which may have an object for each kind of layer instead.
ROPE: Mapping[str, FieldKind] = {
    "rope_type": _NAME,
    "type": _NAME,
    "factor": number(0, MOST_FACTOR),
    "partial_rotary_factor": number(0, 1),
}
QUANTIZATION: Mapping[str, FieldKind] = {"quant_method": _NAME}


# The largest numbers of an outline, by what `facts.architecture` calls them.
MOST_OUTLINE: Mapping[str, int] = {
    "hidden_size": MOST_WIDTH,
    "intermediate_size": MOST_WIDTH,
    "heads": MOST_HEADS,
    "kv_heads": MOST_HEADS,
    "vocabulary": MOST_WIDTH,
    "layers": MOST_LAYERS,
    "max_model_len": MOST_TOKENS,
}


def check_outer(config: Mapping[str, Any], where: str, inside: str) -> None:
    """Raises ConfigError for a field of a part of a config that is not of its kind, whatever the model's type is."""
    kinds = {**OUTER, "rope_parameters": OBJECT, "rope_scaling": OBJECT}
    check_fields(config, kinds, where, inside)


def check_outline(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Returns the object that describes the text model: `text_config`, or the config itself if it has none. Raises
    ConfigError that names `where`, the field and what was found."""
    check_outer(config, where, "")
    inner = config.get("text_config")
    if inner is None:
        return config
    check_fields(inner, {"model_type": _NAME}, where, "text_config.")
    assert isinstance(inner, Mapping)
    return inner


def check_shape(config: Mapping[str, Any], where: str, inside: str = "") -> None:
    """Raises ConfigError for a field of the model's shape that is not of its kind. `inside` is as for
    `check_fields`."""
    check_fields(config, SHAPE, where, inside)
    for name in ("rope_parameters", "rope_scaling"):
        scaling = config.get(name) or {}
        check_fields(scaling, ROPE, where, f"{inside}{name}.")
        for kind, fields in scaling.items():
            if isinstance(fields, Mapping):
                path = str(kind)[:MOST_NAME].encode("ascii", "backslashreplace").decode()
                check_fields(fields, ROPE, where, f"{inside}{name}.{path}.")
    check_fields(config.get("quantization_config") or {}, QUANTIZATION, where, f"{inside}quantization_config.")


def check_divides(part: tuple[str, int], total: tuple[str, int], where: str) -> None:
    """Raises ConfigError unless the first field, with its value, divides the second."""
    if total[1] % part[1]:
        raise ConfigError(
            f"{where}: {total[0]} is {shown(total[1])}, and {part[0]} is {shown(part[1])}; the first must be a "
            "multiple of the second."
        )
