"""Says what a model is for, and how a model that makes vectors or scores does so, by the files of its folder.

The files are those of sentence-transformers (`modules.json`, `1_Pooling/config.json`, `2_Dense/config.json`,
`config_sentence_transformers.json`, `sentence_bert_config.json`). Without them, the architecture decides as in
vLLM 0.32: encoders take the first token, and decoders the last one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from serve_app.errors import ConfigError
from serve_app.facts.config_fields import MOST_TOKENS, MOST_WIDTH
from serve_app.facts.field_kind import FLAG, OBJECT, check_fields, is_whole, list_of, shown, text, whole
from serve_app.facts.side_files import Find, read_side_file

Task = Literal["generate", "embed", "classify"]
PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
Activation = Literal["sigmoid", "identity"]

# What a client can ask of such a model, with either engine.
ENDPOINTS: Mapping[Task, tuple[str, ...]] = {
    "generate": ("/v1/chat/completions", "/v1/completions"),
    "embed": ("/v1/embeddings", "/score", "/rerank"),
    "classify": ("/score", "/rerank"),
}

# Several modes are joined in this order. The older files have a flag for each.
MODES: Mapping[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Architectures of vLLM's table end like this. `ChatModel` and `LMHeadModel` come first, since `Model` ends them too.
_ENDINGS: Sequence[tuple[str, Task]] = (
    ("ForCausalLM", "generate"),
    ("ForConditionalGeneration", "generate"),
    ("ChatModel", "generate"),
    ("LMHeadModel", "generate"),
    ("RewardModel", "generate"),
    ("ForSequenceClassification", "classify"),
    ("ForTextEncoding", "embed"),
    ("ForMaskedLM", "embed"),
    ("Model", "embed"),
)
# The first positions of these families are for padding, so fewer are left for tokens.
_OFFSET_POSITIONS = frozenset({
    "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "mpnet",
    "longformer", "ibert",
})  # fmt: skip
# sentence-transformers has written its file of lengths under these names.
_LENGTH_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Decoders of these names attend to later tokens too, if their config says so. All others are causal.
_DECODER_FIELDS = ("num_key_value_heads", "n_head_kv")
_ENCODER_TYPES = frozenset({"eurobert"})
_CAUSAL_TYPES = frozenset({"gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "mpt", "codegen", "gpt_bigcode"})
MOST_MODULES, MOST_PROMPTS, MOST_NAME, MOST_PROMPT = 16, 256, 200, 8192
_MODULE = {"type": text(MOST_NAME), "name": text(MOST_NAME), "idx": whole(0, MOST_MODULES)}
_DENSE = {
    "in_features": whole(1, MOST_WIDTH),
    "out_features": whole(1, MOST_WIDTH),
    "bias": FLAG,
    "activation_function": text(MOST_NAME),
}
# An activation may come from torch's own modules only, as in vLLM.
TORCH_MODULES = "torch.nn.modules."


@dataclass(frozen=True)
class DenseLayer:
    """This is a linear layer behind the pooling. Its weights are in `folder` and are held in float32. `activation` is
    the name of a class of torch.nn."""

    folder: str
    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "Tanh"

    @property
    def bytes(self) -> int:
        """Returns the bytes of its weights."""
        return 4 * (self.in_features * self.out_features + (self.out_features if self.bias else 0))


@dataclass(frozen=True)
class Pooling:
    """Says how a model makes its vectors, or its scores if `task` is "classify".

    `length` is the most tokens of an input by the model's own files. With `skips_prompt`, the tokens of a prompt are
    computed and not pooled. `prompts` are texts that come before an input, and `default_prompt` is the name of the one
    that is taken without a choice. `dimensions` are the shorter vectors that the model was trained for, and None means
    any if `is_matryoshka`. `labels` and `activation` are those of a classifier.
    """

    task: Task
    length: int
    modes: tuple[PoolingMode, ...] = ("cls",)
    skips_prompt: bool = False
    dense: tuple[DenseLayer, ...] = ()
    normalizes: bool = True
    lowers_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    is_matryoshka: bool = False
    dimensions: tuple[int, ...] | None = None
    labels: int = 0
    activation: Activation = "sigmoid"

    @property
    def dense_bytes(self) -> int:
        """Returns the bytes of the layers behind the pooling."""
        return sum(layer.bytes for layer in self.dense)

    @property
    def names_what_it_does(self) -> str:
        """Returns what the model is, as a part of a sentence."""
        return "an embedding model" if self.task == "embed" else "a model of scores (a cross-encoder)"


def read_pooling(config: Mapping[str, Any], find: Find, length: int, where: str) -> Pooling | None:
    """Returns how a model pools, or None for a model that generates text. `config` is its decoded config.json, whose
    `architectures` decide, and `length` is its number of positions.

    Raises ConfigError that names `where` or the file for what cannot be served.
    """
    modules = _modules(find, where)
    pooled = next((module for module in modules if _kind(module) == "Pooling"), None)
    task = "embed" if pooled is not None else _task(config)
    if task == "generate":
        return None
    common = _lengths(config, find, length)
    if task == "classify":
        return Pooling(task, normalizes=False, labels=_labels(config), activation=_activation(config, where), **common)
    dimensions = config.get("matryoshka_dimensions")
    sizes = tuple(dimensions) if isinstance(dimensions, list) and _are_sizes(dimensions) else None
    own = {
        **common, **_prompts(find, where),
        "is_matryoshka": bool(dimensions) or config.get("is_matryoshka") is True, "dimensions": sizes,
    }  # fmt: skip
    if pooled is None:
        return Pooling(task, modes=("lasttoken" if _is_decoder(config) else "cls",), **own)
    kinds = [_kind(module) for module in modules]
    modes, skips = _pooling_config(find, pooled, where)
    return Pooling(
        task, modes=modes, skips_prompt=skips, normalizes="Normalize" in kinds,
        dense=_dense_layers(find, modules, where), **own,
    )  # fmt: skip


def _task(config: Mapping[str, Any]) -> Task:
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        for ending, task in _ENDINGS:
            if isinstance(name, str) and name.endswith(ending):
                return task
    return "generate"


def _is_decoder(config: Mapping[str, Any]) -> bool:
    """Returns whether the last token of a text has seen all others, and the first one has seen none."""
    if config.get("model_type") in _ENCODER_TYPES:
        return False
    is_marked = any(config.get(name) is not None for name in _DECODER_FIELDS)
    return is_marked or config.get("model_type") in _CAUSAL_TYPES or config.get("is_decoder") is True


def _modules(find: Find, where: str) -> list[Mapping[str, Any]]:
    """Returns the modules of a model of sentence-transformers in their order, or none."""
    found = read_side_file(find, "modules.json")
    if found is None:
        return []
    file = f"{where}: modules.json"
    if not isinstance(found, list) or list_of(OBJECT, MOST_MODULES).problem(found):
        raise ConfigError(f"{file} holds {shown(found)}; a list of at most {MOST_MODULES} objects is needed.")
    for number, module in enumerate(found):
        check_fields(module, _MODULE, file, f"[{number}].")
        if not isinstance(module.get("type"), str) or not isinstance(module.get("path", ""), str):
            raise ConfigError(f"{file}: [{number}] needs a type and a path, which are texts.")
    return found


def _kind(module: Mapping[str, Any]) -> str:
    """Returns the last part of a module's class, which has moved between versions of sentence-transformers."""
    return str(module["type"]).rpartition(".")[2]


