"""`serve-app from-llama-swap` makes a Serve config file from the config file of llama-swap.

A model that `vllm serve` runs becomes an application. Models that llama-swap swaps share a pool, and those that it
never ends hold their memory. Everything else gets a note that says why, and what to do instead.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app.cli.llama_swap.config_file import NO_GROUP, Group, SwapFile, SwapModel, read_swap_file
from serve_app.cli.llama_swap.macros import environment_names
from serve_app.cli.llama_swap.vllm_args import draft_of
from serve_app.cli.llama_swap.vllm_command import VllmCommand, read_command
from serve_app.cli.translation import TranslatedFile, TranslatedModel
from serve_app.errors import ConfigError

# llama-swap listens on this port, on all addresses.
PORT = 8080
# A request waits for so many seconds for a model that loads, unless the file says more.
HOLD_TIMEOUT_S = 300
# The values of variables with such names are secrets, which do not belong into a file.
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)
MODEL_FIELDS = {
    "ttl": "a model does not leave by time. It leaves its pool's memory when another one needs it.",
    "unlisted": "/v1/models lists every model of which an API key may see the name.",
    "concurrencyLimit": "max_num_seqs bounds what runs at once in a model, and max_waiting_requests of the router what "
    "waits at each.",
    "filters": "requests are not changed here. Defaults of sampling go under engine_args: {override_generation_config: "
    "{…}}.",
    "sendLoadingState": "a client that streams gets progress in comments with the header x-serve-app-progress: 1.",
    "unloadTimeout": "drain_s under residency is how long requests that run may end before their model leaves.",
    "timeouts": "the router's timeouts hold for all models: first_byte_timeout_s, idle_timeout_s, total_timeout_s.",
}
# Serve starts, checks and stops models by itself, or the plan and /v1/models say the same.
NEEDLESS = frozenset(
    {"proxy", "checkEndpoint", "cmdStop", "useModelName", "aliases", "env", "name", "description", "metadata"}
    | {"capabilities", "compat"}
)
FILE_FIELDS = {
    "globalTTL": MODEL_FIELDS["ttl"],
    "sendLoadingState": MODEL_FIELDS["sendLoadingState"],
    "apiKeys": "keys are kept as hashes in a file of their own. Make one with `serve-app new-key NAME`, and name the "
    "file in SERVE_APP_API_KEYS_FILE.",
    "peers": "other servers are not asked here. Name their address to the clients that need them.",
    "profiles": "a name leads to one model. Use aliases of the router, which can change while it runs.",
    "selectors": "a name leads to one model. Use aliases, and fallbacks for a model that is full.",
    "matrix": "which models are resident together follows from the memory plan. `serve-app plan` shows the sets.",
    "tailcat": "a tunnel belongs in front of the address.",
    "upstream": "/models/NAME/… leads to a model's own endpoints.",
    "unloadTimeout": MODEL_FIELDS["unloadTimeout"],
}
# These say how llama-swap itself logs, measures and starts.
OF_ITS_OWN = frozenset(
    {"logLevel", "logTimeFormat", "logToStdout", "metricsMaxInMemory", "captureBuffer", "startPort", "store", "ui"}
    | {"performance", "includeAliasesInList", "healthCheckTimeout", "hooks", "routing"}
)


def from_llama_swap(path: Path) -> int:
    """Prints the config file that llama-swap's file stands for and returns 0. Raises ConfigError for another file, and
    for one of which no model can be served here."""
    print(translate(read_swap_file(path), str(path)).text(), end="")
    return 0


def translate(file: SwapFile, path: str) -> TranslatedFile:
    """Returns what a config of llama-swap means here. Raises ConfigError if none of its models can be served."""
    found = _Found()
    for model in file.models:
        try:
            _add_model(found, model, file)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    if not found.models:
        lines = [f"{path}: none of its models runs with `vllm serve`, so there is nothing to serve here.", *found.notes]
        raise ConfigError("\n".join(lines))
    _add_pools(found, file)
    _add_aliases(found, file)
    _add_file_fields(found, file)
    models = [TranslatedModel(found.names[key], args, found.variables[key]) for key, args in found.models.items()]
    router: dict[str, Any] = {"aliases": found.aliases} if found.aliases else {}
    if (hold_s := _hold_timeout(file)) is not None:
        router["hold_timeout_s"] = hold_s
    return TranslatedFile("from-llama-swap", "llama-swap", "127.0.0.1", PORT, models, router, tuple(found.notes))


@dataclass
class _Found:
    """Collects the models by their keys in llama-swap, their names here, the aliases, and the notes."""

    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Mapping[str, str]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _add_model(found: _Found, model: SwapModel, file: SwapFile) -> None:
    try:
        command = read_command(model.command)
    except ConfigError as error:
        raise ConfigError(f"models.{model.key}.cmd: {error}") from None
    if isinstance(command, str):
        found.notes.append(f"{model.key}: IT IS LEFT OUT. {_not_served(command, model.command)}")
        return
    draft = draft_of(command, model.key, _swaps(file.group_of(model.key), file))
    found.notes += [f"{model.key}: {note}" for note in (*draft.notes, *_model_notes(model, command))]
    found.models[model.key] = draft.args
    found.variables[model.key] = _variables(found, model, command)
    name = found.names[model.key] = _name(model.key, found.names.values())
    if name != model.key:
        found.notes.append(
            f"{model.key}: it is called '{name}' here, because its name is a part of a route. Clients may "
            f"send '{model.key}' too, which is an alias."
        )


def _not_served(program: str, command: str) -> str:
    """Returns why a model is left out, and what to do."""
    gguf = re.search(r"\S*\.gguf\b", command, re.IGNORECASE)
    hub = re.search(r"(?:^|\s)(?:-hf|-hfr|--hf-repo)[\s=]+(\S+)", command)
    if hub or gguf or "llama-server" in program or "llama.cpp" in program:
        what = f" ({(hub[1] if hub else gguf[0] if gguf else '')})".replace(" ()", "")
        return (
            f"'{program}' runs a GGUF file{what}, which no engine here reads. Add an application with the Hugging Face "
            "id of the original weights, which the page of the GGUF file names, and infer_backend: vllm or pt."
        )
    return (
        f"'{program}' is no `vllm serve`. If it serves a language model, add an application with its Hugging Face id "
        "and infer_backend: vllm or pt. Other kinds of models are not served here."
    )


def _model_notes(model: SwapModel, command: VllmCommand) -> Iterable[str]:
    for name, value in model.fields.items():
        is_idle = value in (None, 0, -1, False, "", [], {})
        if name in MODEL_FIELDS:
            if not is_idle:
                yield f"{name}: {MODEL_FIELDS[name]}"
        elif name not in NEEDLESS:
            yield f"{name}: llama-swap has no such field, or it is new. It is not carried over."
    words = [command.model, *(word for words in command.arguments.values() for word in words)]
    for name in environment_names(" ".join(words)):
        yield f"${{env.{name}}}: the environment is not read here. Write its value into the file."
    if command.model.startswith((".", "~")):
        yield f"model {command.model}: write a local folder as an absolute path."


def _variables(found: _Found, model: SwapModel, command: VllmCommand) -> dict[str, str]:
    """Returns the environment variables that a model keeps, and leaves a note on each other one."""
    kept = {}
    for name, value in {**command.variables, **model.variables}.items():
        if name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
            found.notes.append(f"{model.key}: {name}={value}: the pool's GPUs are those that pool_memory names.")
        elif SECRET.search(name):
            found.notes.append(
                f"{model.key}: {name}: a secret does not belong into this file. Set it where Ray starts."
            )
        elif environment_names(value):
            found.notes.append(
                f"{model.key}: {name}={value}: the environment is not read here. Set it where Ray starts."
            )
        else:
            kept[name] = value
    return kept


def _name(key: str, taken: Iterable[str]) -> str:
    """Returns the application's name: the key, without what no name may have."""
    name = re.sub(r"[^A-Za-z0-9._~:@+=,-]+", "-", key).strip("._~:@+=,-") or "model"
    name = "router-model" if name == "router" else name
    others, number, free = set(taken), 2, name
    while free in others:
        free, number = f"{name}-{number}", number + 1
    return free


