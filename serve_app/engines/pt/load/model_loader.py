"""Loads a model and its tokenizer onto the devices that the config allows.

Its law is that nothing goes to the CPU or to disk unless the user named that tier in `max_memory` (or in an explicit
`device_map`). accelerate itself spills silently.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from serve_app.config import ModelConfig
from serve_app.engines.pt.accelerate_internals import balanced_limits, execution_device, inferred_map, no_weights
from serve_app.engines.pt.load.attention import use_grouped_attention
from serve_app.engines.pt.load.device_map import DeviceName, device_map_of
from serve_app.engines.pt.load.model_class import model_class
from serve_app.engines.pt.load.packed_linear import pack_linears
from serve_app.engines.pt.load.quantization import quantization_options, settle, stored_method
from serve_app.engines.pt.transformers_internals import loaded_device_map, unsplit_blocks
from serve_app.errors import ConfigError, EngineError
from serve_app.facts.pooling import Task
from serve_app.planning.memory import context
from serve_app.planning.plan import ModelPlan

logger = logging.getLogger("ray.serve")

# Weights may take this share of a GPU without a limit. The rest is for the KV cache, activations and the CUDA context.
FREE_SHARE = 0.8
DeviceMap = Mapping[str, DeviceName]


@dataclass(frozen=True)
class LoadedModel:
    """This is a model ready to run.

    `max_model_len` is in tokens of prompt and output together. `offload` holds the modules that are on disk.
    `cache_tokens` is the KV cache that the plan of its GPUs has room for, or None if there is no plan.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    input_device: torch.device
    max_model_len: int
    eos_ids: frozenset[int]
    device_map: DeviceMap
    offload: TemporaryDirectory[str] | None
    cache_tokens: int | None = None


@dataclass(frozen=True)
class PlacedModel:
    """This is a model with its weights. The fields are those of `LoadedModel`."""

    model: PreTrainedModel
    device_map: DeviceMap
    offload: TemporaryDirectory[str] | None
    cache_tokens: int | None


def load_model(config: ModelConfig, planned: ModelPlan | None = None) -> LoadedModel:
    """Returns the model with its weights and tokenizer. `planned` says which layers are on which GPU. If it is None, on
    the CPU, for a quantised checkpoint, and with a `device_map` of the user's, transformers and accelerate place them.

    Raises ConfigError or EngineError with one message if it cannot.
    """
    hf_config, tokenizer = read_files(config)
    max_model_len = _max_model_len(config, hf_config)
    placed = load_weights(config, hf_config, planned, "generate", _gives_logits)
    return LoadedModel(
        placed.model, tokenizer, input_device(placed.model), max_model_len, _eos_ids(placed.model, tokenizer),
        placed.device_map, placed.offload, placed.cache_tokens,
    )  # fmt: skip


def read_files(config: ModelConfig) -> tuple[Any, PreTrainedTokenizerBase]:
    """Returns a model's config and tokenizer as transformers has them. Raises ConfigError or EngineError."""
    common = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        hf_config = AutoConfig.from_pretrained(config.model, **common)
        tokenizer = AutoTokenizer.from_pretrained(config.model, **common)
    except Exception as error:
        raise EngineError(f"model: {config.model} cannot be read: {_one_line(error)}") from error
    if config.chat_template is not None:
        tokenizer.chat_template = _read_template(config.chat_template)
    return hf_config, tokenizer


def load_weights(
    config: ModelConfig,
    hf_config: Any,
    planned: ModelPlan | None,
    task: Task,
    runs: Callable[[PreTrainedModel], bool],
) -> PlacedModel:
    """Returns the model with its weights on the devices. `runs` tries it with weights in oneDNN's order, and returns or
    raises whether that works. Raises ConfigError or EngineError with one message."""
    quantizer = quantization_options(config, hf_config, _dtype(config, hf_config))
    placement, cache_tokens = _placement(config, hf_config, planned, task)
    uses_disk = isinstance(placement["device_map"], dict) and "disk" in placement["device_map"].values()
    offload = TemporaryDirectory(prefix="serve-app-offload-") if uses_disk else None
    common = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    options = placement | common | quantizer | {"offload_folder": None if offload is None else offload.name}
    auto = model_class(hf_config, task)
    model = _read_weights(config, auto, options)
    device_map = loaded_device_map(model)
    _require_opened(config, device_map, {})
    use_grouped_attention()
    if config.device == "cpu":
        pack_linears(model, copy_tied=config.max_memory is None)
        if not _can_run(model, runs):  # Its code reads a linear layer's weight without calling the layer.
            del model  # It is freed before the second one is loaded.
            model = _read_weights(config, auto, options)
    return PlacedModel(model, device_map, offload, cache_tokens)