def _pooling_config(find: Find, module: Mapping[str, Any], where: str) -> tuple[tuple[PoolingMode, ...], bool]:
    """Returns the modes of pooling in their order, and whether the tokens of a prompt are left out."""
    name = f"{module.get('path', '')}/config.json".lstrip("/")
    config = read_side_file(find, name)
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where}: {name} is missing, which modules.json names. Download the whole model.")
    file = f"{where}: {name}"
    check_fields(config, {"include_prompt": FLAG, **dict.fromkeys(MODES, FLAG)}, file)
    named = config.get("pooling_mode")
    if named is not None:
        modes = [named] if isinstance(named, str) else named
        if not isinstance(modes, list) or any(mode not in MODES.values() for mode in modes) or not modes:
            raise ConfigError(f"{file}: pooling_mode is {shown(named)}; one of {', '.join(MODES.values())} is needed.")
    else:
        modes = [mode for flag, mode in MODES.items() if config.get(flag)] or ["mean"]
    return tuple(cast(list[PoolingMode], modes)), config.get("include_prompt") is False


def _dense_layers(find: Find, modules: Sequence[Mapping[str, Any]], where: str) -> tuple[DenseLayer, ...]:
    """Returns the linear layers behind the pooling. Raises ConfigError for modules that pt does not compute."""
    found: list[DenseLayer] = []
    has_pooled = has_normalized = False
    for module in modules:
        kind, path = _kind(module), str(module.get("path", ""))
        if kind == "Transformer" and path:
            raise ConfigError(
                f"{where}: modules.json has its transformer in {path!r}. Move that folder's files to the model's own "
                "folder, and write an empty path."
            )
        if kind not in ("Transformer", "Pooling", "Dense", "Normalize", "Dropout"):
            raise ConfigError(
                f"{where}: modules.json names {module['type']}, which pt does not compute. It computes Transformer, "
                "Pooling, Dense and Normalize."
            )
        is_late = kind == "Dense" and has_pooled and not has_normalized
        if kind == "Dense" and not is_late:
            raise ConfigError(f"{where}: modules.json has a Dense that is not between Pooling and Normalize.")
        if is_late:
            found.append(_dense(find, path, where))
        has_pooled, has_normalized = has_pooled or kind == "Pooling", has_normalized or kind == "Normalize"
    return tuple(found)


