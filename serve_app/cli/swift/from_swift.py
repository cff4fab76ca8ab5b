"""`serve-app from-swift` makes a Serve config file from a `swift deploy` command line of ms-swift 4.

What carries over becomes `args` of one model. Every other argument gets a note that says why, and what to use instead.
"""

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.byte_sizes import parse_max_memory
from serve_app.cli.swift.command import (
    HANDLED,
    KNOWN,
    MORE,
    NOT_WITH_PT,
    NOT_WITH_VLLM,
    REASONS,
    SECRET,
    TARGETS,
    SwiftCommand,
    parse,
    read_flag,
    read_mapping,
    read_number,
)
from serve_app.cli.swift.quantization import NAMES as QUANTIZATION
from serve_app.cli.swift.quantization import quantization_of
from serve_app.cli.translation import Draft, TranslatedFile, TranslatedModel
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError, nearest

# These are swift's own defaults.
DEFAULT_HOST = "0.0.0.0"  # noqa: S104
DEFAULT_PORT = 8000

# This maps swift's `infer_backend` to ours.
BACKENDS = {"pt": "pt", "transformers": "pt", "vllm": "vllm", "sglang": "vllm", "lmdeploy": "vllm"}


@dataclass(frozen=True)
class Translation:
    """This is one model: its name for clients, its `args`, the address, and a note for each thing that did not carry
    over."""

    name: str
    args: Mapping[str, Any]
    http_host: str
    http_port: int
    notes: tuple[str, ...]


def from_swift(command: str) -> int:
    """Prints the config file that `command` stands for and returns 0. Raises ConfigError for another command."""
    print(as_yaml(translate(command)), end="")
    return 0


def translate(command: str) -> Translation:
    """Returns what a `swift deploy` command means here. Raises ConfigError if it is another one or names no model."""
    parsed = parse(command)
    swift_backend = parsed.one("infer_backend", "transformers")
    if swift_backend not in BACKENDS:
        raise ConfigError(f"--infer_backend: '{swift_backend}' is unknown. swift has {', '.join(BACKENDS)}.")
    draft = Draft({"model": _model(parsed), "infer_backend": BACKENDS[swift_backend]}, list(parsed.notes), MORE)
    if swift_backend in ("sglang", "lmdeploy"):
        draft.note(f"--infer_backend {swift_backend}: this engine is not here. vllm, the nearest one, is set instead.")
    _add_arguments(draft, parsed, swift_backend)
    _add_quantization(draft, parsed)
    _add_variables(draft, parsed.variables)
    _add_differences(draft, parsed)
    name = _name(draft, parsed)
    host, port = _address(draft, parsed)
    return Translation(name, draft.args, host, port, tuple(draft.notes))


# --- what becomes of each argument -------------------------------------------------------------------------------


def _shown(name: str, words: tuple[str, ...]) -> str:
    """Returns the argument as it was given, shortened and without secrets."""
    value = "…" if name in SECRET else textwrap.shorten(" ".join(words), 60, placeholder=" …")
    return f"--{name} {value}".strip()


def _model(parsed: SwiftCommand) -> str:
    model = parsed.one("model", "")
    if not model:
        by_adapter = "adapters" in parsed.arguments
        hint = " swift reads it from the adapter's args.json, which is not read here." if by_adapter else ""
        raise ConfigError(f"the command has no --model.{hint} Add --model with a folder or a Hugging Face id.")
    return model


def _add_arguments(draft: Draft, parsed: SwiftCommand, swift_backend: str) -> None:
    ordered = [name for name in TARGETS if name in parsed.arguments]
    ordered += [name for name in parsed.arguments if name not in TARGETS and name not in HANDLED]
    for name in ordered:
        words = parsed.arguments[name]
        if not _is_idle(draft, name, words, swift_backend):
            _add_argument(draft, name, words)
    name = "vllm_engine_kwargs"
    if name in parsed.arguments and not _is_idle(draft, name, parsed.arguments[name], swift_backend):
        for key, value in read_mapping(name, parsed.arguments[name]).items():
            own = key in ModelConfig.model_fields
            draft.put(f"--{name} {key}", key if own else f"engine_args.{key}", value)


def _add_quantization(draft: Draft, parsed: SwiftCommand) -> None:
    given = [name for name in QUANTIZATION if name in parsed.arguments]
    if not given:
        return
    shown = " ".join(_shown(name, parsed.arguments[name]) for name in given)
    method, reason = quantization_of(parsed, draft.backend)
    if method is None:
        draft.note(f"{shown}: {reason}")
    elif draft.put(shown, "quantization", method) and method == "bnb-nf4":
        name = "bnb_4bit_use_double_quant"
        if name in parsed.arguments and not read_flag(name, parsed.arguments[name]):
            draft.note(f"--{name} false: the scales are always quantized too here.")


