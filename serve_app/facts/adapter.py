"""Finds a LoRA adapter and reads what it is, and loads nothing.

An adapter is a folder as PEFT saves it: adapter_config.json and adapter_model.safetensors. The files are foreign: what
is wrong in them is an AdapterError that names the file, the field, and what was found.
"""

import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from serve_app.errors import AdapterError, ConfigError
from serve_app.facts.checkpoint import MOST_REASON, require_hub
from serve_app.facts.config_fields import MOST_WIDTH
from serve_app.facts.field_kind import FLAG, OBJECT, FieldKind, check_fields, list_of, number, shown, text, whole
from serve_app.facts.foreign_file import read_object
from serve_app.facts.safetensors_header import SIZES, Entry, read_header

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# An adapter's config has a kilobyte, and lists of modules and patterns can make it some hundred.
MOST_CONFIG_BYTES = 2**20
# A LoRA of DeepSeek-V3's attention has some 1,000 tensors, and one of all its experts 90,000.
MOST_TENSORS = 200_000
MOST_RANK = 65_536
MOST_ALPHA = 1e6
MOST_MODULES = 100_000
MOST_NAME = 1000
# PEFT puts this in front of the names of the base model's modules.
PREFIX = "base_model.model."
# The two factors of a layer, and those of an embedding, which are parameters and have no `.weight`.
FACTORS = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B",
}  # fmt: skip

# A revision of the hub, of which a commit has 40 digits.
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,254}")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_NAME = text(MOST_NAME)
_NAMES = list_of(_NAME, MOST_MODULES)
_NAME_OR_NAMES = FieldKind(lambda value: (_NAMES if isinstance(value, list) else _NAME).problem(value))
_KINDS: Mapping[str, FieldKind] = {
    "peft_type": _NAME,
    "r": whole(1, MOST_RANK),
    "lora_alpha": number(0, MOST_ALPHA),
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "lora_bias": FLAG,
    "fan_in_fan_out": FLAG,
    "bias": _NAME,
    "target_modules": _NAME_OR_NAMES,
    "target_parameters": _NAMES,
    "modules_to_save": _NAMES,
    "rank_pattern": OBJECT,
    "alpha_pattern": OBJECT,
    "base_model_name_or_path": FieldKind(lambda value: "" if value == "" else _NAME.problem(value)),
}
# These fields of LoraConfig change what an adapter computes. Nobody who leaves them out computes the same.
_OTHER_KINDS_OF_LORA = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterModule:
    """These are the two factors of one module: A has the shape (rank, inputs) and B (outputs, rank). `is_embedding`
    means that the inputs are tokens of the vocabulary."""

    rank: int
    inputs: int
    outputs: int
    is_embedding: bool = False


@dataclass(frozen=True)
class AdapterFacts:
    """This is what an adapter says of itself. `modules` are by the names that PEFT gives the base model's modules, and
    are empty if `is_pickled`, because such a file cannot be read without running it.

    `rank` is the largest rank of all modules. `others` are its tensors that are no factors of LoRA, by their names in
    the file, and `features` are the fields by which it is another kind of LoRA. `initializes_base` is the way in which
    its training began, if it has a name; some ways change the base model too. `bytes` are those of all tensors as they
    are stored.
    """

    folder: Path
    peft_type: str
    rank: int
    alpha: float
    uses_rslora: bool
    uses_dora: bool
    has_lora_bias: bool
    bias: str
    fan_in_fan_out: bool
    target_modules: str | tuple[str, ...]
    target_parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    base_model: str
    modules: Mapping[str, AdapterModule] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    bytes: int = 0
    is_pickled: bool = False
    initializes_base: str = ""


def adapter_folder(source: str, pickled: bool = False) -> Path:
    """Returns the absolute folder of a local adapter, or downloads that of a Hugging Face id into the hub's cache. An
    id may end in a revision, as ORG/NAME@REVISION, which is a branch, a tag or a commit, and is main otherwise.
    `pickled` has adapter_model.bin downloaded too. Raises AdapterError if there is none."""
    found = folder_here(source, pickled)
    return _downloaded(source, pickled) if found is None else found


