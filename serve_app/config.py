"""Defines what a user writes: one `ModelConfig` for each model and one `RouterConfig`, both as `args` in a Ray Serve
config file.

Field names are those of ms-swift, Hugging Face and vLLM. Nothing is accepted and then ignored: a field that the
chosen backend cannot honour is refused here, with the reason and the field to use instead.
"""

import ast
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticKnownError

from serve_app.errors import ConfigError, nearest
from serve_app.field_errors import field_errors

# Decimal and binary units as accelerate reads them. accelerate takes "gb" for gigaBITS; we refuse that spelling.
UNITS = {
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip

# These names come from other programs, and are called this here.
FOREIGN_NAMES = {
    "torch_dtype": "dtype",
    "model_path": "model",
    "model_id": "model",
    "backend": "infer_backend",
    "max_length": "max_model_len",
    "max_batch_size": "max_num_seqs",
    "tp": "tensor_parallel_size",
    "tensor_parallel": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "pipeline_parallel": "pipeline_parallel_size",
    "quant_method": "quantization",
    "speculative_config": "speculative",
}
NOT_HERE = {
    "served_model_name": "the model's name is the application's 'name'.",
    "name": "the model's name is the application's 'name', one level up.",
    "port": "the port belongs under 'http_options' at the top of the file.",
    "host": "the host belongs under 'http_options' at the top of the file.",
    "num_replicas": "scaling belongs under 'deployments: [{name: Model, num_replicas: …}]' of the application.",
    "autoscaling_config": "scaling belongs under 'deployments: [{name: Model, autoscaling_config: …}]'.",
    "gpu_memory_utilization": "with vllm, write it under 'engine_args'. With pt, use 'max_memory'.",
}

# These are accelerate's ways to spread layers over the GPUs by itself.
DEVICE_MAP_NAMES = ("auto", "balanced", "balanced_low_0", "sequential")

# pt rounds the weights by these methods while it loads them. `planning/quantization.py` has their sizes.
PT_QUANTIZATIONS = ("bnb-nf4", "bnb-int8")

# Only vLLM honours these fields, except a `quantization` of pt's.
ONLY_VLLM = (
    "tensor_parallel_size", "pipeline_parallel_size", "pipeline_layers", "nnodes", "quantization", "engine_args",
    "gpu_ids",
)  # fmt: skip
# Only pt honours these fields, except that vLLM honours `max_memory` too. So with `auto` the plan decides there.
ONLY_PT = ("max_memory", "device_map", "num_gpus", "max_queued_requests")
# These arguments of vLLM take more GPUs than tensor_parallel_size and pipeline_parallel_size say.
UNPLACED = frozenset(
    {
        "data_parallel_size",
        "data_parallel_size_local",
        "prefill_context_parallel_size",
        "distributed_executor_backend",
    }
)
# These arguments are for vLLM's own HTTP server, which does not run here, since Ray Serve's does.
SERVER_ARGS = re.compile(r"host|port|uds|ssl_.*|uvicorn_.*|api_server_count|headless|root_path|grpc.*|config|api_key")

MaxMemoryKey = int | Literal["cpu", "disk"]


def parse_bytes(value: object, where: str) -> int:
    """Returns the bytes of a size such as "3GB" (10⁹) or "3GiB" (2³⁰).

    Raises ConfigError for a bare number, a negative size, bits ("gb") and unknown units, with the right spelling.
    """
    text = str(value).strip()
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or isinstance(value, bool):
        raise ConfigError(f"{where}: '{text}' is not a size. Write a number and a unit, such as 3GB or 3GiB.")
    number, unit = match.groups()
    if number.startswith("-"):
        raise ConfigError(f"{where}: '{text}' is negative. Write a size of zero or more, such as 3GB.")
    if not unit:
        raise ConfigError(f"{where}: '{text}' has no unit. Write {number}GB (10⁹ bytes) or {number}GiB (2³⁰ bytes).")
    if unit not in UNITS:
        by_lower = {known.lower(): known for known in UNITS} | {letter: f"{letter.upper()}B" for letter in "kmgt"}
        right = by_lower.get(unit.lower())
        hint = f"Write {number}{right}." if right else f"Known units: {', '.join(UNITS)}."
        raise ConfigError(f"{where}: unknown unit '{unit}' in '{text}'. {hint}")
    return int(float(number) * UNITS[unit])


def parse_max_memory(value: object) -> dict[MaxMemoryKey, int]:
    """Returns the bytes for each device: a GPU's index, "cpu" or "disk".

    It takes a mapping, or a string of one as in `swift deploy --max_memory '{0: "3GB", 1: "10GB"}'`.
    """
    mapping = _read_mapping(value) if isinstance(value, str) else value
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"max_memory: expected a mapping such as {{0: 3GB, 1: 10GB}}, got {value!r}.")
    if not mapping:
        raise ConfigError("max_memory is empty. Leave it out, or name a device, such as {0: 3GB}.")
    parsed: dict[MaxMemoryKey, int] = {}
    for key, size in mapping.items():
        device = _parse_device(key)
        if device in parsed:
            raise ConfigError(f"max_memory: device {device} is named twice.")
        parsed[device] = parse_bytes(size, f"max_memory[{device}]")
    return parsed