def _dense(find: Find, path: str, where: str) -> DenseLayer:
    name = f"{path}/config.json"
    config = read_side_file(find, name)
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where}: {name} is missing, which modules.json names. Download the whole model.")
    file = f"{where}: {name}"
    check_fields(config, _DENSE, file)
    for needed in ("in_features", "out_features"):
        if config.get(needed) is None:
            raise ConfigError(f"{file}: {needed} is missing.")
    if config.get("use_residual") or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise ConfigError(f"{file}: pt computes a Dense of the pooled vector, without use_residual.")
    activation = config.get("activation_function") or f"{TORCH_MODULES}activation.Tanh"
    return DenseLayer(
        path, config["in_features"], config["out_features"], config.get("bias") is not False,
        _torch_module(activation, f"{file}: activation_function"),
    )  # fmt: skip


def _torch_module(name: str, where: str) -> str:
    """Returns the name of a class of torch.nn. Raises ConfigError for what is not one."""
    if not name.startswith(TORCH_MODULES):
        raise ConfigError(f"{where} is {shown(name)}; only classes of {TORCH_MODULES}… are loaded.")
    return name.rpartition(".")[2]


def _prompts(find: Find, where: str) -> dict[str, Any]:
    found = read_side_file(find, "config_sentence_transformers.json")
    if not isinstance(found, Mapping):
        return {}
    file = f"{where}: config_sentence_transformers.json"
    check_fields(found, {"prompts": OBJECT, "default_prompt_name": text(MOST_NAME)}, file)
    prompts = {str(name): value for name, value in (found.get("prompts") or {}).items() if isinstance(value, str)}
    if len(prompts) > MOST_PROMPTS or any(len(value) > MOST_PROMPT for value in prompts.values()):
        raise ConfigError(f"{file}: prompts has more than {MOST_PROMPTS} texts, or one of more than {MOST_PROMPT}.")
    default = found.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ConfigError(f"{file}: default_prompt_name is {shown(default)}, which is none of prompts.")
    return {"prompts": prompts, "default_prompt": default}


def _lengths(config: Mapping[str, Any], find: Find, positions: int) -> dict[str, Any]:
    """Returns the most tokens of an input, as vLLM finds it, and whether texts are lowered before they are
    tokenised."""
    if config.get("model_type") in _OFFSET_POSITIONS:
        padding = config.get("pad_token_id", 1)
        positions -= padding + 1 if is_whole(padding, 0, positions - 2) else 0
    tokenizer = read_side_file(find, "tokenizer_config.json")
    own = tokenizer.get("model_max_length") if isinstance(tokenizer, Mapping) else None
    length = _least(positions, own)
    for name in _LENGTH_FILES:
        found = read_side_file(find, name)
        if isinstance(found, Mapping):
            most = found.get("max_seq_length")
            length = length if most is None else _least(positions, most)
            return {"length": length, "lowers_case": found.get("do_lower_case") is True}
    return {"length": length}


def _least(positions: int, found: Any) -> int:
    """Returns the smaller of two lengths. A tokenizer without a length of its own writes 10^30."""
    return min(positions, int(found)) if is_whole(found, 1, MOST_TOKENS) else positions


def _labels(config: Mapping[str, Any]) -> int:
    """Returns the number of a classifier's labels, which is 2 in transformers if the config does not say."""
    names, count = config.get("id2label"), config.get("num_labels")
    if isinstance(count, int) and is_whole(count, 1, MOST_WIDTH):
        return count
    return len(names) if isinstance(names, Mapping) and names else 2


def _activation(config: Mapping[str, Any], where: str) -> Activation:
    """Returns what turns the one logit into a score, as vLLM's `get_act_fn` decides."""
    problem = config.get("problem_type")
    if problem in ("regression", "single_label_classification", "multi_label_classification"):
        return "identity" if problem == "regression" else "sigmoid"
    ours = config.get("sentence_transformers")
    named = ours.get("activation_fn") if isinstance(ours, Mapping) else None
    named = named or config.get("sbert_ce_default_activation_function")
    if not isinstance(named, str):
        return "sigmoid"
    name = _torch_module(named, f"{where}: config.json: the activation of its scores")
    if name not in ("Identity", "Sigmoid"):
        raise ConfigError(f"{where}: config.json: the activation of its scores is {name}; pt has Sigmoid and Identity.")
    return "identity" if name == "Identity" else "sigmoid"


def _are_sizes(values: list[Any]) -> bool:
    return bool(values) and all(is_whole(item, 1, MOST_WIDTH) for item in values)