def folder_here(source: str, pickled: bool = False) -> Path | None:
    """Returns the absolute folder of a local adapter, or that of a Hugging Face id in the hub's cache, or None if the
    cache does not have all files of an id. It opens the files, so where it returns, their file server answers.
    `pickled` wants adapter_model.bin too. Raises AdapterError if the source is neither a folder nor an id."""
    folder = Path(os.path.expanduser(source))
    if os.path.isdir(folder):
        for name in (CONFIG, WEIGHTS, PICKLED):
            with suppress(OSError), (folder / name).open("rb") as file:
                file.read(1)  # What is wrong with it is told when it is read as a whole.
        return folder.absolute()
    if source.startswith(("/", ".", "~")) or source.partition("@")[0].count("/") != 1:
        raise AdapterError(f"there is no folder {folder.absolute()}. Write a local folder or a Hugging Face id.")
    name, revision = _id_and_revision(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    files = _files(pickled)
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=True))
        if (found / CONFIG).exists() and any((found / file).exists() for file in files[1:]):
            return found
    except HFValidationError:
        raise AdapterError(f"{shown(source)} is neither a local folder nor a Hugging Face id.") from None
    except LocalEntryNotFoundError:
        pass  # The cache does not have it.
    return None


def _downloaded(source: str, pickled: bool) -> Path:
    from huggingface_hub import snapshot_download

    name, revision = _id_and_revision(source)
    try:
        require_hub(name)
        return Path(snapshot_download(name, revision=revision, allow_patterns=_files(pickled)))
    except ConfigError as error:
        raise AdapterError(_own_words(error)) from None
    except Exception as error:
        reason = shorten(str(error), MOST_REASON, placeholder=" …")
        raise AdapterError(f"{source} cannot be read from the Hugging Face hub: {reason}") from None


def _id_and_revision(source: str) -> tuple[str, str | None]:
    """Returns the id of a source ID@REVISION and its revision, or None if it names none."""
    name, at, revision = source.partition("@")
    if at and (_REVISION.fullmatch(revision) is None or ".." in revision):
        raise AdapterError(
            f"{shown(source)} is no local folder, and what follows its @ is no revision of a Hugging Face id. Write a "
            "branch, a tag or a commit."
        )
    return name, revision or None


def commit_of(folder: Path) -> str | None:
    """Returns the commit of a folder in the hub's cache, which names its folders by it, or None for another folder."""
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) is not None
    return folder.name if is_snapshot else None


def _files(pickled: bool) -> list[str]:
    return [CONFIG, WEIGHTS, *([PICKLED] if pickled else [])]


def read_adapter(folder: Path, pickled: bool = False) -> AdapterFacts:
    """Returns what the adapter in a folder is. `pickled` means that adapter_model.bin will do where there is no
    adapter_model.safetensors. Raises AdapterError that names the file and what is wrong in it."""
    try:
        return _read(folder, pickled)
    except ConfigError as error:
        raise AdapterError(_own_words(error)) from None


def _own_words(error: ConfigError) -> str:
    """Returns the message without the field of the config file to which the readers of checkpoints belong."""
    return str(error).removeprefix("model: ")


def _read(folder: Path, pickled: bool) -> AdapterFacts:
    file = folder / CONFIG
    if not os.path.lexists(file):
        raise AdapterError(f"{folder} has no {CONFIG}, so it holds no adapter that PEFT has saved.")
    config = read_object(file, MOST_CONFIG_BYTES)
    check_fields(config, _KINDS, str(file))
    _check_pattern(config, "rank_pattern", whole(1, MOST_RANK), file)
    _check_pattern(config, "alpha_pattern", number(0, MOST_ALPHA), file)
    peft_type = str(config.get("peft_type") or "")
    if not peft_type:
        raise AdapterError(f"{file}: peft_type is missing, so this is no adapter that PEFT has saved.")
    entries = _entries(folder, pickled)
    modules, others = _modules(entries or {}, folder / WEIGHTS)
    rank = max(
        (module.rank for module in modules.values()),
        default=max([int(config.get("r") or 8), *map(int, (config.get("rank_pattern") or {}).values())]),
    )
    targets = config.get("target_modules") or ()
    start = config.get("init_lora_weights")
    return AdapterFacts(
        folder,
        peft_type,
        rank,
        8.0 if config.get("lora_alpha") is None else float(config["lora_alpha"]),
        uses_rslora=bool(config.get("use_rslora")),
        uses_dora=bool(config.get("use_dora")),
        has_lora_bias=bool(config.get("lora_bias")),
        bias=str(config.get("bias") or "none"),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        target_parameters=tuple(config.get("target_parameters") or ()),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        base_model=str(config.get("base_model_name_or_path") or ""),
        modules=modules,
        others=others,
        features=tuple(name for name in _OTHER_KINDS_OF_LORA if config.get(name)),
        dtypes=tuple(sorted({entry.dtype for entry in (entries or {}).values()})),
        bytes=sum(entry.bytes for entry in (entries or {}).values()),
        is_pickled=entries is None,
        initializes_base=start[:60] if isinstance(start, str) else "",
    )


