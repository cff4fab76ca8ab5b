"""Defines the fields of a model in a config file, with the type of each value, and what follows from them.

Field names are those of ms-swift, Hugging Face and vLLM.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticKnownError

from serve_app.byte_sizes import MaxMemoryKey, parse_bytes, parse_max_memory
from serve_app.errors import ConfigError, nearest
from serve_app.field_errors import field_errors

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
    "lora_modules": "adapters",
}
NOT_HERE = {
    "served_model_name": "the model's name is the application's 'name'.",
    "name": "the model's name is the application's 'name', one level up.",
    "port": "the port belongs under 'http_options' at the top of the file.",
    "host": "the host belongs under 'http_options' at the top of the file.",
    "num_replicas": "scaling belongs under 'deployments: [{name: Model, num_replicas: …}]' of the application.",
    "autoscaling_config": "scaling belongs under 'deployments: [{name: Model, autoscaling_config: …}]'.",
    "enable_lora": "naming 'adapters' enables them.",
    "gpu_memory_utilization": "with vllm, write it under 'engine_args'. With pt, use 'max_memory'.",
}

# pt rounds the weights by these methods while it loads them. `planning/quantization.py` has their sizes.
PT_QUANTIZATIONS = ("bnb-nf4", "bnb-int8")
# With this value of `quantization`, the plan chooses whole weights or one of these methods for pt.
AUTO_QUANTIZATION = "auto"
# pt keeps its KV cache in 8 bits by these types. vLLM has the first three by the same names.
PT_CACHE_DTYPES = ("fp8", "fp8_e4m3", "fp8_e5m2", "int8")

# Only vLLM honours these fields, except a `quantization` of pt's. `kv_cache_dtype` depends on its value too.
ONLY_VLLM = (
    "tensor_parallel_size", "pipeline_parallel_size", "pipeline_layers", "nnodes", "quantization", "engine_args",
    "gpu_ids",
)  # fmt: skip
# Only pt honours these fields, except that vLLM honours `max_memory` too. So with `auto` the plan decides there.
ONLY_PT = (
    "max_memory", "device_map", "num_gpus", "max_queued_requests", "prompt_cache_memory", "max_num_batched_tokens",
)  # fmt: skip


# A name is part of JSON bodies, of metrics and of paths. ":" is left out, because MODEL:ADAPTER names an adapter too.
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~@+=,-]{0,127}")
# One model has at most so many adapters by name. What is bounded by it is small: a name, a folder and a state for each.
MOST_ADAPTERS = 1000
# vLLM has buffers for these ranks (`MaxLoRARanks` of its LoRAConfig), and pt rounds up to them too.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Without `max_loras`, a batch may have as many different adapters as the model names, but no more than these.
DEFAULT_MAX_LORAS = 8
# This is vLLM's own default of `max_lora_rank`, which applies if none of the adapters can be read at the start.
DEFAULT_LORA_RANK = 16


class Strict(BaseModel):
    """This is what all configs share: unknown fields are refused, and a config does not change."""

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
            raise ConfigError("\n".join(field_errors(error.errors(), args, cls))) from None


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


def _pool_memory_or_none(value: object) -> dict[MaxMemoryKey, int] | None:
    try:
        return None if value is None else parse_max_memory(value, "pool_memory")
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _host_memory_or_none(value: object) -> int | None:
    try:
        return None if value is None else 0 if value == 0 else parse_bytes(value, "host_memory")
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


def _prompt_cache_or_none(value: object) -> int | None:
    try:
        size = None if value is None else parse_bytes(value, "prompt_cache_memory")
    except ConfigError as error:
        raise ValueError(str(error)) from None
    if size == 0:
        raise ValueError("prompt_cache_memory must be more than zero. Leave it out, and no text is kept.")
    return size


def _named_adapters(value: object) -> object:
    """Returns the value. Raises ValueError for a name that no client could write, and for too many of them."""
    if not isinstance(value, Mapping):
        return value
    if len(value) > MOST_ADAPTERS:
        raise ValueError(f"adapters: there are {len(value)} of them; at most {MOST_ADAPTERS} are allowed.")
    for name, source in value.items():
        if not isinstance(name, str):
            raise ValueError(
                f"adapters: the name {str(name)[:60]} must be a text, but YAML reads it as another type. Write it in "
                "quotes, such as '1'."
            )
        if ADAPTER_NAME.fullmatch(name) is None:
            raise ValueError(
                f"adapters: the name {name[:60]!r} must begin with a letter or digit and may have letters, digits "
                "and ._~@+=,- after it, 128 characters in all."
            )
        if not isinstance(source, str) or not source.strip():
            raise ValueError(f"adapters.{name}: write the folder or the Hugging Face id of a LoRA adapter.")
    return value


def _rank_of_vllm(value: object) -> object:
    """Returns the value. Raises ValueError for a rank for which vLLM has no buffers."""
    if value is not None and value not in LORA_RANKS:
        raise ValueError(f"max_lora_rank: {value!r} must be one of {', '.join(map(str, LORA_RANKS))}.")
    return value


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
NamedAdapters = Annotated[dict[str, str], BeforeValidator(_named_adapters)]
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
BODY_TIMEOUT_S = 60.0


class SpeculativeConfig(Strict):
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


class ResidencyConfig(Strict):
    """Says whether a model holds its memory for as long as it is deployed (`pinned`), or shares it with the others of
    its pool, of which those hold it that are asked (`swap`).

    Each node has a pool of its own. `pool_memory` is what its resident models may take together of each device: GPUs by
    index, or `cpu` for models on the processor. The next slower tier that it names, `cpu` for GPUs and `disk` for the
    processor, is what copies of the weights of parked models may take. All models of a pool say the same `pool_memory`.
    `host_memory` is the most that the copy of this model may take, so 0 stops it instead of parking it. Once resident,
    it stays for `min_resident_s` seconds, and when it must leave, requests that run have `drain_s` seconds to end. Each
    step of `priority` makes the model count twice as much when it is decided who leaves.
    """

    policy: Literal["pinned", "swap"]
    pool: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] = "default"
    pool_memory: Annotated[dict[MaxMemoryKey, int] | None, BeforeValidator(_pool_memory_or_none)] = None
    host_memory: Annotated[int | None, BeforeValidator(_host_memory_or_none)] = None
    min_resident_s: Annotated[Number, Field(ge=0, le=3600)] = 1.0
    drain_s: Annotated[Number, Field(ge=0, le=3600)] = 30.0
    priority: Annotated[Whole, Field(ge=-10, le=10)] = 0

    @model_validator(mode="after")
    def _is_used(self) -> Self:
        """Refuses fields of swapping where nothing swaps."""
        given = sorted(self.model_fields_set - {"policy"})
        if self.policy == "pinned" and given:
            raise ValueError(f"{given[0]} works with policy: swap only. Leave it out, or set policy: swap.")
        return self


class LiveFields(Strict):
    """These are the fields of a model that change while its replicas run. The `user_config` of its deployment may have
    them, and they replace those of `args` then."""

    adapters: NamedAdapters | None = None
    allow_pickled_adapters: tuple[str, ...] | None = None


class ModelFields(Strict):
    """These are the fields of a model: what to load, with which engine, and on which devices. Sizes are in bytes and
    lengths in tokens.

    `model` is a local folder, a Hugging Face id, or `serve-app/demo`, the model that ships with this package.
    `max_memory` caps what a replica may take of each GPU, by index. vLLM has a stage of its pipeline on each, or on
    `tensor_parallel_size` of them. With pt it also opens the `cpu` and `disk` tiers.
    `gpu_ids` names vLLM's GPUs, by index, on nodes that advertise their memory by index.
    `pipeline_parallel_size` is the number of stages of whole layers, each on `tensor_parallel_size` GPUs, and
    `pipeline_layers` is the number of layers of each stage, the first stage first.
    `nnodes` is the number of nodes over which the stages of each replica go. Each node takes `num_cpus` then.
    `accelerator_type` ties it to nodes of one kind of GPU, by Ray's name for it, such as L4 or A100.
    `num_gpus` below 1 is a share of one GPU, which holds all that the replica takes there, its CUDA context too.
    `kv_cache_dtype` is the type of an element of KV cache. vLLM has more of them than pt.
    `speculative` drafts tokens with both engines, by lookup or with a second model. For vLLM it is the argument
    `speculative_config`.
    `prompt_cache_memory` is what pt may take of the host's memory to keep the keys and values of texts that have ended,
    for prompts that begin with them.
    `max_num_batched_tokens` bounds a step of pt with an embedding model or a cross-encoder, with its padding.
    `residency` says whether the model holds its memory all the time or shares it with others that swap.
    `adapters` are LoRA adapters by the names that clients write, each with its folder or Hugging Face id. Those of a
    replica that runs are replaced by the deployment's `user_config`. `adapters_folder` is watched, and each of its
    subfolders is an adapter. `max_loras` is how many different ones a batch may have, `max_lora_rank` the largest rank,
    and `max_cpu_loras` how many the host's memory keeps; both buffers are made at the start. `lora_target_modules`
    limits them to modules with these names. `allow_pickled_adapters` names adapters that may be read from
    adapter_model.bin.
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
    max_num_batched_tokens: Positive | None = None
    max_queued_requests: Positive | None = None
    step_timeout_s: Seconds | None = None
    max_body_bytes: Positive = MAX_BODY_BYTES
    body_timeout_s: Seconds = BODY_TIMEOUT_S
    kv_cache_memory_bytes: Annotated[int | None, BeforeValidator(_size_or_none)] = None
    gpu_ids: Annotated[tuple[Annotated[Whole, Field(ge=0)], ...], Field(min_length=1)] | None = None
    accelerator_type: Annotated[str, Field(min_length=1)] | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    speculative: Annotated[SpeculativeConfig | None, BeforeValidator(_known_speculation)] = None
    residency: ResidencyConfig | None = None
    prompt_cache_memory: Annotated[int | None, BeforeValidator(_prompt_cache_or_none)] = None
    num_cpus: Annotated[Number, Field(gt=0)] = 1.0
    num_gpus: Annotated[Number, Field(ge=0.001, le=1024)] | None = None
    adapters: NamedAdapters = Field(default_factory=dict)
    adapters_folder: Annotated[str, Field(min_length=1)] | None = None
    max_loras: Annotated[Whole, Field(ge=1, le=MOST_ADAPTERS)] | None = None
    max_lora_rank: Annotated[Whole | None, BeforeValidator(_rank_of_vllm)] = None
    max_cpu_loras: Annotated[Whole, Field(ge=1, le=MOST_ADAPTERS)] | None = None
    lora_target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    allow_pickled_adapters: tuple[str, ...] = ()
    engine_args: dict[str, Any] = Field(default_factory=dict)

    @property
    def has_adapters(self) -> bool:
        """Returns whether the engine has room for adapters. There may be none yet."""
        return bool(self.adapters) or (self.max_loras is not None and self.max_lora_rank is not None)

    @property
    def only_vllm(self) -> list[str]:
        """Returns the fields that are set and that only vLLM honours."""
        pt = self.values_of_pt
        found = [name for name in ONLY_VLLM if getattr(self, name) and name not in pt]
        return found if self.kv_cache_dtype in (None, "auto", *PT_CACHE_DTYPES) else [*found, "kv_cache_dtype"]

    @property
    def only_pt(self) -> list[str]:
        """Returns the fields that are set and that only pt honours, or that decide for it with `auto`."""
        return self.values_of_pt + [name for name in ONLY_PT if getattr(self, name)]

    @property
    def values_of_pt(self) -> list[str]:
        """Returns the fields that both engines have and whose values here only pt has."""
        found = ["quantization"] if self.quantization in (*PT_QUANTIZATIONS, AUTO_QUANTIZATION) else []
        return [*found, "kv_cache_dtype"] if self.kv_cache_dtype == "int8" else found

    @property
    def pt_cache_dtype(self) -> str | None:
        """Returns the type of pt's KV cache in 8 bits, or None for the model's own type."""
        return self.kv_cache_dtype if self.kv_cache_dtype in PT_CACHE_DTYPES else None

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
    def leaves_threads_to_vllm(self) -> bool:
        """Returns whether vLLM chooses its threads itself: on GPUs, each rank takes its part of the CPUs to load the
        weights, and one to serve. Over several nodes it does not choose."""
        return self.infer_backend == "vllm" and self.device != "cpu" and self.nodes == 1

    @property
    def share(self) -> float | None:
        """Returns the share of one GPU that `num_gpus` sets, or None if the replica has whole GPUs."""
        return self.num_gpus if self.num_gpus is not None and self.num_gpus < 1 else None

    @property
    def swaps(self) -> ResidencyConfig | None:
        """Returns how the model shares memory with others, or None if it holds its own all the time."""
        return self.residency if self.residency is not None and self.residency.policy == "swap" else None

    @property
    def vllm_args(self) -> dict[str, Any]:
        """Returns `engine_args` with underscores in their names, because vLLM takes dashes as well."""
        return {name.replace("-", "_"): value for name, value in self.engine_args.items()}

    @property
    def spill_tiers(self) -> frozenset[str]:
        """Returns the slower tiers, "cpu" and "disk", that the user opened by naming them."""
        return frozenset(key for key in self.max_memory or {} if isinstance(key, str))
