"""Reads the config file of llama-swap: its models, its groups, and what else it has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.cli.llama_swap.macros import expanded
from serve_app.errors import ConfigError
from serve_app.facts.field_kind import shown

# A config file is far smaller.
MOST_BYTES = 4 * 2**20
# Models without a group are in this one, in which only one runs at a time and which ends all others.
NO_GROUP = "(default)"


@dataclass(frozen=True)
class SwapModel:
    """This is a model of the file with its macros replaced. `fields` is what it says beside `cmd`."""

    key: str
    command: str
    fields: Mapping[str, Any]

    @property
    def aliases(self) -> list[str]:
        """Returns its other names."""
        return [str(alias) for alias in _list(self.fields.get("aliases"), f"models.{self.key}.aliases")]

    @property
    def variables(self) -> dict[str, str]:
        """Returns the variables of its environment. Raises ConfigError for one without a value."""
        found = {}
        for item in _list(self.fields.get("env"), f"models.{self.key}.env"):
            name, equals, value = str(item).partition("=")
            if not equals:
                raise ConfigError(f"models.{self.key}.env: expected NAME=value, got {shown(item)}.")
            found[name.strip()] = value
        return found


@dataclass(frozen=True)
class Group:
    """This is a group: whether only one of its models runs at a time, whether it ends the models of other groups, and
    whether others cannot end its own."""

    name: str
    members: tuple[str, ...]
    swap: bool = True
    exclusive: bool = True
    persistent: bool = False


@dataclass(frozen=True)
class SwapFile:
    """This is the whole file. `fields` is what it says beside models and groups."""

    models: tuple[SwapModel, ...]
    groups: tuple[Group, ...]
    fields: Mapping[str, Any]

    def group_of(self, model: str) -> Group:
        """Returns a model's group."""
        return next((group for group in self.groups if model in group.members), Group(NO_GROUP, ()))


def read_swap_file(path: Path) -> SwapFile:
    """Returns what a config file of llama-swap says. Raises ConfigError that names the place of a mistake."""
    document = _document(path)
    try:
        models = tuple(_model(str(key), item, document) for key, item in document["models"].items())
        groups = _groups(document, {model.key for model in models})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    fields = {key: value for key, value in document.items() if key not in ("models", "groups", "macros")}
    return SwapFile(models, groups, fields)


def _document(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path}: the file is larger than {MOST_BYTES // 2**20} MiB, so it is no config file.")
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the file is not UTF-8 text.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: the file is not valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(document, dict) and "applications" in document:
        raise ConfigError(f"{path}: this is a Ray Serve config file already. The config.yaml of llama-swap is needed.")
    if not isinstance(document, dict) or not isinstance(document.get("models"), dict) or not document["models"]:
        raise ConfigError(f"{path}: the file is not a config file of llama-swap, because it has no mapping 'models'.")
    return document


def _model(key: str, item: Any, document: Mapping[str, Any]) -> SwapModel:
    where = f"models.{key}"
    if not isinstance(item, dict):
        raise ConfigError(f"{where}: expected a mapping with 'cmd', got {shown(item)}.")
    if not isinstance(item.get("cmd"), str) or not item["cmd"].strip():
        raise ConfigError(f"{where}.cmd: expected the command that starts the model, got {shown(item.get('cmd'))}.")
    macros = {**_mapping(document.get("macros"), "macros"), **_mapping(item.get("macros"), f"{where}.macros")}
    known = {**macros, "MODEL_ID": key}
    command = expanded(item["cmd"], known, f"{where}.cmd")
    fields = {
        name: [expanded(str(each), known, f"{where}.env") for each in value]
        if name == "env" and isinstance(value, list)
        else value
        for name, value in item.items()
        if name not in ("cmd", "macros")
    }
    return SwapModel(key, command, fields)


def _groups(document: Mapping[str, Any], models: set[str]) -> tuple[Group, ...]:
    """Returns the groups, which newer files have under `routing`."""
    found = _mapping(document.get("groups"), "groups")
    settings: Any = document
    for name in ("routing", "router", "settings", "groups"):
        settings = settings.get(name) if isinstance(settings, dict) else None
    if isinstance(settings, dict):
        found = {**found, **settings}
    groups, seen = [], dict[str, str]()
    for name, item in found.items():
        where = f"groups.{name}"
        if not isinstance(item, dict):
            raise ConfigError(f"{where}: expected a mapping with 'members', got {shown(item)}.")
        members = tuple(str(member) for member in _list(item.get("members"), f"{where}.members"))
        for member in members:
            if member not in models:
                raise ConfigError(f"{where}.members: there is no model '{member}' under 'models'.")
            if seen.setdefault(member, str(name)) != str(name):
                raise ConfigError(f"{where}.members: '{member}' is in the group '{seen[member]}' already.")
        flags = {flag: _flag(item.get(flag), default, f"{where}.{flag}") for flag, default in _FLAGS.items()}
        groups.append(Group(str(name), members, **flags))
    return tuple(groups)


# These are llama-swap's defaults.
_FLAGS = {"swap": True, "exclusive": True, "persistent": False}


def _flag(value: Any, default: bool, where: str) -> bool:
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: expected true or false, got {shown(value)}.")
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a mapping, got {shown(value)}.")
    return {str(name): item for name, item in value.items()}


def _list(value: Any, where: str) -> Sequence[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ConfigError(f"{where}: expected a list, got {shown(value)}.")
    return value