def _check_pattern(config: Mapping[str, Any], name: str, kind: FieldKind, file: Path) -> None:
    """Raises ConfigError unless each value of a pattern is of its kind."""
    pattern: Mapping[str, Any] = config.get(name) or {}
    if len(pattern) > MOST_MODULES:
        raise ConfigError(f"{file}: {name} has {len(pattern)} entries; at most {MOST_MODULES} are read.")
    for key, value in pattern.items():
        if needed := kind.problem(value):
            raise ConfigError(f"{file}: {name}.{key[:60]} is {shown(value)}; {needed}.")


def _entries(folder: Path, pickled: bool) -> Mapping[str, Entry] | None:
    """Returns the tensors of an adapter's file, or None for a pickled one that is allowed."""
    if os.path.lexists(folder / WEIGHTS):
        entries = read_header(folder / WEIGHTS, MOST_TENSORS)
        if not entries:
            raise AdapterError(f"{folder / WEIGHTS} lists no tensors.")
        return entries
    if not os.path.lexists(folder / PICKLED):
        raise AdapterError(f"{folder} has no {WEIGHTS}.")
    if pickled:
        return None
    raise AdapterError(
        f"{folder} has its weights in {PICKLED}, which is pickled and not safetensors, so to read it may run code. "
        "Save the adapter again with safe_serialization=True, or name it in allow_pickled_adapters."
    )


def _modules(entries: Mapping[str, Entry], file: Path) -> tuple[dict[str, AdapterModule], tuple[str, ...]]:
    """Returns the modules of an adapter by name, and the names of the tensors that are no factor of one. Raises
    AdapterError for a factor without the other, and for two that do not belong together."""
    factors: dict[str, dict[str, tuple[str, Entry]]] = {}
    others = []
    for name, entry in entries.items():
        ending = next((ending for ending in FACTORS if name.endswith(f".{ending}")), None)
        if ending is None or entry.dtype not in SIZES:
            others.append(name)
            continue
        module = name.removesuffix(f".{ending}").removeprefix(PREFIX)
        factors.setdefault(module, {})[FACTORS[ending]] = (name, entry)
    modules = {}
    for module, found in factors.items():
        if len(found) != 2:
            have = next(iter(found.values()))[0]
            raise AdapterError(f"{file}: there is {have}, but the other factor of this module is missing.")
        modules[module] = _module(found["A"], found["B"], file)
    return modules, tuple(sorted(others))


def _module(a: tuple[str, Entry], b: tuple[str, Entry], file: Path) -> AdapterModule:
    (first, left), (second, right) = a, b
    for name, entry in (a, b):
        if len(entry.shape) != 2 or not all(0 < size <= MOST_WIDTH for size in entry.shape):
            raise AdapterError(
                f"{file}: {name} has the shape {list(entry.shape)}; two sizes of 1 to {MOST_WIDTH} are needed."
            )
    is_embedding = first.endswith("lora_embedding_A")
    rank, inputs = left.shape
    outputs, same = right.shape
    if rank != same:
        raise AdapterError(
            f"{file}: {first} has the shape {list(left.shape)} and {second} {list(right.shape)}; their ranks differ."
        )
    return AdapterModule(rank, inputs, outputs, is_embedding)


def subfolders(folder: Path, most: int) -> Collection[Path]:
    """Returns the folders within a watched folder, of which each holds an adapter, by name. Those that begin with a dot
    are left out. Raises AdapterError if it cannot be read, or if there are more than `most`."""
    try:
        with os.scandir(folder) as items:
            found = [Path(item.path) for item in items if not item.name.startswith(".") and item.is_dir()]
    except OSError as error:
        raise AdapterError(f"adapters_folder {folder} cannot be read: {error.strerror or error}.") from None
    if len(found) > most:
        raise AdapterError(f"adapters_folder {folder} has {len(found)} subfolders; at most {most} adapters are served.")
    return sorted(found)