def _is_idle(draft: Draft, name: str, words: tuple[str, ...], swift_backend: str) -> bool:
    """Returns whether an argument belongs to another backend of swift than the chosen one, and leaves a note on it."""
    owner = name.partition("_")[0]
    if owner not in ("vllm", "sglang", "lmdeploy") or owner == swift_backend or name not in KNOWN:
        return False
    draft.note(f"{_shown(name, words)}: it counts only with infer_backend: {owner}. swift ignores it silently too.")
    return True


def _add_argument(draft: Draft, name: str, words: tuple[str, ...]) -> None:
    shown = _shown(name, words)
    refused = (NOT_WITH_PT if draft.backend == "pt" else NOT_WITH_VLLM).get(name) or REASONS.get(name)
    if refused:
        draft.note(f"{shown}: {refused}")
        return
    if name not in TARGETS:
        draft.note(f"{shown}: swift deploy 4 has no such argument.{nearest(name, KNOWN)}")
        return
    path, read = TARGETS[name]
    value = read(name, words)
    if name == "device_map" and draft.backend == "pt" and str(value).startswith(("cpu", "cuda")):
        _add_single_device(draft, shown, str(value))
        return
    if name == "max_batch_size" and value < 0:
        draft.note(f"{shown}: there is always a limit here. max_num_seqs is 32 unless you set it.")
        return
    if name == "max_memory":
        value = _limits(draft, shown, value)
        if not value:
            return
    is_set = draft.put(shown, path, value)
    if is_set and name == "adapters":
        _tell_of_adapters(draft, words, value)
    if name == "max_memory" and not is_set:
        draft.note(f"{shown}: THE MODEL HAS NO LIMITS NOW, and takes the memory of whole GPUs.")
    if is_set and name == "max_memory" and draft.backend == "vllm":
        draft.note(
            f"{shown}: it carries over. Each of these GPUs becomes a stage of vLLM's pipeline with as many whole "
            "layers as its limit has room for; with tensor_parallel_size, so many equal ones share a stage. "
            "`serve-app plan` shows the layers, or what would make the model fit. swift silently ignores it with vllm "
            "(ms-swift#3363)."
        )
    if is_set and name == "max_model_len" and draft.backend == "vllm":
        draft.note(f"{shown}: it carries over and bounds vLLM here. swift passes only --vllm_max_model_len to vLLM.")


def _tell_of_adapters(draft: Draft, words: tuple[str, ...], adapters: Mapping[str, str]) -> None:
    """Adds notes on what is different of adapters."""
    unnamed = [word for word in words if "=" not in word]
    for name, source in adapters.items():
        if source in unnamed:
            draft.note(
                f"--adapters {source}: swift makes an adapter without a name a part of the model. Here it is a model "
                f"of its own, so clients ask for '{name}'. The model's own name means the model without it."
            )
        if not source.startswith("/"):
            draft.note(f"adapters.{name} {source}: write a local folder as an absolute path.")


