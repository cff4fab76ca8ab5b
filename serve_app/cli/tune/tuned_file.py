"""Writes the config file with the settings that were found, each with a comment that says what it has brought."""

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from serve_app.tuning.journal import Trial
from serve_app.tuning.search import field_gains
from serve_app.tuning.setup import Setup
from serve_app.tuning.space import REPLICAS, changes
from serve_app.tuning.verdict import Verdict, known_of


def tuned_text(text: str, setup: Setup, trials: Sequence[Trial], found: Verdict) -> str:
    """Returns the file with the verdict's settings. Everything else in it stays, with its comments."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1000
    document = yaml.load(text)
    notes = field_notes(setup, trials, found)
    for (model, name), value in changes(found.point, setup.task.space.default).items():
        application = next(item for item in document["applications"] if item.get("name") == model)
        _set(application, name, value, notes[model, name])
    out = StringIO()
    yaml.dump(document, out)
    return out.getvalue()


def field_notes(setup: Setup, trials: Sequence[Trial], found: Verdict) -> Mapping[tuple[str, str], str]:
    """Returns a comment for each changed field: the factor that it is estimated to bring beside the other changes, and
    how many starts had its value."""
    space = setup.task.space
    own = changes(found.point, space.default)
    if not own:
        return {}
    gains = field_gains(space, known_of(setup.task.objective, trials), found.point)
    return {
        key: f"tuned: about {gains[key] - 1:+.0%} {setup.task.objective.kind}, from {_starts(trials, key, value)}"
        for key, value in own.items()
    }


def _starts(trials: Sequence[Trial], key: tuple[str, str], value: Any) -> str:
    count = sum(dict(trial.point).get(key) == value for trial in trials)
    return f"{count} start" if count == 1 else f"{count} starts"


def _set(application: Any, name: str, value: Any, note: str) -> None:
    """Sets a field of an application, or removes it."""
    group, key = _group(application, name)
    if value is None:
        group.pop(key, None)
        return
    group[key] = value
    group.yaml_add_eol_comment(f"# {note}", key)


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