def _read_weights(config: ModelConfig, auto: Any, options: Mapping[str, Any]) -> PreTrainedModel:
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        model: PreTrainedModel = auto.from_pretrained(config.model, dtype=dtype, **options)
    except Exception as error:
        raise EngineError(f"model: {config.model} cannot be loaded: {_one_line(error)}") from error
    settle(model)
    return model.eval()


def _gives_logits(model: PreTrainedModel) -> bool:
    logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=input_device(model))).logits
    return bool(logits.isfinite().all())


def _can_run(model: PreTrainedModel, runs: Callable[[PreTrainedModel], bool]) -> bool:
    try:
        with torch.inference_mode():
            return runs(model)
    except Exception as error:
        logger.warning("The linear layers of this model keep torch's order of weights: %s", _one_line(error))
        return False


def _placement(
    config: ModelConfig, hf_config: Any, planned: ModelPlan | None, task: Task = "generate"
) -> tuple[dict[str, Any], int | None]:
    """Returns the options of `from_pretrained` for devices, and the tokens of KV cache that the plan has room for.

    A quantised checkpoint is placed by transformers itself, which knows the sizes of quantised modules, unless it is
    one of bitsandbytes, whose sizes the plan knows. So is a model that is quantised while it loads and whose
    `device_map` names a way to spread it.
    """
    free = gpu_memory(config, planned)
    _cap_allocators(allocator_limits(config, planned, free))
    stored = stored_method(hf_config)
    if stored in (None, "bitsandbytes") or isinstance(config.device_map, dict):
        try:
            device_map = _planned_map(config, hf_config, planned, task)
            if planned is not None and device_map is not None:
                return {"device_map": device_map}, planned.kv_tokens
            is_quantised = config.quantization is not None or stored is not None
            if is_quantised and not isinstance(config.device_map, dict):
                return _own_placement(config, free, planned), None
            return {"device_map": dict(choose_device_map(config, hf_config, free, task))}, None
        except (EngineError, ConfigError):
            raise
        except Exception as error:
            raise EngineError(f"device_map: {config.model} cannot be planned: {_one_line(error)}") from error
    return _own_placement(config, free, planned), None


def _own_placement(config: ModelConfig, free: Mapping[int, int], planned: ModelPlan | None) -> dict[str, Any]:
    """Returns the options with which transformers places a quantised model itself: on the GPUs of the plan, if there is
    one."""
    if config.device == "cpu":
        return {"device_map": {"": "cpu"}}
    limits = device_limits(config, free) if planned is None else _weight_limits(config, free, planned)
    return {"device_map": config.device_map or "auto", "max_memory": limits}


def _weight_limits(config: ModelConfig, free: Mapping[int, int], planned: ModelPlan) -> dict[DeviceName, int]:
    """Returns the bytes that weights may take of each GPU of the plan, and of the slower tiers that the user has named.

    The room for the KV cache is theirs too, because transformers knows the sizes of quantised modules better than the
    plan, and the cache gets what they leave.
    """
    limits: dict[DeviceName, int] = {}
    for rank in planned.ranks:
        if (index := rank.device.index) is not None:
            room = rank.share.bytes - rank.context.bytes - rank.activation.bytes
            limits[index] = min(room, free[index])
    memory = config.max_memory or {}
    return limits | {tier: memory[tier] for tier in ("cpu", "disk") if tier in memory}


def _planned_map(
    config: ModelConfig, hf_config: Any, planned: ModelPlan | None, task: Task
) -> dict[str, DeviceName] | None:
    """Returns the plan's map, or None if accelerate decides alone: without a plan, or with a named way to spread."""
    if planned is None or config.device == "cpu" or config.device_map not in (None, "auto"):
        return None
    return device_map_of(planned, _without_weights(config, hf_config, task))