def _limits(draft: Draft, shown: str, limits: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns what of `max_memory` holds here, and leaves a note on the rest. Raises ConfigError for a limit that
    cannot be read, because without it the model would take whole GPUs."""
    try:
        parse_max_memory(limits)
    except ConfigError as error:
        raise ConfigError(f"--max_memory: {str(error).removeprefix('max_memory: ')}") from None
    tiers = [key for key in limits if key in ("cpu", "disk")]
    if not tiers or draft.backend != "vllm":
        return dict(limits)
    names = " and ".join(tiers)
    kept = {key: size for key, size in limits.items() if key not in tiers}
    rest = "The limits of the GPUs stay." if kept else "It names no GPU, so THE MODEL HAS NO LIMITS NOW."
    draft.note(
        f"{shown}: {names} {'is' if len(tiers) == 1 else 'are'} left out, because vLLM keeps all layers on GPUs. "
        f"{rest} With infer_backend: pt, layers that the GPUs have no room for go there."
    )
    return kept


def _add_single_device(draft: Draft, shown: str, device: str) -> None:
    if device == "cpu":
        draft.put(shown, "device", "cpu")
        return
    draft.note(f"{shown}: a model takes one GPU unless told otherwise, and Ray chooses which.")


def _add_variables(draft: Draft, variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        if name == "CUDA_VISIBLE_DEVICES":
            _add_visible_gpus(draft, value)
        elif name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
            draft.note(f"{name}: it is torchrun's. swift deploy does not use it, and Ray starts the processes here.")
        elif name == "USE_HF":
            draft.note(f"{name}: {REASONS['use_hf']}")
        else:
            draft.note(
                f"{name}: environment variables do not carry over. Set it where Ray starts, or in this model's "
                f"application under runtime_env: {{env_vars: {{{name}: …}}}}."
            )


def _add_visible_gpus(draft: Draft, value: str) -> None:
    gpus = [item for item in value.split(",") if item.strip()]
    shown = f"CUDA_VISIBLE_DEVICES={value}"
    if gpus in ([], ["-1"]):
        if draft.args.get("device") != "cpu":
            draft.put(shown, "device", "cpu")
        return
    config = ModelConfig.from_args(draft.args)
    if config.device == "cpu":
        draft.note(f"{shown}: no GPU is used with device: cpu.")
        return
    if len(gpus) > 1 and config.infer_backend == "pt" and not config.gpu_indices:
        draft.put(shown, "num_gpus", len(gpus))
    if config.infer_backend == "vllm" and len(gpus) > config.ranks:
        draft.note(
            f"{shown}: vLLM takes tensor_parallel_size GPUs for each of its pipeline_parallel_size stages, which is "
            f"{config.ranks} here."
        )
    draft.note(
        f"{shown}: Ray chooses the cards. To keep it to these, set the variable where Ray starts; to choose by index, "
        "start the node with `serve-app node-resources`."
    )


def _add_differences(draft: Draft, parsed: SwiftCommand) -> None:
    """Adds notes on what swift does by default and this project does not."""
    model, config = draft.args["model"], ModelConfig.from_args(draft.args)
    if model.startswith(("/", ".", "~")):
        draft.note(
            f"model {model}: write a local folder as an absolute path. swift also reads an args.json in it (template, "
            "system prompt, …), which is not read here."
        )
    elif not _uses_hugging_face(parsed):
        draft.note(
            f"model {model}: swift downloads from ModelScope, but this project downloads from Hugging Face. If it is a "
            "local folder, write its absolute path."
        )
    if draft.args.get("revision") == "master":
        draft.note("--model_revision master: this is ModelScope's name. The branch on Hugging Face is called main.")
    draft.note("swift runs a checkpoint's Python code without asking. Here that needs trust_remote_code: true.")
    on_one_gpu = config.device == "cuda" and not config.gpu_indices and not config.num_gpus
    if config.infer_backend == "pt" and on_one_gpu and "CUDA_VISIBLE_DEVICES" not in parsed.variables:
        draft.note(
            "swift spreads a transformers model over all GPUs it sees. Here it takes one. Set num_gpus for more."
        )


def _uses_hugging_face(parsed: SwiftCommand) -> bool:
    variable = parsed.variables.get("USE_HF", "0")
    return read_flag("use_hf", parsed.arguments.get("use_hf", (variable,)))


def _name(draft: Draft, parsed: SwiftCommand) -> str:
    """Returns the application's name, which clients send as `model`. The default is the end of the model's path, as in
    swift."""
    wanted = parsed.one("served_model_name", "") or draft.args["model"].rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).strip(".-") or "model"
    if name == "router":
        name = "router-model"
    if name != wanted:
        draft.note(
            f"the name '{wanted}' became '{name}': it is part of a route and of file names. Clients send '{name}'."
        )
    return name


def _address(draft: Draft, parsed: SwiftCommand) -> tuple[str, int]:
    host = parsed.one("host", DEFAULT_HOST)
    port = int(read_number("port", (parsed.one("port", str(DEFAULT_PORT)),)))
    if "api_key" in parsed.arguments:
        draft.note(
            "--api_key …: keys are kept as hashes in a file of their own. Make one with `serve-app new-key NAME`, and "
            "name the file in SERVE_APP_API_KEYS_FILE. Until then the server listens on 127.0.0.1 only. Set the host "
            "afterwards."
        )
        host = "127.0.0.1"
    return host, port


# --- printing ----------------------------------------------------------------------------------------------------


def as_yaml(translation: Translation) -> str:
    """Returns the Serve config file, with the notes as comments at its top."""
    model = TranslatedModel(translation.name, translation.args)
    host, port, notes = translation.http_host, translation.http_port, translation.notes
    return TranslatedFile("from-swift", "swift", host, port, [model], notes=notes).text()
