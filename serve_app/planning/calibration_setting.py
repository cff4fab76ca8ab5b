"""Says what a measured figure holds for: the model's shape, the engine and its version, the card, and the settings."""

from collections.abc import Mapping

from serve_app.config import ModelConfig
from serve_app.facts.architecture import Architecture
from serve_app.facts.inventory import Device, card_model
from serve_app.planning.memory import GIB
from serve_app.planning.vllm_arguments import ASKED

# These arguments of vLLM change what it takes beside weights and cache.
_ARGUMENTS = (
    "max_num_batched_tokens",
    "enforce_eager",
    "kv_cache_dtype",
    "compilation_config",
    "cuda_graph_sizes",
    "enable_chunked_prefill",
    "disable_custom_all_reduce",
    *sorted(ASKED),
)


def calibration_setting(
    config: ModelConfig,
    architecture: Architecture,
    max_model_len: int,
    engine: str,
    device: Device,
    rank: int,
    ranks: int,
    stages: int = 1,
    draft: Architecture | None = None,
) -> Mapping[str, object]:
    """Returns the setting of one rank of `ranks`. All ranks of vLLM are alike and count as number 0; those of pt are
    not. Of a pipeline of so many `stages`, the ranks of a stage are alike and count as the first one of them.

    `engine` names the engine's packages with their versions (`facts.packages`). The folder of the model is left out,
    because the same shape takes the same memory, wherever it was loaded from. `draft` is the shape of the model that
    drafts for it.
    """
    asked = {
        "dtype": config.dtype if config.dtype != "auto" else architecture.dtype,
        "quantization": config.quantization or architecture.quantization,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "kv_cache_dtype": config.kv_cache_dtype,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "speculative": None if config.speculative is None else config.speculative.num_speculative_tokens,
        # vLLM's kernels, and its graphs with adapters and without, take more with them.
        "adapters": [config.max_loras, config.max_lora_rank] if config.has_adapters else None,
        "draft": None if draft is None else _shape(draft),
        **{name: config.vllm_args[name] for name in _ARGUMENTS if name in config.vllm_args},
    }
    return {
        "model": [*_shape(architecture), architecture.vocabulary],
        "engine": engine,
        "device": f"{card_model(device.name)} {round(device.total_bytes / GIB)}" if device.is_gpu else "cpu",
        "rank": f"{rank} of {ranks}" + (f" in {stages} stages" if stages > 1 else ""),
        **{name: value for name, value in asked.items() if value is not None},
    }


def _shape(architecture: Architecture) -> list[object]:
    return [architecture.name, len(architecture.layers), architecture.hidden_size, architecture.intermediate_size]