def allocator_limits(
    config: ModelConfig, planned: ModelPlan | None, free_bytes: Mapping[int, int]
) -> dict[DeviceName, int]:
    """Returns the bytes of each GPU beyond which torch's allocator may not go, the CUDA context included, by the GPU's
    number here. A GPU that the replica has for itself has no limit.

    In a pool, a replica takes what it has leased, which is its plan. Elsewhere `max_memory` is the limit.
    """
    if planned is not None and config.swaps is not None and config.device != "cpu":
        return {rank.device.index: rank.share.bytes for rank in planned.ranks if rank.device.index is not None}
    if planned is not None and set(free_bytes) <= {rank.device.index for rank in planned.ranks}:
        limits = {rank.device.index: planned.limit_of(rank) for rank in planned.ranks}
        return {
            index: min(limit, free_bytes[index] + _held(index))
            for index, limit in limits.items()
            if index is not None and limit is not None
        }
    if not config.max_memory:
        return {}
    # What is free now is without the context and what this process holds, which a limit includes.
    with_own = {index: free + _held(index) for index, free in free_bytes.items()}
    return device_limits(config, with_own)


def _held(index: int) -> int:
    """Returns the bytes that this process holds of a GPU already, the planned CUDA context included."""
    reserved: int = torch.cuda.memory_reserved(index)
    return context("cuda").bytes + reserved


def _cap_allocators(limits: Mapping[DeviceName, int]) -> None:
    """Lets torch's allocator take no more than each limit, less the planned CUDA context, which it does not count."""
    for index, limit in limits.items():
        if isinstance(index, int) and torch.cuda.is_available():
            total = torch.cuda.mem_get_info(index)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, limit - context("cuda").bytes) / total), index)


def _dtype(config: ModelConfig, hf_config: Any) -> torch.dtype:
    """Returns the type of weights that are not quantised."""
    dtype: torch.dtype | None = hf_config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    return dtype or torch.float32


def _without_weights(config: ModelConfig, hf_config: Any, task: Task) -> PreTrainedModel:
    with no_weights():
        model: PreTrainedModel = model_class(hf_config, task).from_config(
            hf_config, trust_remote_code=config.trust_remote_code, dtype=_dtype(config, hf_config)
        )
    model.tie_weights()
    return model


def gpu_memory(config: ModelConfig, planned: ModelPlan | None = None) -> dict[int, int]:
    """Returns the bytes that this process may take of each GPU on which the model may lie, by the GPU's number here. It
    is empty on the CPU.

    These are the GPUs of the plan, if there is one and it decides, and otherwise all that the process sees. To ask for
    a GPU's memory makes a CUDA context on it, which takes some 500 MiB there for as long as the process lives.

    It is what is free now, and with a share of a GPU (`num_gpus` below 1) at most that share of the whole. torch's
    allocator enforces the share and raises out-of-memory beyond it.
    """
    if config.device == "cpu":
        return {}
    if not torch.cuda.is_available():
        raise EngineError("device: cuda, but torch sees no GPU in this replica. Set device: cpu to run on the CPU.")
    share = min(1.0, config.num_gpus or 1.0)
    memory = {}
    for index in _candidates(config, planned):
        free, total = torch.cuda.mem_get_info(index)
        if share < 1:
            _cap_allocators({index: int(total * share)})
        memory[index] = min(free, int(total * share))
    return memory


def _candidates(config: ModelConfig, planned: ModelPlan | None) -> Sequence[int]:
    """Returns the numbers of the GPUs on which the model may lie."""
    is_spread_by_name = isinstance(config.device_map, str) and config.device_map != "auto"
    if planned is None or (is_spread_by_name and config.swaps is None):
        return range(torch.cuda.device_count())
    return sorted({rank.device.index for rank in planned.ranks if rank.device.index is not None})


