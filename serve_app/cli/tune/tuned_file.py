"""Writes the config file with the settings that were found, each with a comment that says what it has brought."""

import copy
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from serve_app.errors import ConfigError
from serve_app.tuning.journal import Trial
from serve_app.tuning.search import field_gains
from serve_app.tuning.setup import Setup
from serve_app.tuning.space import REPLICAS, changes
from serve_app.tuning.verdict import Verdict, known_of


def require_writable_yaml(text: str, file: Path) -> None:
    """Raises ConfigError if the file could not be written again: the library that keeps comments takes no two equal
    fields."""
    try:
        _yaml(text).load(text)
    except YAMLError as error:
        raise ConfigError(f"{file}: {error}") from None


def tuned_text(setup: Setup, trials: Sequence[Trial], found: Verdict) -> str:
    """Returns the file with the verdict's settings. Everything else in it stays, with its comments."""
    yaml = _yaml(setup.text)
    document = yaml.load(setup.text)
    notes = field_notes(setup, trials, found)
    for (model, name), value in changes(found.point, setup.task.space.default).items():
        application = next(item for item in document["applications"] if item.get("name") == model)
        _unshare(document["applications"], application)
        _set(application, name, value, notes[model, name])
    out = StringIO()
    yaml.dump(document, out)
    return out.getvalue()


def _yaml(text: str) -> YAML:
    """Returns a reader and writer that indents lists as the file does."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1000
    if (found := re.search(r"^applications:[^\n]*\n(?:\s*#[^\n]*\n|\s*\n)*( +)- ", text, re.MULTILINE)) is not None:
        offset = len(found[1])
        yaml.indent(mapping=2, sequence=offset + 2, offset=offset)
    return yaml


def _unshare(applications: Sequence[Any], application: Any) -> None:
    """Gives an application its own copy of what it shares with others by an alias (`args: *common`)."""
    for key in ("args", "deployments"):
        own = application.get(key)
        if own is not None and any(item is not application and item.get(key) is own for item in applications):
            application[key] = copy.deepcopy(own)
            if application[key].anchor.value:
                application[key].yaml_set_anchor(None)


def field_notes(setup: Setup, trials: Sequence[Trial], found: Verdict) -> Mapping[tuple[str, str], str]:
    """Returns a comment for each changed field: the factor that it is estimated to bring beside the other changes, and
    how many starts had its value."""
    space = setup.task.space
    own = changes(found.point, space.default)
    if not own:
        return {}
    gains = field_gains(space, known_of(setup.task.objective, space, trials), found.point)
    return {
        key: f"tuned: about {gains[key] - 1:+.0%} {setup.task.objective.kind}, from {_starts(trials, key, value)}"
        if key in gains
        else "tuned"
        for key, value in own.items()
    }


def _starts(trials: Sequence[Trial], key: tuple[str, str], value: Any) -> str:
    count = sum(dict(trial.point).get(key) == value and trial.status != "failed" for trial in trials)
    return f"{count} start" if count == 1 else f"{count} starts"


def _set(application: Any, name: str, value: Any, note: str) -> None:
    """Sets a field of an application, or removes it."""
    group, key = _group(application, name)
    if value is None:
        group.pop(key, None)
        return
    own = group.ca.items.get(key, [None] * 4)[2]
    before = "" if own is None else own.value.split("\n", 1)[0].lstrip("# ").rstrip()
    group[key] = value
    group.yaml_add_eol_comment(f"# {note}" + (f". It was: {before}" if before else ""), key)


def _group(application: Any, name: str) -> tuple[Any, str]:
    """Returns the mapping that has a field, which is made if it is not there, and the field's name in it."""
    if name == REPLICAS:
        deployments = application.setdefault("deployments", CommentedSeq())
        own = next((item for item in deployments if item.get("name") == "Model"), None)
        if own is None:
            own = CommentedMap({"name": "Model"})
            deployments.append(own)
        own.pop("autoscaling_config", None)
        return own, name
    arguments = application.setdefault("args", CommentedMap())
    outer, _, inner = name.partition(".")
    if not inner:
        return arguments, outer
    return arguments.setdefault(outer, CommentedMap()), inner
