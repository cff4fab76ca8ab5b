"""Reads the command line of `swift deploy` (ms-swift 4), and says what becomes of each argument here."""

import ast
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from serve_app.byte_sizes import UNITS
from serve_app.cli.shell_words import is_operator, shell_words, without_wrappers
from serve_app.errors import ConfigError

# The values of these arguments are never repeated in a note.
SECRET = frozenset({"api_key", "hub_token"})
# accelerate accepts binary units in any case. Lower-case "gb" means bits to it, so that is left as it is.
BINARY_UNIT = re.compile(r"([kmgt])ib$", re.IGNORECASE)

Reader = Callable[[str, tuple[str, ...]], Any]


def read_text(name: str, words: tuple[str, ...]) -> str:
    """Returns the argument's only value. Raises ConfigError if there is none, or more than one."""
    if not words:
        raise ConfigError(f"--{name}: it has no value.")
    if len(words) > 1:
        raise ConfigError(f"--{name}: it takes one value, but has {len(words)}. Put quotes around a value with spaces.")
    return words[0]


def read_number(name: str, words: tuple[str, ...]) -> int | float:
    """Returns a number. Raises ConfigError for anything else."""
    text = read_text(name, words)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ConfigError(f"--{name}: '{text}' is not a number.")


def read_flag(name: str, words: tuple[str, ...]) -> bool:
    """Returns a flag as argparse reads it in swift. It is true without a value."""
    text = read_text(name, words).lower() if words else "true"
    if text in ("true", "t", "yes", "y", "1"):
        return True
    if text in ("false", "f", "no", "n", "0"):
        return False
    raise ConfigError(f"--{name}: '{text}' is neither true nor false.")


def read_mapping(name: str, words: tuple[str, ...]) -> dict[Any, Any]:
    """Returns a mapping that is written as in Python or JSON. Raises ConfigError for anything else."""
    value = _literal(" ".join(words))
    if not isinstance(value, dict):
        raise ConfigError(f"--{name}: '{value}' is not a mapping such as '{{\"key\": 1}}'. Files are not read here.")
    return value


def _literal(text: str) -> Any:
    """Returns the value of a Python or JSON literal, even if the shell has removed its quotes, or else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    try:
        value = yaml.safe_load(text)
        if isinstance(value, dict) and not any(value.values()):  # YAML needs a space after each colon.
            value = yaml.safe_load(text.replace(":", ": "))
        return value
    except yaml.YAMLError:
        return text


def _device_map(name: str, words: tuple[str, ...]) -> Any:
    value = _literal(" ".join(words))
    if not isinstance(value, dict):
        return " ".join(words)
    return {key: _gpu_index(device) for key, device in value.items()}


def _max_memory(name: str, words: tuple[str, ...]) -> dict[Any, Any]:
    return {_gpu_index(key): _size(size) for key, size in read_mapping(name, words).items()}


def _adapters(name: str, words: tuple[str, ...]) -> dict[str, str]:
    """Returns adapters by name. Those without one are called by the end of their path. Raises ConfigError for a name
    that is given twice."""
    found: dict[str, str] = {}
    for word in words:
        given, equals, path = word.partition("=")
        adapter, source = (given, path) if equals else (adapter_name(word), word)
        if adapter in found:
            raise ConfigError(f"--{name}: the name '{adapter}' appears twice. Write NAME=PATH for each adapter.")
        found[adapter] = source
    if not found:
        raise ConfigError(f"--{name}: it has no value.")
    return found


def adapter_name(source: str) -> str:
    """Returns a name for an adapter that has none: the end of its path, with the part before if that is a
    checkpoint's."""
    parts = [part for part in source.split("/") if part not in ("", ".", "..")]
    kept = parts[-2:] if parts and parts[-1].startswith("checkpoint") else parts[-1:]
    return re.sub(r"[^A-Za-z0-9._~@+=,-]+", "-", "-".join(kept)).strip("._~@+=,-") or "adapter"


def _gpu_index(device: Any) -> Any:
    match = re.fullmatch(r"(?:cuda:)?(\d+)", str(device))
    return int(match[1]) if match else device


def _size(size: Any) -> Any:
    """Returns a size as it is written here. A bare number means bytes to accelerate."""
    if isinstance(size, int) and not isinstance(size, bool):
        exact = [f"{size // bytes_}{unit}" for unit, bytes_ in UNITS.items() if size and size % bytes_ == 0]
        return min(exact, key=len, default=f"{size / 1000:.3f}KB")
    return BINARY_UNIT.sub(lambda match: f"{match[1].upper()}iB", str(size))


