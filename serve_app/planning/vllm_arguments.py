"""Says which arguments of vLLM the plan can count: those that change neither weights nor KV cache, and those about
which vLLM's own code is asked. For any other argument the plan has no figure.

`tests/engines/vllm/test_arguments.py` compares the names with those of the pinned vLLM. This file is pure.
"""

import json
from collections.abc import Mapping
from typing import Any

# These change the weights or the KV cache, and vLLM's own code says how when it builds the model without storage.
ASKED = frozenset({
    "async_scheduling", "attention_backend", "attention_config", "block_size", "convert",
    "disable_hybrid_kv_cache_manager", "disable_sliding_window", "enable_prefix_caching",
    "kv_cache_dtype_skip_layers", "kv_sharing_fast_prefill", "language_model_only", "limit_mm_per_prompt",
    "linear_backend", "mamba_backend", "mamba_block_size", "mamba_cache_dtype", "mamba_cache_mode",
    "mamba_ssm_cache_dtype", "mm_encoder_only", "model_impl", "moe_backend", "pooler_config", "quantization_config",
    "replayssm_buffer_len", "runner", "use_replayssm",
})  # fmt: skip
# These change neither of them. The plan counts what the first line changes otherwise.
HARMLESS = frozenset({
    "enable_sleep_mode", "enforce_eager", "gpu_memory_utilization", "kv_cache_dtype", "max_num_batched_tokens",
    # What a server accepts and answers
    "allow_credentials", "allowed_headers", "allowed_local_media_path", "allowed_media_domains", "allowed_methods",
    "allowed_origins", "anthropic_disabled_thinking_effort", "chat_template", "chat_template_content_format",
    "cohere_format", "cohere_is_reasoning_model", "default_chat_template_kwargs", "enable_auto_tool_choice",
    "enable_force_include_usage", "enable_log_deltas", "enable_prompt_tokens_details", "enable_request_id_headers",
    "enable_tokenizer_info_endpoint", "exclude_tools_when_tool_choice_none", "fingerprint_mode", "fingerprint_value",
    "h11_max_header_count", "h11_max_incomplete_event_size", "middleware", "reasoning_config", "reasoning_parser",
    "reasoning_parser_plugin", "response_role", "return_tokens_as_token_ids", "sse_keep_alive_interval",
    "tool_call_parser", "tool_parser_plugin", "tool_server", "tool_strict_level", "trust_request_chat_template",
    "trust_request_mm_kwargs",
    # Sampling
    "generation_config", "logits_processors", "logprobs_mode", "max_logprobs", "override_generation_config",
    "return_sampling_mask", "seed", "structured_outputs_config", "use_fp64_gumbel",
    # Texts, images and sound before they reach the model
    "enable_mm_embeds", "enable_prompt_embeds", "interleave_mm_strings", "io_processor_plugin", "media_io_kwargs",
    "mm_hasher_algorithm", "mm_processor_cache_gb", "mm_processor_cache_type", "mm_processor_kwargs",
    "mm_shm_cache_max_object_size_mb", "renderer_num_workers", "skip_tokenizer_init", "tokenizer", "tokenizer_mode",
    "tokenizer_revision",
    # How files are read
    "allow_deprecated_quantization", "download_dir", "hf_token", "ignore_patterns", "max_parallel_loading_workers",
    "pt_load_map_location", "safetensors_load_strategy", "safetensors_prefetch_block_size",
    "safetensors_prefetch_num_threads", "use_tqdm_on_load",
    # The order of requests
    "disable_chunked_mm_input", "long_prefill_token_threshold", "long_prefill_token_threshold_adaptive",
    "max_num_queued_reqs", "max_num_queued_tokens", "prefill_schedule_interval",
    "scheduler_reserve_full_isl", "scheduling_policy", "stream_interval",
    # CUDA graphs, compilation and communication
    "compilation_config", "cudagraph_capture_sizes", "disable_cascade_attn", "disable_custom_all_reduce",
    "enable_flashinfer_autotune", "ir_op_priority", "max_cudagraph_capture_size", "mm_encoder_attn_backend",
    "numa_bind", "numa_bind_cpus", "numa_bind_nodes", "optimization_level", "skip_mm_profiling",
    # Logs, metrics and times
    "aggregate_engine_logging", "collect_detailed_traces", "cpu_distributed_timeout_seconds", "cudagraph_metrics",
    "custom_histogram_buckets", "disable_access_log_for_endpoints", "disable_fastapi_docs", "disable_log_stats",
    "disable_uvicorn_access_log", "distributed_timeout_seconds", "enable_layerwise_nvtx_tracing",
    "enable_log_outputs", "enable_log_requests", "enable_logging_iteration_details", "enable_mfu_metrics",
    "enable_offline_docs", "enable_per_request_metrics", "enable_server_load_tracking", "fail_on_environ_validation",
    "jit_monitor_mode", "jit_monitor_verbose", "kv_cache_metrics", "kv_cache_metrics_sample", "kv_events_config",
    "log_config_file", "log_error_stack", "log_level", "logging_config", "max_log_len", "otlp_traces_endpoint",
    "prefix_caching_hash_algo", "profiler_config", "show_hidden_metrics_for_version", "shutdown_timeout",
})  # fmt: skip
# With these values, which are vLLM's defaults, an argument changes nothing.
_DEFAULTS: Mapping[str, Any] = {
    "cpu_offload_gb": 0, "disable_hybrid_kv_cache_manager": False, "disable_sliding_window": False,
    "enable_chunked_prefill": True, "enable_expert_parallel": False, "enable_lora": False, "language_model_only": False,
    "load_format": "auto", "mm_encoder_only": False, "kv_sharing_fast_prefill": False, "runner": "auto",
    "convert": "auto", "model_impl": "auto", "moe_backend": "auto", "linear_backend": "auto",
    "mamba_cache_dtype": "auto", "mamba_ssm_cache_dtype": "auto", "decode_context_parallel_size": 1,
}  # fmt: skip
# These are on for the types with formulas on a GPU, where vLLM decides by the model what it does without them.
_ON_FOR_KNOWN_TYPES = frozenset({"async_scheduling", "enable_prefix_caching"})
_FLAGS = frozenset(
    {"async_scheduling", "disable_hybrid_kv_cache_manager", "disable_sliding_window", "enable_chunked_prefill"}
    | {"enable_expert_parallel", "enable_lora", "enable_prefix_caching", "kv_sharing_fast_prefill"}
    | {"language_model_only", "mm_encoder_only", "use_replayssm"}
)


