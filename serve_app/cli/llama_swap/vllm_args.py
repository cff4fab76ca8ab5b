"""Says what becomes of the arguments of `vllm serve` in a model's `args`."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from serve_app.backend_fields import SERVER_ARGS
from serve_app.byte_sizes import token_count
from serve_app.cli.llama_swap.vllm_command import VllmCommand
from serve_app.cli.translation import Draft
from serve_app.engines.vllm.arguments import ARGUMENTS, FLAGS, VERSION
from serve_app.errors import nearest

# These have fields of the same names.
FIELDS = frozenset({
    "revision", "chat_template", "dtype", "quantization", "tensor_parallel_size", "pipeline_parallel_size", "nnodes",
    "max_model_len", "max_num_seqs", "kv_cache_memory_bytes", "max_loras", "max_lora_rank", "max_cpu_loras",
    "lora_target_modules",
})  # fmt: skip
COUNTS = frozenset({"max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes"})
DTYPES = {"half": "float16", "float": "float32"}
MIB = 2**20
# These arguments do not carry over, for the reasons that are given.
REASONS = {
    "api_key": "keys are kept as hashes in a file of their own. Make one with `serve-app new-key NAME`.",
    "hf_token": "set HF_TOKEN where Ray starts.",
    "data_parallel_size": "copies of a model are Serve's: write deployments: [{name: Model, num_replicas: …}] in its "
    "application.",
    "enable_sleep_mode": "a model that swaps is parked by its pool, which needs no argument.",
    "device_ids": "the pool's GPUs are those that pool_memory names.",
    "served_model_name": "clients send the application's name, or one of the router's aliases.",
    "download_dir": "set HF_HOME where Ray starts.",
}
SWAPPING_REASONS = {
    "gpu_memory_utilization": "the plan gives a model of a pool its bytes. kv_cache_memory_bytes sets those of its KV "
    "cache.",
    "nnodes": "a pool is on one node.",
}
# Other arguments are judged by these, so they are set before them.
_FIRST = {"tensor_parallel_size": 0, "lora_modules": 1, "max_loras": 2, "max_lora_rank": 3}
SECRET = frozenset({"api_key", "hf_token"})


def draft_of(command: VllmCommand, name: str, swaps: bool) -> Draft:
    """Returns the `args` of a model with what its command says, and notes on the rest."""
    draft = Draft({"model": command.model, "infer_backend": "vllm"}, list(command.notes))
    names = [each for each in command.arguments if not (each in ("host", "port") or each == "uvicorn_log_level")]
    for each in sorted(names, key=lambda each: _FIRST.get(each, len(_FIRST))):
        _add(draft, each, command.arguments[each], swaps, name)
    return draft


def _add(draft: Draft, name: str, words: tuple[str, ...], swaps: bool, model: str) -> None:
    first, _, below = name.partition(".")
    shown = f"--{first.replace('_', '-')}{name[len(first) :]} {'…' if first in SECRET else ' '.join(words)}".strip()
    positive = first.removeprefix("no_")
    reason = REASONS.get(first) or (SWAPPING_REASONS.get(first) if swaps else None)
    if first == "served_model_name" and set(words) == {model}:
        return
    if first == "lora_modules":
        _add_adapters(draft, shown, words)
        return
    if first == "enable_lora":  # Adapters follow from the other arguments.
        return
    if reason is None and SERVER_ARGS.fullmatch(first):
        reason = "it belongs to vLLM's own HTTP server, which does not run here."
    if reason is not None:
        draft.note(f"{shown}: {reason}")
        return
    if first not in ARGUMENTS:
        known = nearest(first, ARGUMENTS) or " Its arguments are those of `vllm serve --help`."
        draft.note(f"{shown}: vLLM {VERSION}, which runs here, has no such argument.{known}")
        return
    if positive in FLAGS:
        value = not first.startswith("no_")
        if positive == "trust_remote_code":
            if value:
                draft.put(shown, positive, True)
            return
        draft.put(shown, f"engine_args.{positive}", value)
        return
    try:
        value = _value(first, words)
    except ValueError:
        draft.note(f"{shown}: the value cannot be read as a number. Write digits in the file.")
        return
    path = first if first in FIELDS else f"engine_args.{first}"
    draft.put(shown, f"{path}.{below}" if below else path, value)


def _add_adapters(draft: Draft, shown: str, words: tuple[str, ...]) -> None:
    """Sets the adapters of `--lora-modules`, which are written as NAME=PATH or as objects of JSON."""
    found = {}
    for word in words:
        name, equals, path = word.partition("=")
        if word.startswith("{"):
            module = _plain(word)
            name, path = (str(module.get("name")), str(module.get("path"))) if isinstance(module, Mapping) else ("", "")
        elif not equals:
            draft.note(f"{shown}: {word} is not written as NAME=PATH.")
            return
        found[name] = path
    draft.put(shown, "adapters", found)


def _value(name: str, words: tuple[str, ...]) -> Any:
    """Returns a value as the file has it. Raises ValueError for a count that is none."""
    if len(words) > 1:
        return [_plain(word) for word in words]
    text = words[0] if words else ""
    if name in COUNTS:
        count = token_count(text)
        return _size(count) if name == "kv_cache_memory_bytes" else count
    return DTYPES.get(text, text) if name == "dtype" else _plain(text)


def _plain(text: str) -> Any:
    """Returns a number, a mapping or a list that is written as JSON, or the text itself."""
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"-?\d*\.?\d+([eE][+-]?\d+)?", text):
        return float(text)
    if text[:1] in ("{", "["):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            return text
        return value if isinstance(value, Mapping | list) else text
    return text


def _size(size: int) -> str:
    return f"{size // MIB}MiB" if size % MIB == 0 else f"{size / 1000:.3f}KB"