# These arguments carry over, with their field and how to read them. The first in this order that sets a field wins.
TARGETS: dict[str, tuple[str, Reader]] = {
    "model_revision": ("revision", read_text),
    "torch_dtype": ("dtype", read_text),
    "device_map": ("device_map", _device_map),
    "max_memory": ("max_memory", _max_memory),
    "adapters": ("adapters", _adapters),
    "vllm_max_lora_rank": ("max_lora_rank", read_number),
    "vllm_tensor_parallel_size": ("tensor_parallel_size", read_number),
    "sglang_tp_size": ("tensor_parallel_size", read_number),
    "lmdeploy_tp": ("tensor_parallel_size", read_number),
    "vllm_max_model_len": ("max_model_len", read_number),
    "sglang_context_length": ("max_model_len", read_number),
    "lmdeploy_session_len": ("max_model_len", read_number),
    "max_model_len": ("max_model_len", read_number),
    "vllm_max_num_seqs": ("max_num_seqs", read_number),
    "max_batch_size": ("max_num_seqs", read_number),
    "vllm_quantization": ("quantization", read_text),
    "sglang_quantization": ("quantization", read_text),
    "vllm_gpu_memory_utilization": ("engine_args.gpu_memory_utilization", read_number),
    "vllm_pipeline_parallel_size": ("pipeline_parallel_size", read_number),
    "vllm_enable_expert_parallel": ("engine_args.enable_expert_parallel", read_flag),
    "vllm_disable_custom_all_reduce": ("engine_args.disable_custom_all_reduce", read_flag),
    "vllm_enforce_eager": ("engine_args.enforce_eager", read_flag),
    "vllm_limit_mm_per_prompt": ("engine_args.limit_mm_per_prompt", read_mapping),
    "vllm_enable_prefix_caching": ("engine_args.enable_prefix_caching", read_flag),
    "vllm_reasoning_parser": ("engine_args.reasoning_parser", read_text),
    "vllm_disable_cascade_attn": ("engine_args.disable_cascade_attn", read_flag),
    "vllm_mm_processor_cache_gb": ("engine_args.mm_processor_cache_gb", read_number),
    "vllm_speculative_config": ("engine_args.speculative_config", read_mapping),
    "sglang_kv_cache_dtype": ("engine_args.kv_cache_dtype", read_text),
    "sglang_disable_cuda_graph": ("engine_args.enforce_eager", read_flag),
    "seed": ("engine_args.seed", read_number),
    "max_logprobs": ("engine_args.max_logprobs", read_number),
    "enable_thinking": ("engine_args.default_chat_template_kwargs.enable_thinking", read_flag),
    "temperature": ("engine_args.override_generation_config.temperature", read_number),
    "top_p": ("engine_args.override_generation_config.top_p", read_number),
    "top_k": ("engine_args.override_generation_config.top_k", read_number),
    "repetition_penalty": ("engine_args.override_generation_config.repetition_penalty", read_number),
}