def choose_device_map(
    config: ModelConfig, hf_config: Any, free_bytes: Mapping[int, int], task: Task = "generate"
) -> DeviceMap:
    """Returns the device of each module by its name.

    `free_bytes` is what each visible GPU has, and `max_memory` caps it. Its GPU indices, in order, are the GPUs that
    the replica sees. Raises EngineError if the model needs a tier that the user did not allow.
    """
    if isinstance(config.device_map, dict):
        return config.device_map
    if config.device == "cpu" and config.max_memory is None:
        return {"": "cpu"}
    limits = device_limits(config, free_bytes)
    device_map: DeviceMap = {}
    for balanced in (True, False) if _may_balance(config) else (False,):
        device_map = _infer(config, hf_config, limits, balanced, task)
        if not _unopened(config, device_map):
            break  # A balanced map may need a tier where a plain one fits, because it halves the model.
    _require_opened(config, device_map, limits)
    return device_map


def _may_balance(config: ModelConfig) -> bool:
    if config.device == "cpu":
        return False
    return config.device_map in ("balanced", "balanced_low_0") or (
        config.device_map in (None, "auto") and config.max_memory is None
    )


def _unopened(config: ModelConfig, device_map: DeviceMap) -> set[str]:
    """Returns the slower tiers that the map uses and the user did not allow."""
    opened = set(config.spill_tiers) | ({"cpu"} if config.device == "cpu" else set())
    if isinstance(config.device_map, dict):
        opened |= {device for device in config.device_map.values() if isinstance(device, str)}
    return ({str(device) for device in device_map.values()} & {"cpu", "disk"}) - opened


def _require_opened(config: ModelConfig, device_map: DeviceMap, limits: Mapping[DeviceName, int]) -> None:
    unopened = _unopened(config, device_map)
    if unopened:
        sizes = ", ".join(
            f"{f'GPU {device}' if isinstance(device, int) else device}: {size / 1e9:.3g} GB"
            for device, size in limits.items()
        )
        raise EngineError(
            f"max_memory: the model does not fit in {sizes or 'the GPUs'}, so part of it would go to "
            f"{' and '.join(sorted(unopened))}. Raise the limits, add a GPU, or name cpu (slow) or disk (very slow) in "
            "max_memory to allow it."
        )


def device_limits(config: ModelConfig, free_bytes: Mapping[int, int]) -> dict[DeviceName, int]:
    """Returns the bytes that accelerate may place on each device: the user's cap, but never more than is free."""
    memory = config.max_memory or {}
    if not config.gpu_indices:
        limits: dict[DeviceName, int] = {index: int(FREE_SHARE * size) for index, size in free_bytes.items()}
    elif len(config.gpu_indices) > len(free_bytes):
        raise EngineError(
            f"max_memory names {len(config.gpu_indices)} GPUs, but this replica sees {len(free_bytes)}. "
            "Ask for as many with num_gpus, or remove some."
        )
    else:
        limits = {number: min(memory[index], free_bytes[number]) for number, index in enumerate(config.gpu_indices)}
    return limits | {tier: memory[tier] for tier in ("cpu", "disk") if tier in memory}


def _infer(
    config: ModelConfig, hf_config: Any, limits: Mapping[DeviceName, int], balanced: bool, task: Task
) -> DeviceMap:
    """Returns accelerate's own map of a model without weights. It may choose a tier that is not in `limits`."""
    model = _without_weights(config, hf_config, task)
    blocks, dtype = unsplit_blocks(model), _dtype(config, hf_config)
    if balanced:
        limits = balanced_limits(model, limits, blocks, dtype, low_zero=config.device_map == "balanced_low_0")
    return inferred_map(model, limits, blocks, dtype)


def _max_model_len(config: ModelConfig, hf_config: Any) -> int:
    known = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if config.max_model_len is None:
        if known is None:
            raise ConfigError("max_model_len: the model's config.json does not say its context length, so set it.")
        return int(known)
    if known is not None and config.max_model_len > known:
        raise ConfigError(f"max_model_len: {config.max_model_len} is over the model's own context of {known} tokens.")
    return config.max_model_len


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None)


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device for input ids. An offloaded embedding has its weight on "meta" and runs on its hook's
    device."""
    embedding = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    return execution_device(embedding) or device if device.type == "meta" else device


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text()
    except OSError as error:
        raise ConfigError(f"chat_template: {path} cannot be read: {error.strerror}.") from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
