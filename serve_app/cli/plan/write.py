"""`serve-app plan --write` copies the config file, with its comments, and adds what the plan chose."""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from serve_app.cli.output_file import write_file
from serve_app.errors import ConfigError
from serve_app.model_fields import AUTO_QUANTIZATION
from serve_app.planning.plan import Fix, Plan
from serve_app.planning.resolve import pinned

# These fixes are no lines of `args`: they change the machine or the number of replicas.
NOT_ARGS = frozenset({"gpus", "num_replicas"})


def write_plan(made: Plan, source: Path, target: Path) -> None:
    """Writes `target`. Raises ConfigError if the plan does not fit or the file cannot be written."""
    if not made.fits:
        raise ConfigError("plan: nothing was written, because not everything fits.")
    if source.resolve() == target.resolve():
        raise ConfigError(f"plan: --write {target} would overwrite the file that was read. Name another file.")
    try:
        text = source.read_text()
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}.") from None
    write_file(target, pinned_text(made, text))


def pinned_text(made: Plan, text: str) -> str:
    """Returns the config file with the chosen fields in each model's `args`."""
    yaml = round_trip()
    document = yaml.load(text)
    # Replicas share one config, so the replica with the least room decides for all of them.
    roomiest_first = sorted(made.models, key=lambda model: -model.ranks[0].kv_cache.bytes)
    chosen = {model.name: pinned(model) for model in roomiest_first}
    methods = {model.name: model.config.quantization for model in roomiest_first}
    seen: set[int] = set()
    for application in document["applications"]:
        if application.get("name") in chosen:
            arguments: Any = application.setdefault("args", CommentedMap())
            if id(arguments) in seen:  # For a YAML alias, what is chosen for one model must not change another's.
                arguments = application["args"] = CommentedMap(arguments)
            seen.add(id(arguments))
            for field, value in chosen[application["name"]].items():
                arguments[field] = value
            if arguments.get("quantization") == AUTO_QUANTIZATION:
                arguments["quantization"] = methods[application["name"]]  # None keeps the weights whole.
    return dumped(yaml, document)


def fixed_text(fixes: Sequence[Fix], text: str) -> str | None:
    """Returns the config file with these fixes in the `args` of their models, or None if one of them is no line of
    `args`, such as another card."""
    yaml = round_trip()
    document = yaml.load(text)
    by_name = {application.get("name"): application for application in document["applications"]}
    if not all(fix.model in by_name and not NOT_ARGS & {change.field for change in fix.changes} for fix in fixes):
        return None
    for fix in fixes:
        application = by_name[fix.model]
        arguments = application["args"] = CommentedMap(
            application.get("args") or {}
        )  # Another may have an alias of it.
        for change in fix.changes:
            *path, field = change.field.split(".")
            place: Any = arguments
            for part in path:
                place[part] = place = CommentedMap(place.get(part) or {})
            if change.value is None:
                place.pop(field, None)
            else:
                place[field] = change.value
    return dumped(yaml, document)


def round_trip() -> YAML:
    """Returns what reads and writes a config file with its comments."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1000
    return yaml


def dumped(yaml: YAML, document: Any) -> str:
    """Returns the text of a document."""
    out = StringIO()
    yaml.dump(document, out)
    return out.getvalue()