# --- groups ------------------------------------------------------------------------------------------------------


def _swaps(group: Group, file: SwapFile) -> bool:
    """Returns whether the models of a group may have to leave their memory: for each other, or for another group."""
    if group.swap:
        return True
    return not group.persistent and any(other.exclusive for other in _other_groups(group, file))


def _other_groups(group: Group, file: SwapFile) -> list[Group]:
    grouped = {member for each in file.groups for member in each.members}
    ungrouped = [model.key for model in file.models if model.key not in grouped]
    groups = [*file.groups, *([Group(NO_GROUP, tuple(ungrouped))] if ungrouped else [])]
    return [each for each in groups if each.name != group.name]


def _add_pools(found: _Found, file: SwapFile) -> None:
    """Gives the models that swap their pools. All are in one, except those of a persistent group, which no other group
    ends."""
    pools: dict[str, list[str]] = {}
    for key in found.models:
        group = file.group_of(key)
        if _swaps(group, file):
            pools.setdefault(_pool_name(group.name) if group.persistent else "default", []).append(key)
    for pool, keys in pools.items():
        if len(keys) == 1:
            continue  # There is no other model for which it would leave.
        for key in keys:
            found.models[key]["residency"] = {"policy": "swap", **({} if pool == "default" else {"pool": pool})}
    pinned = [key for key in found.models if "residency" not in found.models[key]]
    together = [group for group in file.groups if not group.swap and _swaps(group, file)]
    pools = {pool: keys for pool, keys in pools.items() if len(keys) > 1}
    found.notes += _pool_notes(pools, pinned, together, found.names)