_DEFAULTS_OF_PT = (
    "pt takes defaults from the checkpoint's generation_config.json. Change it there, or send {0} with each request."
)
_PER_REQUEST = "there is no default on the server. Send {0} with each request."
# This says why an argument does not carry over to pt, if the config's own reason would not help.
NOT_WITH_PT = {
    "max_new_tokens": _PER_REQUEST.format("max_tokens"),
    "seed": "pt has no seed of its own. Send seed with each request that must repeat.",
    "max_logprobs": "pt allows up to 20, as OpenAI's API does.",
    "enable_thinking": 'send chat_template_kwargs: {"enable_thinking": …} with each request.',
    **{name: _DEFAULTS_OF_PT.format(name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")},
}
# This says why an argument does not carry over to vllm.
NOT_WITH_VLLM = {
    "max_batch_size": "swift passes it to transformers only. Use max_num_seqs.",
}
# This is added to the config's own reason for refusing a field.
MORE = {
    "max_memory": "swift silently ignores it with vllm (ms-swift#3363).",
    "device_map": "swift silently ignores it with vllm.",
}


def _each(reason: str, names: str) -> dict[str, str]:
    """Returns the same reason for each of the names."""
    return dict.fromkeys(names.split(), reason)


# These arguments never carry over, for the reasons that are given.
REASONS: dict[str, str] = {
    **_each(
        "nothing is merged here, and adapters are served beside their model. To merge them, run swift export "
        "--merge_lora true, and name that folder as model.",
        "merge_lora safe_serialization max_shard_size",
    ),
    "model_type": "the architecture is read from the checkpoint's config.json.",
    "task_type": "the model's own files say what it is for. With vllm, engine_args: {runner: …} says something else.",
    "attn_impl": "the engine chooses it. With vllm, set engine_args: {attention_backend: …}.",
    "experts_impl": "the engine chooses it.",
    "rope_scaling": "write it into the checkpoint's config.json. For vllm, engine_args: {hf_overrides: {…}} works too.",
    "local_repo_path": "no code is fetched from GitHub here. Code in the checkpoint needs trust_remote_code: true.",
    **_each("it is for classifiers and rerankers.", "num_labels problem_type reranker_use_activation"),
    **_each("save it into the checkpoint instead.", "new_special_tokens init_strategy"),
    "max_length": "it bounds the prompt alone. max_model_len bounds prompt and answer together, so set it to the sum.",
    "truncation_strategy": "nothing is cut here. A prompt that is too long is refused with status 400.",
    "system": "there is no default system prompt. Send it as the first message, or write it into a chat template.",
    **_each(
        "the tokenizer's own chat template is used. The field chat_template names a file with another one.",
        "template template_backend use_chat_template response_prefix agent_template preserve_thinking",
    ),
    "max_pixels": "with vllm, set engine_args: {mm_processor_kwargs: {max_pixels: …}}. pt takes text only.",
    "norm_bbox": "boxes in messages are not rewritten here.",
    **_each(
        "it belongs to hqq, which is not here. pt's quantization: bnb-nf4 or bnb-int8 is nearest.",
        "hqq_axis",
    ),
    "bnb_4bit_compute_dtype": "layers in 4 bits compute in dtype here.",
    "bnb_4bit_quant_storage": "weights in 4 bits are stored as bytes here.",
    "max_new_tokens": "swift has it as a default that a request may exceed. Send max_tokens with each request. To cap "
    "all requests, set engine_args: {override_generation_config: {max_new_tokens: …}}.",
    **{name: _PER_REQUEST.format(name) for name in ("stream", "logprobs", "top_logprobs")},
    "stop_words": _PER_REQUEST.format("stop"),
    "structured_outputs_regex": _PER_REQUEST.format("structured_outputs with a regex"),
    "num_beams": "pt has no beam search, but vLLM takes use_beam_search in a request.",
    "vllm_use_async_engine": "vLLM always runs as its async engine here.",
    "vllm_data_parallel_size": "copies of a model are Serve's: write deployments: [{name: Model, num_replicas: …}] in "
    "its application.",
    **_each(
        "vLLM has something similar, but not the same: engine_args: {gpu_memory_utilization: …}.",
        "sglang_mem_fraction_static lmdeploy_cache_max_entry_count",
    ),
    **_each(
        "vLLM has no counterpart, or it means something else there. See the arguments of `vllm serve` for engine_args.",
        "sglang_pp_size sglang_dp_size sglang_ep_size sglang_enable_ep_moe sglang_enable_dp_attention "
        "sglang_disable_custom_all_reduce sglang_speculative_algorithm sglang_speculative_num_steps "
        "sglang_speculative_eagle_topk sglang_speculative_num_draft_tokens lmdeploy_quant_policy "
        "lmdeploy_vision_batch_size",
    ),
    "use_hf": "models come from a local folder or from Hugging Face here, never from ModelScope.",
    "hub_token": "set HF_TOKEN where Ray starts.",
    **_each("write it under http_options of this file, since Serve has both.", "ssl_keyfile ssl_certfile"),
    "owned_by": "it cannot be set here.",
    **_each("Ray and Serve write the logs to /tmp/ray/session_latest/logs.", "verbose log_interval log_level"),
    **_each("requests and answers are not written to a file.", "result_path write_batch_size"),
    **_each("Ray places and runs every replica here.", "use_ray ray_exp_name device_groups"),
    **_each("swift's plugins do not run here.", "external_plugins custom_register_path"),
    "model_kwargs": "it sets environment variables for swift's own model code, which does not run here.",
    **_each("swift's args.json is not read here.", "load_args load_data_args"),
    "enable_npu_model_patch": "Ascend NPUs are not served here.",
    "ignore_args_error": "nothing is ignored here.",
    **_each(
        "it is for training or datasets, and a server has no use for it.",
        "dataset val_dataset cached_dataset cached_val_dataset split_dataset_ratio data_seed dataset_num_proc "
        "load_from_cache_file dataset_shuffle val_dataset_shuffle streaming interleave_prob stopping_strategy "
        "shuffle_buffer_size download_mode columns strict remove_unused_columns disable_auto_column_mapping model_name "
        "model_author custom_dataset_info decision_drop_instructions decision_subsample_options decision_state_as_text "
        "decision_shuffle_fields val_dataset_sample metric packing packing_length packing_num_proc packing_strategy "
        "lazy_tokenize padding_side padding_free loss_scale sequence_parallel_size is_binary_loss_scale "
        "add_non_thinking_prefix disable_ignore_empty_think tuner_backend tuner_type use_swift_lora ddp_timeout "
        "ddp_backend",
    ),
}
# from_swift.py handles these arguments one by one.
HANDLED = frozenset(
    {"model", "infer_backend", "served_model_name", "host", "port", "api_key", "vllm_engine_kwargs"}
    | {"quant_method", "quant_bits", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}
)
KNOWN = frozenset(TARGETS) | frozenset(REASONS) | HANDLED


@dataclass(frozen=True)
class SwiftCommand:
    """Holds environment variables, arguments by name without dashes, and notes on what could not be read."""

    variables: Mapping[str, str]
    arguments: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def one(self, name: str, default: str) -> str:
        """Returns the only value of an argument, or `default` if it was not given."""
        return read_text(name, self.arguments[name]) if name in self.arguments else default


def parse(command: str) -> SwiftCommand:
    """Reads a command line. Raises ConfigError for one that is not `swift deploy`."""
    words, rest = _words(command)
    variables, words = without_wrappers(words)
    notes = [f"'{rest}': this part is for the shell and is not read here."] if rest else []
    arguments, repeated = _arguments(_without_program(words, command))
    shown = " ".join(word for name, values in arguments.items() if name not in SECRET for word in values)
    if match := re.search(r"\$\{?[A-Za-z_]\w*\}?", shown):
        notes.append(f"{match[0]}: the values of shell variables are not known here. Write the value itself.")
    notes += [f"--{name}: it is given twice. The last one counts, as in swift." for name in repeated]
    return SwiftCommand(variables, arguments, tuple(notes))


def _words(command: str) -> tuple[list[str], str]:
    """Returns the command's words, and what follows them in the shell, such as `> log &`."""
    words = shell_words(command)
    place = next((place for place, word in enumerate(words) if is_operator(word)), len(words))
    return words[:place], " ".join(words[place:])


def _without_program(words: list[str], command: str) -> list[str]:
    """Returns the words after `swift deploy`, `python -m swift.cli.deploy` and the like."""
    program, *rest = words or [""]
    if PurePosixPath(program).name == "swift" and rest[:1] == ["deploy"]:
        return rest[1:]
    if re.fullmatch(r"python[\d.]*", PurePosixPath(program).name):
        if rest[:2] == ["-m", "swift.cli.deploy"]:
            return rest[2:]
        if rest[:3] == ["-m", "swift.cli.main", "deploy"]:
            return rest[3:]
        if rest and rest[0].endswith("swift/cli/deploy.py"):
            return rest[1:]
    start = textwrap.shorten(command, 60, placeholder=" …")
    raise ConfigError(f"'{start}' is not a `swift deploy` command. Write the whole command as one quoted word.")


def _arguments(words: list[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Returns the values by argument, without dashes, and the arguments that were given twice."""
    if words and not words[0].startswith("--"):
        raise ConfigError(f"'{words[0]}': arguments in a file are not read. Write them out as --name value.")
    arguments: dict[str, tuple[str, ...]] = {}
    repeated, name = [], ""
    for word in words:
        if not word.startswith("--"):
            arguments[name] = (*arguments[name], word)
            continue
        raw, equals, value = word[2:].partition("=")
        name = raw.replace("-", "_")
        values = (value,) if equals else ()
        if name.startswith("no_") and name[3:] in KNOWN:
            name, values = name[3:], ("false",)
        if name in arguments:
            repeated.append(name)
        arguments[name] = values
    return arguments, repeated
