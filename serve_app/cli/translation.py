"""Builds a Serve config file from what another server was told: `args` that ModelConfig accepts at every step, a note
on each thing that does not carry over, and the text of the file."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from serve_app.config import ModelConfig
from serve_app.errors import ConfigError


@dataclass
class Draft:
    """Collects the `args` of a model. ModelConfig accepts them at every step.

    `more` is added to the config's own reason for refusing a field with vllm.
    """

    args: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        """Returns the backend."""
        return str(self.args["infer_backend"])

    def note(self, text: str) -> None:
        """Adds a note."""
        self.notes.append(text)

    def put(self, source: str, path: str, value: Any) -> bool:
        """Sets a field and returns True. If the field is set already or ModelConfig refuses it, leaves a note instead.

        Dots in `path` lead below `engine_args`.
        """
        first, *keys = path.split(".")
        if not keys and first in self.args:
            self.note(f"{source}: another argument has set {first} to {self.args[first]} already.")
            return False
        for key in reversed(keys):
            value = {key: value}
        changed = self.args | {first: _merged(self.args.get(first, {}), value) if keys else value}
        try:
            ModelConfig.from_args(changed)
        except ConfigError as error:
            reason = " ".join(str(error).split()).removeprefix(f"{path}: ").removeprefix(f"{first}: ")
            more = self.more.get(first, "") if self.backend == "vllm" else ""
            self.note(f"{source}: {reason} {more}".strip())
            return False
        self.args = changed
        return True


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


@dataclass(frozen=True)
class TranslatedModel:
    """This is one model of the file: its name for clients, its `args`, and the environment variables of its
    replicas."""

    name: str
    args: Mapping[str, Any]
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TranslatedFile:
    """This is a whole file. `command` is the one that made it, and `origin` is the server that it was made for."""

    command: str
    origin: str
    host: str
    port: int
    models: Sequence[TranslatedModel]
    router: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Returns the Serve config file, with the notes as comments at its top."""
        router: dict[str, Any] = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
        if self.router:
            router["args"] = dict(self.router)
        top = {"http_options": {"host": self.host, "port": self.port}}
        parts = [self._header(), _dump(top), "applications:\n" + _dump([router])]
        return "\n".join([*parts, *(_dump([_application(model)]) for model in self.models)])

    def _header(self) -> str:
        lines = [
            f"`serve-app {self.command}` made this file. Check it with `serve-app check`, and start it with "
            "`serve-app run`."
        ]
        if self.notes:
            lines.append(f"These things are different from {self.origin}, or did not carry over:")
        for note in self.notes:
            printable = "".join(char if char.isprintable() else " " for char in note)
            lines += textwrap.wrap(printable, 116, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        return "".join(f"# {line}\n" for line in lines)


# These fields are printed on one line.
_ON_ONE_LINE = ("max_memory", "residency")


def _application(model: TranslatedModel) -> dict[str, Any]:
    args = {key: _Inline(value) if key in _ON_ONE_LINE else value for key, value in model.args.items()}
    found: dict[str, Any] = {
        "name": model.name,
        "import_path": "serve_app.app:model",
        "route_prefix": f"/models/{model.name}",
        "args": args,
    }
    if model.variables:
        found["runtime_env"] = {"env_vars": dict(model.variables)}
    return found


class _Inline(dict[Any, Any]):
    """This is a mapping that is printed on one line."""


class _Dumper(yaml.SafeDumper):
    """Prints `_Inline` on one line."""


_Dumper.add_representer(
    _Inline, lambda dumper, value: dumper.represent_mapping("tag:yaml.org,2002:map", value.items(), flow_style=True)
)


def _dump(value: object) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