def _pool_notes(
    pools: Mapping[str, Sequence[str]], pinned: Sequence[str], together: Sequence[Group], names: Mapping[str, str]
) -> Iterable[str]:
    if not pools:
        return
    yield (
        "llama-swap runs one model of a group at a time. Here, as many are resident as fit, and one leaves only when "
        "another needs its memory. `serve-app plan` shows which fit together."
    )
    if len(pools) > 1 or pinned:
        named = ", ".join(names[key] for key in pinned)
        beside = f" beside {named}" if pinned else ""
        yield (
            f"pool_memory: the file does not say how much each pool may take{beside}. Add it to residency of all "
            "models of a pool, such as pool_memory: {0: 20GiB, cpu: 64GiB}."
        )
    else:
        yield (
            "pool_memory is left out, so the pool has all GPUs of its node, and half of the host's memory for the "
            "weights of parked models."
        )
    for group in together:
        yield (
            f"groups.{group.name}: swap: false keeps its models together. Here they are in the pool with the others, "
            "and together where the plan says that they fit. Leave residency out for those that must never leave."
        )


def _pool_name(group: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", group.lower()).strip("-")[:63] or "persistent"


# --- names and the rest of the file ------------------------------------------------------------------------------


def _add_aliases(found: _Found, file: SwapFile) -> None:
    by_key = {model.key: model for model in file.models}
    for key, name in found.names.items():
        own = [key] if name != key else []
        for alias in [*own, *by_key[key].aliases]:
            if alias in found.names.values() or alias in found.aliases:
                found.notes.append(f"{key}: the alias '{alias}' is the name of another model here, so it is left out.")
            else:
                found.aliases[alias] = name
    left_out = [model for model in file.models if model.key not in found.models and model.aliases]
    found.notes += [f"{model.key}: its aliases are left out too: {', '.join(model.aliases)}." for model in left_out]


def _add_file_fields(found: _Found, file: SwapFile) -> None:
    for name, value in file.fields.items():
        if name in FILE_FIELDS:
            if value not in (None, 0, False, [], {}):
                found.notes.append(f"{name}: {FILE_FIELDS[name]}")
        elif name not in OF_ITS_OWN:
            found.notes.append(f"{name}: llama-swap has no such field, or it is new. It is not carried over.")
    own = [name for name in file.fields if name in OF_ITS_OWN - {"healthCheckTimeout", "hooks", "routing"}]
    if own:
        found.notes.append(
            f"{', '.join(own)}: these are for llama-swap itself. Ray and Serve have settings of their own."
        )
    found.notes += _hook_notes(file)
    found.notes += _routing_notes(file)
    found.notes.append(
        f"llama-swap listens on all addresses. This file listens on 127.0.0.1:{PORT}, so that nobody else can use it "
        "before there are API keys."
    )


def _hook_notes(file: SwapFile) -> Iterable[str]:
    hooks = file.fields.get("hooks")
    startup = hooks.get("on_startup") if isinstance(hooks, dict) else None
    if isinstance(startup, dict) and startup.get("preload"):
        yield (
            "hooks.on_startup.preload: every model is loaded once at the start, and those that fit stay resident until "
            "another needs their memory."
        )
    if isinstance(startup, dict) and startup.get("profile"):
        yield f"hooks.on_startup.profile: {FILE_FIELDS['profiles']}"


def _routing_notes(file: SwapFile) -> Iterable[str]:
    routing = file.fields.get("routing")
    if not isinstance(routing, dict):
        return
    router, scheduler = routing.get("router"), routing.get("scheduler")
    settings = router.get("settings") if isinstance(router, dict) else None
    if isinstance(settings, dict) and settings.get("matrix"):
        reason = f"{FILE_FIELDS['matrix']} priority under residency stands for evict_costs."
        yield f"routing.router.settings.matrix: {reason}"
    if isinstance(scheduler, dict) and scheduler.get("settings"):
        yield (
            "routing.scheduler: the model whose request waits longest comes first. priority under residency says who "
            "leaves last."
        )


def _hold_timeout(file: SwapFile) -> float | None:
    """Returns how long requests wait for a model that loads, if the file says longer than the default."""
    value = file.fields.get("healthCheckTimeout")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if value > HOLD_TIMEOUT_S else None