def effective(arguments: Mapping[str, Any], is_known_on_gpu: bool) -> dict[str, Any]:
    """Returns the arguments that change what vLLM does, under their positive names and with JSON decoded.

    `arguments` have underscores in their names. `is_known_on_gpu` is for a type with formulas that runs on a GPU.
    """
    found = {}
    for written, value in arguments.items():
        name, value = _positive(written, value)
        is_default = name in _DEFAULTS and type(value) is type(_DEFAULTS[name]) and value == _DEFAULTS[name]
        is_on = is_known_on_gpu and name in _ON_FOR_KNOWN_TYPES and value is True
        is_limit = name == "limit_mm_per_prompt" and _keeps_encoders(value)
        if value is not None and not (is_default or is_on or is_limit):
            found[name] = value
    return found


def asked_arguments(effective_arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those about which vLLM's own code is asked."""
    return {name: value for name, value in sorted(effective_arguments.items()) if name in ASKED}


def uncounted_arguments(effective_arguments: Mapping[str, Any]) -> list[str]:
    """Returns the names of those for which the plan has no figure."""
    return sorted(effective_arguments.keys() - ASKED - HARMLESS)


def _positive(name: str, value: Any) -> tuple[str, Any]:
    """Returns an argument without the "no_" of its name and without JSON in a text. vLLM leaves a `no_` form that is
    false out."""
    positive = name.removeprefix("no_")
    if positive != name and positive in _FLAGS | HARMLESS:
        return positive, False if value is True else None
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return name, json.loads(value)
        except ValueError:
            return name, value
    return name, value


def _keeps_encoders(limits: Any) -> bool:
    """Returns whether the model keeps its encoders: vLLM leaves out those of a kind whose limit is 0."""
    return isinstance(limits, Mapping) and all(type(limit) is int and limit > 0 for limit in limits.values())


def sleep_is_off(engine_args: Mapping[str, Any]) -> bool:
    """Returns whether these arguments keep vLLM from sleeping, in either spelling of their names. serve-app switches
    its sleep mode on for a model that shares the GPUs of a pool, and a user may switch it off."""
    given = {name.replace("-", "_"): value for name, value in engine_args.items()}
    return given.get("enable_sleep_mode") is False
