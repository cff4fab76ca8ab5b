"""Says which adapters of a file could not be served, and which could not be later, as far as their folders are on this
machine. Adapters of the hub are not downloaded for this."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.config import ModelConfig
from serve_app.engines.adapters import AdapterCheck, readable_adapters, with_adapter_room
from serve_app.errors import AdapterError
from serve_app.facts.adapter import subfolders
from serve_app.facts.serve_file import ApplicationSpec
from serve_app.model_fields import MOST_ADAPTERS
from serve_app.planning.adapters import adapter_room, buffers_problem, module_tail, pickled_targets

MOST_MODULES = 12
RELATIVE = (
    "is a relative path, whose folder depends on the working directory of Serve's processes. Write an absolute path."
)


@dataclass(frozen=True)
class AdapterFindings:
    """These are lines about the adapters of a file. `errors` are on adapters for which requests would be refused. Their
    models start without them."""

    errors: Sequence[str]
    notes: Sequence[str]


def adapter_findings(applications: Sequence[ApplicationSpec], is_here: bool) -> AdapterFindings:
    """Returns what is wrong with the adapters in local folders, and what is to be known of them and of the room that
    they leave. `is_here` means that replicas would run on this machine. Elsewhere, a folder that is missing here may be
    there, so it is only noted."""
    errors, notes = [], []
    for application in applications:
        if not application.is_model:
            continue
        config = application.model_settings()
        local = _local(config)
        notes += [f"{application.name}: {note}" for note in _place_notes(config, is_here)]
        check = AdapterCheck(with_adapter_room(local))
        for name, source in local.adapters.items():
            place = f"{application.name}: adapters.{name}"
            try:
                _, note = check.checked(source, name in config.allow_pickled_adapters)
            except AdapterError as error:
                if is_here or os.path.isdir(os.path.expanduser(source)):
                    errors.append(f"{place}: requests for it would be refused, because it cannot be served: {error}")
                    continue
                note = f"it would not be served from this machine: {error}"
            if note:
                notes.append(f"{place}: {note}")
        if note := _room_note(config):
            notes.append(f"{application.name}: {note}")
    return AdapterFindings(errors, notes)


def refused_later(
    before: Sequence[ApplicationSpec], after: Sequence[ApplicationSpec], in_place: Collection[str]
) -> list[str]:
    """Returns a note on each adapter that running replicas would refuse, for models that change in place. Their buffers
    were made for the adapters of the file before."""
    old = {application.name: application for application in before if application.is_model}
    notes = []
    for application in after:
        if application.is_model and application.name in in_place and application.name in old:
            was, now = old[application.name].model_settings(), _local(application.model_settings())
            notes += [f"{application.name}: adapters.{name}: {reason}" for name, reason in _refused(was, now)]
    return notes


def _refused(was: ModelConfig, now: ModelConfig) -> list[tuple[str, str]]:
    started = with_adapter_room(_local(was))
    check = AdapterCheck(started.model_copy(update={"adapters": now.adapters}))
    has_own_modules = was.infer_backend == "pt" and was.lora_target_modules is None
    known = readable_adapters(_local(was)) if has_own_modules else ()
    found = []
    for name, source in now.adapters.items():
        try:
            adapter, _ = check.checked(source, name in now.allow_pickled_adapters)
        except AdapterError as error:
            found.append((name, f"running replicas would refuse it: {error}"))
            continue
        if known and (problem := buffers_problem(adapter, known)) is not None:
            found.append((name, f"running replicas would refuse it: {problem}"))
    return found


def _place_notes(config: ModelConfig, is_here: bool) -> list[str]:
    """Returns what is to be known of where adapters are read from."""
    local, notes = _local(config).adapters, []
    for name, source in config.adapters.items():
        if name not in local:
            notes.append(
                f"adapters.{name}: {source} is not checked: it is read as a Hugging Face id, because there is no such "
                "folder here."
            )
        elif _is_relative(source):
            notes.append(f"adapters.{name}: {source} {RELATIVE}")
    if (folder := config.adapters_folder) is None:
        return notes
    if _is_relative(folder):
        notes.append(f"adapters_folder: {folder} {RELATIVE}")
    try:
        subfolders(Path(folder).expanduser(), MOST_ADAPTERS)
    except AdapterError as error:
        where = "" if is_here else "on this machine, "
        notes.append(f"{where}{error} Without it, no adapter of it is served. Replicas look for it every second.")
    return notes


def _is_relative(source: str) -> bool:
    return not os.path.isabs(os.path.expanduser(source))


def _room_note(config: ModelConfig) -> str:
    """Returns what the adapters of the start leave for those that come later, or an empty text if the fields say it."""
    if not config.adapters:
        return ""
    known = readable_adapters(_local(config))
    room, sized = adapter_room(config, [adapter.rank for adapter in known]), []
    if config.max_loras is None:
        sized.append(f"max_loras is {room.max_loras}")
    if config.max_lora_rank is None:
        sized.append(_rank_note(config, room.max_lora_rank, len(known)))
    if config.lora_target_modules is None and config.infer_backend != "vllm" and (modules := _modules(config)):
        sized.append(f"pt makes buffers for {modules} alone")
    if not sized:
        return ""
    return (
        f"the adapters of the start size the room for all that come later: {'; '.join(sized)}. Later ones that need "
        "more are refused until the replicas are replaced. Set max_loras, max_lora_rank and lora_target_modules to "
        "leave room for them."
    )


def _rank_note(config: ModelConfig, rank: int, known: int) -> str:
    """Returns which rank the replicas will have. They read the adapters that were not `known` when they start."""
    if known == len(config.adapters):
        return f"max_lora_rank is {rank}"
    if known:
        return f"max_lora_rank is {rank}, or more if adapters that could not be read here need it"
    return f"max_lora_rank follows from the adapters, of which none could be read here, and is {rank} without them"


def _modules(config: ModelConfig) -> str:
    found = readable_adapters(_local(config))
    modules = [module_tail(module) for facts in found for module in facts.modules]
    names = sorted({name.rpartition(".")[2] for name in (*modules, *pickled_targets(found))})
    more = len(names) - MOST_MODULES
    return ", ".join(names[:MOST_MODULES]) + (f" and {more} more" if more > 0 else "")


def _local(config: ModelConfig) -> ModelConfig:
    """Returns the config with those adapters alone that lie in local folders, or that cannot be an id of the hub."""
    local = {name: source for name, source in config.adapters.items() if _is_local(source)}
    return config.model_copy(update={"adapters": local})


def _is_local(source: str) -> bool:
    name, _, _ = source.partition("@")  # A revision may have slashes, as refs/pr/1 has.
    return source.startswith(("/", ".", "~")) or name.count("/") != 1 or os.path.isdir(source)