def _read_mapping(text: str) -> object:
    """Returns the value of a Python, JSON or YAML literal, or the text itself if it is none of them."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _parse_device(key: object) -> MaxMemoryKey:
    text = str(key).strip()
    if isinstance(key, bool) or not (match := re.fullmatch(r"(?:cuda:|gpu:)?(\d+)|(cpu|disk)", text)):
        raise ConfigError(f"max_memory: unknown device '{text}'. Use a GPU index (0, 1, …), cpu or disk.")
    index, tier = match.groups()
    return int(index) if index is not None else tier  # type: ignore[return-value]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())

    @classmethod
    def from_args(cls, args: Mapping[str, Any] | None) -> Self:
        """Returns the config that the `args` of one application describe. Raises ConfigError with a line for each
        mistake."""
        args = dict(args or {})
        unknown = [_unknown_field(name, cls.model_fields) for name in args if name not in cls.model_fields]
        if unknown:
            raise ConfigError("\n".join(unknown))
        try:
            return cls.model_validate(args)
        except ValidationError as error:
            raise ConfigError("\n".join(field_errors(error.errors(), args))) from None


def _unknown_field(name: str, known: Mapping[str, object]) -> str:
    if name in NOT_HERE:
        return f"unknown field '{name}': {NOT_HERE[name]}"
    if name in FOREIGN_NAMES and FOREIGN_NAMES[name] in known:
        return f"unknown field '{name}'. Did you mean '{FOREIGN_NAMES[name]}'?"
    return f"unknown field '{name}'.{nearest(name, known) or ' Known fields: ' + ', '.join(known) + '.'}"


def _max_memory_or_none(value: object) -> dict[MaxMemoryKey, int] | None:
    try:
        return None if value is None else parse_max_memory(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _size_or_none(value: object) -> int | None:
    try:
        size = None if value is None else parse_bytes(value, "kv_cache_memory_bytes")
    except ConfigError as error:
        raise ValueError(str(error)) from None
    if size == 0:
        raise ValueError("kv_cache_memory_bytes must be more than zero. Leave it out, and the plan chooses it.")
    return size


def _whole(value: object) -> object:
    """Returns the value. pydantic would take true for 1."""
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


def _number(value: object) -> object:
    """Returns the value. pydantic would take true for 1.0."""
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


def _flag(value: object) -> object:
    """Returns the value. pydantic would take such as 'yes' for true."""
    if isinstance(value, str):
        raise PydanticKnownError("bool_type")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Positive = Annotated[Whole, Field(gt=0)]
Seconds = Annotated[Number, Field(gt=0)]


SPECULATIVE_METHODS = ("ngram", "draft_model")


def _known_speculation(value: object) -> object:
    """Returns the value. Raises ValueError for a method or a field that only vLLM has, or nobody."""
    if not isinstance(value, Mapping):
        return value
    elsewhere = "With vllm, all its methods work under engine_args: {speculative_config: …}."
    for name in map(str, value):
        if name not in SpeculativeConfig.model_fields:
            raise ValueError(
                f"unknown field '{name}'.{nearest(name, SpeculativeConfig.model_fields)} Known fields: "
                f"{', '.join(SpeculativeConfig.model_fields)}. {elsewhere}"
            )
    method = value.get("method", "draft_model" if "model" in value else None)
    if method not in SPECULATIVE_METHODS:
        given = f"unknown method {method!r}." if "method" in value else "there is no method."
        raise ValueError(f"{given} Write method: ngram, or model: and the folder or id of a draft model. {elsewhere}")
    return {**value, "method": method}


MAX_BODY_BYTES = 32 * 2**20
MAX_BODIES_BYTES = 2**30
BODY_TIMEOUT_S = 60.0


class SpeculativeConfig(_Strict):
    """Says how an engine drafts tokens that one pass then verifies. All names are those of vLLM's speculative_config.

    With the method `ngram`, up to `num_speculative_tokens` tokens are drafted from the place in prompt and answer where
    the last `prompt_lookup_max` tokens stood before, or fewer of them, down to `prompt_lookup_min`.
    With the method `draft_model`, which is that of a config with `model` and no method, a smaller model drafts them.
    `model` is a local folder or a Hugging Face id, of which `revision` is a version, and `quantization` rounds its
    weights while they are loaded, by a method of the backend.
    """

    method: Literal["ngram", "draft_model"]
    num_speculative_tokens: Annotated[Whole, Field(ge=1, le=32)] = 4
    prompt_lookup_max: Annotated[Whole, Field(ge=1, le=32)] = 4
    prompt_lookup_min: Annotated[Whole, Field(ge=1, le=32)] = 2
    model: Annotated[str, Field(min_length=1)] | None = None
    revision: str | None = None
    quantization: str | None = None

    @model_validator(mode="after")
    def _has_what_its_method_needs(self) -> Self:
        own = ("prompt_lookup_max", "prompt_lookup_min") if self.method == "ngram" else _OF_A_DRAFT_MODEL
        for name in (*_OF_A_DRAFT_MODEL, "prompt_lookup_max", "prompt_lookup_min"):
            if name not in own and name in self.model_fields_set and getattr(self, name) is not None:
                other = "draft_model" if self.method == "ngram" else "ngram"
                raise ValueError(f"{name} belongs to method: {other}, and the method is {self.method}. Leave it out.")
        if self.method == "draft_model" and self.model is None:
            raise ValueError("method: draft_model needs model: and the folder or id of a smaller model.")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min is {self.prompt_lookup_min}, but prompt_lookup_max is {self.prompt_lookup_max}. "
                "Raise prompt_lookup_max, or lower prompt_lookup_min."
            )
        return self

    @property
    def for_vllm(self) -> dict[str, Any]:
        """Returns vLLM's `speculative_config`. It has both bounds of the match, because vLLM takes one for the other
        where it is missing."""
        fields = self.model_dump(exclude_none=True)
        if self.method == "draft_model":
            del fields["prompt_lookup_max"], fields["prompt_lookup_min"]
        return fields


# Only the method `draft_model` has these fields of `speculative`.
_OF_A_DRAFT_MODEL = ("model", "revision", "quantization")


class ModelConfig(_Strict):
    """This is a model: what to load, with which engine, and on which devices. Sizes are in bytes and lengths in tokens.

    `model` is a local folder, a Hugging Face id, or `serve-app/demo`, the model that ships with this package.
    `max_memory` caps what a replica may take of each GPU, by index. vLLM has a stage of its pipeline on each, or on
    `tensor_parallel_size` of them. With pt it also opens the `cpu` and `disk` tiers.
    `gpu_ids` names vLLM's GPUs, by index, on nodes that advertise their memory by index.
    `pipeline_parallel_size` is the number of stages of whole layers, each on `tensor_parallel_size` GPUs, and
    `pipeline_layers` is the number of layers of each stage, the first stage first.
    `nnodes` is the number of nodes over which the stages of each replica go. Each node takes `num_cpus` then.
    `accelerator_type` ties it to nodes of one kind of GPU, by Ray's name for it, such as L4 or A100.
    `num_gpus` below 1 is a share of one GPU, which holds all that the replica takes there, its CUDA context too.
    `speculative` drafts tokens with both engines, by lookup or with a second model. For vLLM it is the argument
    `speculative_config`.
    `engine_args` goes to vLLM as it stands, for anything that has no field here.
    A pt engine that has work but ends no step for `step_timeout_s` seconds hangs, and its replica is replaced.
    `max_body_bytes` and `body_timeout_s` bound a request's body by the model's own route. The router has its own.
    """

    model: Annotated[str, Field(min_length=1)]
    infer_backend: Literal["pt", "vllm", "auto"]
    revision: str | None = None
    trust_remote_code: Flag = False
    chat_template: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["cuda", "cpu"] = "cuda"
    device_map: str | dict[str, Whole | str] | None = None
    max_memory: Annotated[dict[MaxMemoryKey, int] | None, BeforeValidator(_max_memory_or_none)] = None
    tensor_parallel_size: Positive | None = None
    pipeline_parallel_size: Positive | None = None
    pipeline_layers: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    nnodes: Positive | None = None
    max_model_len: Positive | None = None
    max_num_seqs: Positive | None = None
    max_queued_requests: Positive | None = None
    step_timeout_s: Seconds | None = None
    max_body_bytes: Positive = MAX_BODY_BYTES
    body_timeout_s: Seconds = BODY_TIMEOUT_S
    kv_cache_memory_bytes: Annotated[int | None, BeforeValidator(_size_or_none)] = None
    gpu_ids: Annotated[tuple[Annotated[Whole, Field(ge=0)], ...], Field(min_length=1)] | None = None
    accelerator_type: Annotated[str, Field(min_length=1)] | None = None
    quantization: str | None = None
    speculative: Annotated[SpeculativeConfig | None, BeforeValidator(_known_speculation)] = None
    num_cpus: Annotated[Number, Field(gt=0)] = 1.0
    num_gpus: Annotated[Number, Field(ge=0.001, le=1024)] | None = None
    engine_args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_the_backend(self) -> Self:
        backend_problem = {"vllm": _vllm_problem, "pt": _pt_problem, "auto": _auto_problem}[self.infer_backend]
        problem = backend_problem(self) or _device_problem(self)
        if problem:
            raise ValueError(problem)
        return self

    @property
    def only_vllm(self) -> list[str]:
        """Returns the fields that are set and that only vLLM honours."""
        own = {"quantization"} if self.quantization in PT_QUANTIZATIONS else set()
        return [name for name in ONLY_VLLM if getattr(self, name) and name not in own]

    @property
    def only_pt(self) -> list[str]:
        """Returns the fields that are set and that only pt honours, or that decide for it with `auto`."""
        own = ["quantization"] if self.quantization in PT_QUANTIZATIONS else []
        return own + [name for name in ONLY_PT if getattr(self, name)]

    @property
    def draft(self) -> "ModelConfig | None":
        """Returns the config of the model that drafts for this one in pt, or None if none does. It runs beside this
        one on one of its devices, and takes the `dtype` that this one is told to take."""
        spec = self.speculative
        if spec is None or spec.model is None:
            return None
        return ModelConfig(
            model=spec.model,
            infer_backend="pt",
            revision=spec.revision,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
            device=self.device,
            max_num_seqs=self.max_num_seqs,
            quantization=spec.quantization,
            num_cpus=self.num_cpus,
        )

    @property
    def gpu_indices(self) -> tuple[int, ...]:
        """Returns the GPUs that `max_memory`, `gpu_ids` or a mapping in `device_map` names, in order."""
        mapped = self.device_map.values() if isinstance(self.device_map, dict) else ()
        named = (*(self.max_memory or {}), *(self.gpu_ids or ()), *mapped)
        return tuple(sorted({device for device in named if isinstance(device, int)}))

    @property
    def stages(self) -> int:
        """Returns the number of vLLM's pipeline stages, which is 1 without a pipeline. If `max_memory` names the GPUs
        and nothing else says how many stages there are, each has `tensor_parallel_size` of them."""
        if self.pipeline_parallel_size or self.pipeline_layers:
            return self.pipeline_parallel_size or len(self.pipeline_layers or ())
        if not self.max_memory or self.infer_backend == "pt":
            return 1
        return max(1, len(self.gpu_indices) // (self.tensor_parallel_size or 1))

    @property
    def named_gpus(self) -> tuple[int, ...]:
        """Returns the GPUs that `gpu_ids` or `max_memory` names, as they are written. With `pipeline_layers` this is
        the order of the stages."""
        return tuple(dict.fromkeys(key for key in self.gpu_ids or self.max_memory or () if isinstance(key, int)))

    @property
    def ranks(self) -> int:
        """Returns the number of vLLM's processes that compute, each of which has a GPU of its own if there are
        several."""
        return (self.tensor_parallel_size or 1) * self.stages

    @property
    def nodes(self) -> int:
        """Returns the number of nodes that one replica takes."""
        return self.nnodes or 1

    @property
    def ranks_of_nodes(self) -> list[int]:
        """Returns the number of vLLM's ranks on each node, if each has as many whole stages as any other or one
        more."""
        least, more = divmod(self.stages, self.nodes)
        return [(self.tensor_parallel_size or 1) * (least + (number < more)) for number in range(self.nodes)]

    @property
    def rank_threads(self) -> int:
        """Returns the number of threads with which each of vLLM's ranks computes on the CPU. Those of a node share its
        CPUs."""
        return max(1, int(self.num_cpus) // max(self.ranks_of_nodes))

    @property
    def share(self) -> float | None:
        """Returns the share of one GPU that `num_gpus` sets, or None if the replica has whole GPUs."""
        return self.num_gpus if self.num_gpus is not None and self.num_gpus < 1 else None

    @property
    def vllm_args(self) -> dict[str, Any]:
        """Returns `engine_args` with underscores in their names, because vLLM takes dashes as well."""
        return {name.replace("-", "_"): value for name, value in self.engine_args.items()}

    @property
    def spill_tiers(self) -> frozenset[str]:
        """Returns the slower tiers, "cpu" and "disk", that the user opened by naming them."""
        return frozenset(key for key in self.max_memory or {} if isinstance(key, str))


def _vllm_problem(config: ModelConfig) -> str | None:
    if config.quantization in PT_QUANTIZATIONS:
        return (
            f"quantization: {config.quantization} is a method of pt. Use infer_backend: pt, or a method of vLLM such "
            "as fp8."
        )
    if config.speculative is not None and config.speculative.quantization in PT_QUANTIZATIONS:
        return (
            f"speculative.quantization: {config.speculative.quantization} is a method of pt. Use infer_backend: pt, or "
            "a method of vLLM such as fp8."
        )
    if (problem := _vllm_limits_problem(config)) is not None:
        return problem
    if config.device_map is not None:
        return (
            "device_map: vLLM has no device map. Use tensor_parallel_size, which splits every layer over equal GPUs, "
            "or pipeline_layers, which says how many whole layers each GPU has, or infer_backend: pt."
        )
    if config.max_queued_requests is not None:
        return "max_queued_requests: vLLM's queue cannot be bounded. Set Serve's own under 'deployments:' instead."
    if config.step_timeout_s is not None:
        return (
            "step_timeout_s works with pt only. For vLLM, set VLLM_ENGINE_ITERATION_TIMEOUT_S under runtime_env "
            "instead."
        )
    if (problem := _pipeline_problem(config)) is not None:
        return problem
    if config.num_gpus is not None and (config.num_gpus >= 1 or config.ranks > 1):
        return (
            "num_gpus: vLLM takes tensor_parallel_size whole GPUs for each of its pipeline_parallel_size stages. Set "
            "these fields instead. Below 1, num_gpus is a share of one GPU, without these fields."
        )
    if config.gpu_ids is not None and len(set(config.gpu_ids)) != config.ranks:
        both = config.stages > 1
        field = "tensor_parallel_size times pipeline_parallel_size" if both else "tensor_parallel_size"
        return f"gpu_ids names {len(set(config.gpu_ids))} GPUs, but {field} is {config.ranks}. The two must be equal."
    if (problem := _vllm_number_problem(config.vllm_args)) is not None:
        return problem
    named = set(config.vllm_args)
    for field in sorted(named & UNPLACED):
        return (
            f"engine_args.{field} changes the GPUs or processes that Ray counts. Use tensor_parallel_size or "
            "pipeline_parallel_size."
        )
    if config.speculative is not None and "speculative_config" in named:
        return "engine_args.speculative_config says the same as the field speculative. Leave one of the two out."
    for field in sorted(named):
        if SERVER_ARGS.fullmatch(field):
            return f"engine_args.{field} belongs to vLLM's own HTTP server, which does not run here. Leave it out."
    for field in sorted(named & (ModelConfig.model_fields.keys() | {"served_model_name"})):
        place = "is the application's name" if field == "served_model_name" else "has a field of its own"
        return f"engine_args.{field} {place}. Set it there, not under engine_args."
    return None


def _vllm_limits_problem(config: ModelConfig) -> str | None:
    """Returns why vLLM cannot be held to `max_memory`, or None if it can. It is cut into stages that keep to it."""
    if config.max_memory is None:
        return None
    if config.device == "cpu":
        return "max_memory: with vllm it limits GPUs, and device is cpu. Use kv_cache_memory_bytes instead."
    if config.spill_tiers:
        tiers = " and ".join(sorted(config.spill_tiers))
        return (
            f"max_memory names {tiers}, but vLLM keeps all layers on GPUs. Leave {tiers} out, or use infer_backend: "
            "pt, which keeps layers there."
        )
    for field in ("gpu_ids", "num_gpus"):
        if getattr(config, field) is not None:
            return f"{field}: max_memory names the GPUs and how much each may give. Leave {field} out."
    return _named_gpus_problem(config, len(config.gpu_indices))


def _named_gpus_problem(config: ModelConfig, named: int) -> str | None:
    """Returns why vLLM's stages do not take as many GPUs as `max_memory` names, or None if they do. It speaks of fields
    that were written."""
    if named in (0, config.ranks):
        return None
    size = config.tensor_parallel_size or 1
    start = f"max_memory names {named} GPUs, but "
    if not config.pipeline_layers and not config.pipeline_parallel_size:
        return (
            f"{start}tensor_parallel_size is {size}, and each stage has so many of them. Name {config.ranks} GPUs, or "
            f"{config.ranks + size}."
        )
    stages = "pipeline_layers has" if config.pipeline_layers else "pipeline_parallel_size sets"
    each = f" of {size} GPUs each (tensor_parallel_size)" if size > 1 else ""
    start += f"{stages} {config.stages} stage{'' if config.stages == 1 else 's'}{each}. Name {config.ranks} GPUs"
    if named % size:
        return f"{start}."
    if config.pipeline_layers is None:
        return f"{start}, or leave pipeline_parallel_size out, and there are {named // size} stages."
    out = "pipeline_layers and pipeline_parallel_size" if config.pipeline_parallel_size else "pipeline_layers"
    return f"{start}, or leave {out} out, and the plan cuts the layers into {named // size} stages."


def _pipeline_problem(config: ModelConfig) -> str | None:
    """Returns why the number of stages and the layers of each contradict each other, or None if they agree."""
    layers, size = config.pipeline_layers, config.pipeline_parallel_size
    if layers is None or size in (None, len(layers)):
        return _nodes_problem(config)
    return (
        f"pipeline_layers has {len(layers)} stages, but pipeline_parallel_size is {size}. Give each stage its number "
        "of layers, or leave pipeline_parallel_size out."
    )


def _nodes_problem(config: ModelConfig) -> str | None:
    """Returns why a replica cannot go over `nnodes` nodes, or None if it can. Each node has whole stages."""
    if config.nodes == 1:
        return None
    for field in ("gpu_ids", "max_memory"):
        if getattr(config, field) is not None:
            return f"{field} names GPUs of one node, and nnodes is {config.nnodes}. Leave one of the two out."
    if config.stages < config.nodes:
        return (
            f"nnodes is {config.nnodes}, and each node has at least one stage of the pipeline, but "
            f"pipeline_parallel_size is {config.stages}. Set pipeline_parallel_size: {config.nnodes} or more."
        )
    return None


def _vllm_number_problem(arguments: Mapping[str, Any]) -> str | None:
    """Returns why a number that the memory plan needs is not usable, or None if all are."""
    share = arguments.get("gpu_memory_utilization")
    if share is not None and not (_is_number(share) and 0 < share <= 1):
        return f"engine_args.gpu_memory_utilization: {share!r} must be a number above 0 and at most 1, such as 0.9."
    try:
        token_count(arguments.get("max_num_batched_tokens", 1))
    except ValueError:
        given = arguments["max_num_batched_tokens"]
        return f"engine_args.max_num_batched_tokens: {given!r} must be a whole number above 0, such as 8192 or 8k."
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def token_count(value: object) -> int:
    """Returns a number as vLLM reads it: 8192, "8k" (8000) or "8K" (8192). Raises ValueError."""
    factors = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", str(value))
    count = int(float(match[1]) * factors.get(match[2], 1)) if match else 0
    if count < 1:
        raise ValueError(f"{value!r} is not a number of tokens")
    return count


def _pt_problem(config: ModelConfig) -> str | None:
    if config.tensor_parallel_size is not None:
        return (
            "tensor_parallel_size: pt places whole layers and has no tensor parallelism. Use max_memory to spread "
            "the layers over GPUs, such as {0: 3GB, 1: 10GB}, or infer_backend: vllm."
        )
    for field in ("pipeline_parallel_size", "pipeline_layers", "nnodes"):
        if getattr(config, field) is not None:
            return (
                f"{field}: pt places whole layers on one node by itself and has no stages. Use max_memory to spread "
                "the layers over GPUs, such as {0: 3GB, 1: 10GB}, or infer_backend: vllm."
            )
    if (problem := _device_map_problem(config)) is not None:
        return problem
    if config.gpu_ids is not None:
        return "gpu_ids: with pt, max_memory names the GPUs, such as {1: 10GB}. Write it there."
    if (problem := _pt_quantization_problem(config)) is not None:
        return problem
    if config.engine_args:
        return "engine_args go to vLLM, and pt takes none. Leave them out, or use infer_backend: vllm."
    return None


def _pt_quantization_problem(config: ModelConfig) -> str | None:
    """Returns why pt cannot quantise the weights as it loads them, or None. Quantised layers stay on the devices on
    which they were made."""
    method = config.quantization
    drafts = None if config.speculative is None else config.speculative.quantization
    for field, name in (("quantization", method), ("speculative.quantization", drafts)):
        if name is None or name in PT_QUANTIZATIONS:
            continue
        return (
            f"{field}: pt does not know '{name}'.{nearest(name, PT_QUANTIZATIONS)} It rounds weights by "
            f"{', '.join(PT_QUANTIZATIONS)} while it loads them. For a checkpoint that is quantised already, leave the "
            "field out, since pt reads its method from config.json. Methods of vLLM need infer_backend: vllm."
        )
    if method is None:
        return None
    mapped = config.device_map.values() if isinstance(config.device_map, dict) else ()
    places = {*(config.max_memory or {}), *mapped}
    tiers = {"disk"} if config.device == "cpu" else {"cpu", "disk"}
    for tier in sorted(tiers & places, key=str):
        field = "max_memory" if tier in (config.max_memory or {}) else "device_map"
        return (
            f"{field} names {tier}, but layers that are quantised by {method} cannot be moved to a GPU for each pass. "
            f"Leave {tier} out, or leave quantization out."
        )
    return None


def _auto_problem(config: ModelConfig) -> str | None:
    """Returns why `auto` cannot choose. Fields of one backend decide for it, and fields of both contradict each
    other."""
    only_vllm = config.only_vllm
    only_pt = [name for name in config.only_pt if not (name == "max_memory" and only_vllm)]
    if only_vllm and only_pt:
        return (
            f"{only_pt[0]} works with pt only, and {only_vllm[0]} with vllm only. With infer_backend: auto, name only "
            "one backend's fields."
        )
    return _vllm_problem(config) if only_vllm else _pt_problem(config)


def _device_map_problem(config: ModelConfig) -> str | None:
    if config.device_map is None:
        return None
    if config.device_map == {}:
        return "device_map is empty. Leave it out."
    if config.device_map == "cpu":
        return "device_map: unknown 'cpu'. Write device: cpu instead."
    if isinstance(config.device_map, str):
        if config.device_map not in DEVICE_MAP_NAMES:
            names = ", ".join(DEVICE_MAP_NAMES)
            return f"device_map: unknown '{config.device_map}'. Use {names}, or a mapping of modules to devices."
        if config.device == "cpu":
            return "device_map: there is nothing to spread with device: cpu. Leave it out."
        return None
    for module, device in config.device_map.items():
        is_gpu = isinstance(device, int) and not isinstance(device, bool) and device >= 0
        if device not in ("cpu", "disk") and not is_gpu:
            return f"device_map: unknown device '{device}' for '{module}'. Use a GPU's number (0, 1, …), cpu or disk."
    if config.max_memory is not None:
        return "max_memory: a mapping in device_map places every module itself, so no limit applies. Leave one out."
    return None


def _device_problem(config: ModelConfig) -> str | None:
    if config.device == "cpu":
        if config.gpu_indices:
            field = "max_memory" if config.max_memory else "gpu_ids" if config.gpu_ids else "device_map"
            return f"{field} names GPUs, but device is cpu. Remove them, or remove device: cpu."
        if config.num_gpus is not None:
            return "num_gpus is set, but device is cpu. Remove one of the two."
        if config.accelerator_type is not None:
            return "accelerator_type is set, but device is cpu. Remove one of the two."
        return None
    if config.max_memory is not None and not config.gpu_indices:
        return "max_memory names no GPU. Add one, such as {0: 3GB, cpu: 20GB}, or set device: cpu."
    if config.num_gpus is not None and config.num_gpus > 1 and config.num_gpus != int(config.num_gpus):
        return (
            f"num_gpus must be whole if it is above 1, but {config.num_gpus} is not. Ray cannot give shares of "
            "several GPUs."
        )
    if config.num_gpus is not None and len(config.gpu_indices) > max(1, config.num_gpus):
        return (
            f"num_gpus is {config.num_gpus:g}, but max_memory or device_map names {len(config.gpu_indices)} GPUs. "
            "Leave num_gpus out, and it follows them."
        )
    return None


class RouterConfig(_Strict):
    """This is the router: its names, limits and waiting. Sizes are in bytes and times in seconds, and all hold for each
    router replica.

    `aliases` are other names of models, and `fallbacks` are the models that answer for one that is down or full.
    `first_byte_timeout_s` is a whole answer's time if it is not streamed. `max_retries` bounds how often a request is
    sent again, or a stream is continued, after its replica was lost. `max_waiting_requests` may wait for their
    first byte at one model, and `max_held_requests` of them for a model that is loading, for `hold_timeout_s`.
    `max_bodies_bytes` bounds all bodies together that a router replica holds at one time. `allow_open_access` says that
    the address is meant to be open, without API keys, to other machines.
    """

    allow_open_access: Flag = False
    aliases: dict[str, str] = Field(default_factory=dict)
    default_model: str | None = None
    fallbacks: dict[str, list[str]] = Field(default_factory=dict)
    max_body_bytes: Positive = MAX_BODY_BYTES
    max_bodies_bytes: Positive = MAX_BODIES_BYTES
    max_header_bytes: Positive = 32 * 2**10
    body_timeout_s: Seconds = BODY_TIMEOUT_S
    first_byte_timeout_s: Seconds = 600.0
    idle_timeout_s: Seconds = 300.0
    total_timeout_s: Seconds = 3600.0
    max_retries: Annotated[Whole, Field(ge=0)] = 3
    max_waiting_requests: Positive = 1024
    max_held_requests: Annotated[Whole, Field(ge=0)] = 256
    hold_timeout_s: Seconds = 300.0
    discovery_interval_s: Seconds = 2.0

    @model_validator(mode="after")
    def _names_lead_somewhere(self) -> Self:
        for alias, name in self.aliases.items():
            if name in self.aliases:
                raise ValueError(f"aliases.{alias}: '{name}' is itself an alias. Name the model.")
        return self
