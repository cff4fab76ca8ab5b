"""Knows which values the arguments of vLLM take where it has a list of them, so that a misspelt one is found without
importing vLLM.

The values are those of the version that `arguments.py` names. `tests/contracts/test_vllm.py` compares them with those
of the installed vLLM. This file is pure.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from serve_app.engines.vllm.arguments import VERSION
from serve_app.errors import nearest
from serve_app.facts.field_kind import shown

# vLLM's own parser refuses any other value of these. The values of each are separated by spaces.
_CHOICES = {
    "all2all_backend": (
        "allgather_reducescatter deepep_high_throughput deepep_low_latency deepep_v2 flashinfer_all2allv "
        "flashinfer_nvlink_one_sided flashinfer_nvlink_two_sided moonep mori_high_throughput mori_low_latency "
        "naive nixl_ep pplx"
    ),
    "anthropic_disabled_thinking_effort": "auto high low max medium none xhigh",
    "chat_template_content_format": "auto openai string",
    "collect_detailed_traces": "all model worker",
    "convert": "auto classify embed none",
    "dcp_comm_backend": "a2a ag_rs",
    "dtype": "auto bfloat16 float float16 float32 half",
    "expert_placement_strategy": "linear round_robin",
    "fingerprint_mode": "custom full hash none",
    "gdn_prefill_backend": "aiter_flydsl cutedsl flashinfer triton",
    "jit_monitor_mode": "error warn",
    "kda_decode_backend": "auto flashinfer native triton",
    "kda_prefill_backend": "auto flashinfer flashkda fused triton",
    "kv_cache_dtype": (
        "auto bfloat16 float16 fp8 fp8_ds_mla fp8_e4m3 fp8_e5m2 fp8_inc fp8_per_token_head "
        "int4_per_token_head int8_per_token_head nvfp4 nvfp4_4over6 nvfp4_ds_mla turboquant_3bit_nc "
        "turboquant_4bit_nc turboquant_k3v4_nc turboquant_k8v4 ultraquant_4bit"
    ),
    "kv_offloading_backend": "lmcache native",
    "linear_backend": (
        "aiter auto b12x conch cutlass deep_gemm emulation exllama fbgemm flashinfer_b12x flashinfer_cudnn "
        "flashinfer_cutedsl flashinfer_cutlass flashinfer_trtllm humming machete marlin torch triton xpu "
        "xpu_woq"
    ),
    "log_level": "CRITICAL DEBUG ERROR INFO NOTSET WARNING",
    "logprobs_mode": "processed_logits processed_logprobs raw_logits raw_logprobs",
    "lora_dtype": "auto bfloat16 float16",
    "mamba_cache_dtype": "auto bfloat16 float16 float32",
    "mamba_cache_mode": "align none",
    "mamba_ssm_cache_dtype": "auto bfloat16 float16 float32",
    "mamba_ssu_algorithm": "auto horizontal simple vertical",
    "max_lora_rank": "1 128 16 256 32 320 512 64 8",
    "mm_encoder_attn_dtype": "fp8",
    "mm_encoder_tp_mode": "data weights",
    "mm_hasher_algorithm": "blake3 sha256 sha512",
    "mm_processor_cache_type": "lru shm",
    "mm_processor_device": "auto cpu",
    "mm_tensor_ipc": "direct_rpc torch_shm",
    "moe_backend": (
        "aiter aiter_mega_moe aiter_triton_mxfp4_bf16 auto b12x batched_triton cutlass deep_gemm "
        "deep_gemm_mega_moe emulation flashinfer_b12x flashinfer_cutedsl flashinfer_cutlass "
        "flashinfer_moe_ep_cutedsl flashinfer_moe_ep_mega_deep_gemm flashinfer_trtllm flydsl hpc humming "
        "marlin rdna3 triton triton_unfused"
    ),
    "offload_backend": "auto prefetch uva",
    "per_request_spec_decode_metrics": "detailed none summary",
    "performance_mode": "balanced interactivity throughput",
    "prefix_caching_hash_algo": "sha256 sha256_cbor xxhash xxhash_cbor",
    "runner": "auto draft generate pooling",
    "safetensors_load_strategy": "eager lazy prefetch torchao",
    "scheduling_policy": "fcfs priority",
    "sparse_indexer_topk_backend": "aiter auto cooperative deep_select flashinfer per_row persistent torch",
    "spec_method": (
        "bailing_hybrid_mtp bailing_hybrid_v3_mtp custom_class deepseek_mtp dflash dots3_note_mtp draft_model "
        "dspark eagle eagle3 ernie_mtp exaone4_5_mtp exaone_moe_mtp extract_hidden_states gemma4_mtp "
        "glm4_moe_lite_mtp glm4_moe_mtp glm5_next_mtp glm_ocr_mtp hy_v3_mtp hy_v4_mtp inkling_mtp kimi_k3_mtp "
        "longcat_flash_mtp medusa mimo_mtp mimo_v2_mtp minimax_m3_mtp mlp_speculator mtp nemotron_h_mtp ngram "
        "ngram_gpu pangu_ultra_moe_mtp qwen3_5_mtp qwen3_next_mtp qwen4_exp_mtp step3p5_mtp suffix"
    ),
    "tool_strict_level": "auto function parameter",
    "uvicorn_log_level": "critical debug error info trace warning",
    "video_pruning_method": "evs vidcom2",
}
# These are registries, to which a plugin of vLLM may add. The parsers may also come from the file that an argument
# names (`PLUGIN_ARGUMENTS`).
_REGISTRIES = {
    "load_format": (
        "auto dummy fastsafetensors hf instanttensor ipc_cache mistral modelexpress npcache pt runai_streamer "
        "runai_streamer_sharded safetensors sharded_state tensorizer"
    ),
    "quantization": (
        "auto_awq auto_gptq awq awq_marlin compressed-tensors deepseek_v4_fp8 experts_int8 fbgemm_fp8 fp8 "
        "fp8_per_block fp8_per_channel fp8_per_tensor fp_quant gpt_oss_mxfp4 gptq gptq_marlin humming inc "
        "int8_per_channel_weight_only modelopt modelopt_fp4 modelopt_mixed modelopt_mxfp8 moe_wna16 mxfp4 "
        "mxfp8 nvfp4_per_token online quark torchao"
    ),
    "reasoning_parser": (
        "cohere_command3 cohere_command4 deepseek_r1 deepseek_v3 deepseek_v4 deepseek_v41 ernie45 gemma4 "
        "glm45 glm47 granite granite_thinking_parser hf holo2 hunyuan_a13b hy_v3 hy_v4 inkling k2_horizon "
        "kimi_k2 kimi_k3 ling3 mimo minicpmv minimax_m2 minimax_m2_append_think minimax_m3 mistral "
        "muse_glimmer nemotron_v3 olmo3 openai_gptoss plamo3 poolside_v1 qwen3 seed_oss step3 step3p5"
    ),
    "tool_call_parser": (
        "apertus cohere_command3 cohere_command4 deepseek_v3 deepseek_v31 deepseek_v32 deepseek_v4 "
        "deepseek_v41 dots ernie45 functiongemma gemma4 gigachat3 glm45 glm47 granite granite-20b-fc granite4 "
        "hermes hf hunyuan_a13b hy_v3 hy_v4 inkling internlm jamba k2_horizon kimi_k2 kimi_k3 lfm2 ling3 "
        "llama3_json llama4_json llama4_pythonic longcat mimo minicpm5 minimax_m2 minimax_m3 mistral "
        "muse_glimmer olmo3 openai phi4_mini_json plamo3 poolside_v1 pythonic qwen3_coder qwen3_json "
        "qwen3_xml seed_oss step3 step3p5 xlam"
    ),
}
CHOICES: Mapping[str, frozenset[str]] = {name: frozenset(values.split()) for name, values in _CHOICES.items()}
REGISTRIES: Mapping[str, frozenset[str]] = {name: frozenset(values.split()) for name, values in _REGISTRIES.items()}
PLUGIN_ARGUMENTS = {"tool_call_parser": "tool_parser_plugin", "reasoning_parser": "reasoning_parser_plugin"}
# vLLM writes the values of these in lower case before it looks them up.
_LOWERED = frozenset({"quantization", "load_format"})


def unknown_values(given: Mapping[str, Any], has_plugins: bool) -> Iterator[tuple[str, str]]:
    """Yields the name of each argument whose value this version of vLLM does not take, and a sentence on it with the
    nearest value that vLLM takes.

    `given` are arguments by their names with underscores. With `has_plugins`, values of the registries are not judged.
    """
    for name in sorted(given.keys() & (CHOICES.keys() | REGISTRIES.keys())):
        if name in REGISTRIES and (has_plugins or PLUGIN_ARGUMENTS.get(name) in given):
            continue
        known = CHOICES.get(name) or REGISTRIES[name]
        for value in given[name] if isinstance(given[name], list) else [given[name]]:
            text = str(value).lower() if name in _LOWERED else str(value)
            if value is not None and text not in known:
                hint = "" if isinstance(value, int) else nearest(text, known)
                yield name, f"vLLM {VERSION} does not take {shown(value)}.{hint or _all(known)}"


def _all(known: frozenset[str]) -> str:
    numbers = all(value.isdecimal() for value in known)
    return f" It takes {', '.join(sorted(known, key=int if numbers else str))}."
