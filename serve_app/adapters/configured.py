"""Says which adapters an application of Serve names, and which part of its `args` a change of them leaves alone. It is
pure."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from serve_app.adapters.clashes import clash_line, clashes, names_of_model
from serve_app.adapters.records import Adapters, Found, Records
from serve_app.model_fields import LiveFields

MODEL_PATH, ROUTER_PATH = "serve_app.app:model", "serve_app.app:router"


def lasting_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `args` of a model without the fields that change while its replicas run."""
    return {name: value for name, value in args.items() if name not in LiveFields.model_fields}


def lasting_version(args: Mapping[str, Any], runtime_env: Mapping[str, Any]) -> str:
    """Returns the version of a model with adapters, which stays while only its adapters change."""
    content = json.dumps([lasting_args(args), runtime_env], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def named_adapters(application: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the adapters of a model as its application in a config file names them: those of `user_config` if it has
    the field, and otherwise those of `args`. What is no mapping counts as none."""
    for place in (_user_config(application), application.get("args")):
        if isinstance(place, Mapping) and "adapters" in place:
            found = place["adapters"]
            return found if isinstance(found, Mapping) else {}
    return {}


def watched_folder_of(application: Mapping[str, Any]) -> str | None:
    """Returns the folder that a model watches for adapters as its config writes it, or None if it watches none."""
    args = application.get("args")
    folder = args.get("adapters_folder") if isinstance(args, Mapping) else None
    return folder if isinstance(folder, str) else None


def clashes_of(applications: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a line for each name of an adapter that another adapter, model or alias has, with both places. The
    applications are by name, as a config file has them."""
    models = {name: item for name, item in applications.items() if item.get("import_path") == MODEL_PATH}
    named = [names_of_model(name, map(str, named_adapters(item))) for name, item in sorted(models.items())]
    return clashes(named, _aliases(applications))


def brought_clashes(
    name: str, applications: Mapping[str, Mapping[str, Any]], records: Records, found: Found
) -> list[str]:
    """Returns a line for each name that the deployment of one application brings and that another application has, with
    both places. So a clash stops only the deployment that causes it.

    An adapter that a replica has, by `records`, or that was `found` ready in a folder, keeps its name. One that a
    config names and that no replica has yet keeps it against models whose name comes later, unless it has failed.
    """
    own, others = applications.get(name, {}), {other: item for other, item in applications.items() if other != name}
    held, failed = (_with_state(records, found, states) for states in ({"ready", "leaving"}, {"failed"}))
    taken: dict[str, str] = {}
    for other in others:
        for adapter in sorted(held.get(other, ())):
            names = names_of_model(other, [adapter]).keys() - {other}
            taken |= dict.fromkeys(names, f"the adapter {adapter} that {other} serves")
    if own.get("import_path") == ROUTER_PATH:
        return [
            clash_line(alias, where, taken[alias]) for alias, where in _aliases({name: own}).items() if alias in taken
        ]
    lines = [clash_line(name, f"the model {name}", taken[name])] if name in taken else []
    for other, item in sorted(others.items()):
        if item.get("import_path") == MODEL_PATH:
            named = set(map(str, named_adapters(item))) if other < name else set()
            taken = names_of_model(other, sorted(named - failed.get(other, set()))) | taken
    taken = _aliases(others) | taken
    for adapter in sorted(set(map(str, named_adapters(own))) - held.get(name, set())):
        if adapter == name:
            lines.append(clash_line(adapter, f"adapters.{adapter} of {name}", f"the model {name}"))
        for spelling, where in names_of_model(name, [adapter]).items():
            if spelling != name and spelling in taken:
                lines.append(clash_line(spelling, where, taken[spelling]))
    return lines


def _with_state(records: Records, found: Found, states: Collection[str]) -> dict[str, set[str]]:
    """Returns the adapters with one of these states in some replica, or when they were found, by application."""
    told = [(application, adapters) for (application, _), adapters in records.items()]
    told += [(application, last.adapters) for application, last in found.items()]
    by_model: dict[str, set[str]] = {}
    for application, adapters in told:
        of_model = by_model.setdefault(application, set())
        of_model |= {adapter for adapter, state in adapters.items() if state.state in states}
    return by_model


def adapter_names(applications: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Returns the names of all adapters, in both spellings."""
    models = {name: item for name, item in applications.items() if item.get("import_path") == MODEL_PATH}
    return {
        spelling
        for name, item in models.items()
        for spelling in names_of_model(name, map(str, named_adapters(item))).keys() - {name}
    }


def taken_names(
    applications: Mapping[str, Mapping[str, Any]], but: str, records: Records | None = None, is_named: bool = True
) -> dict[str, str]:
    """Returns the names that an adapter of the model `but` may not have, each with the place of who has it.

    Those are models, aliases, and adapters of other models. Of two adapters that configs name, the one of the model
    whose name comes first stays. One that comes from a watched folder (`is_named` is false) gives way to all that
    configs name, and to those that other models' folders had before it, which `records` tell.
    """
    found: dict[str, str] = {}
    for name, item in sorted(applications.items()):
        if item.get("import_path") != MODEL_PATH or name == but:
            continue
        named = set(map(str, named_adapters(item)))
        found |= _in_folder(name, (records or {}).items(), named, comes_first=not is_named and name < but)
        found |= names_of_model(name, sorted(named) if name < but or not is_named else ())
    return _aliases(applications) | found


def _in_folder(
    model: str, records: Iterable[tuple[tuple[str, str], Adapters]], named: Collection[str], comes_first: bool
) -> dict[str, str]:
    """Returns the names of a model's adapters that no config names and that a replica has, or is about to have if the
    model `comes_first`."""
    states = {"ready", "leaving", "loading"} if comes_first else {"ready", "leaving"}
    adapters = {
        adapter
        for (application, _), held in records
        if application == model
        for adapter, state in held.items()
        if adapter not in named and state.state in states
    }
    place = f"the adapter in the folder of {model}"
    return {spelling: place for adapter in sorted(adapters) for spelling in names_of_model(model, [adapter])} | (
        names_of_model(model, ())
    )


def _aliases(applications: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, item in applications.items():
        if item.get("import_path") != ROUTER_PATH:
            continue
        for place in (item.get("args"), _user_config(item)):
            aliases = place.get("aliases") if isinstance(place, Mapping) else None
            if isinstance(aliases, Mapping):
                found |= {str(alias): f"aliases.{alias} of {name}" for alias in aliases}
    return found


def _user_config(application: Mapping[str, Any]) -> Mapping[str, Any]:
    deployments = application.get("deployments")
    for item in deployments if isinstance(deployments, list | tuple) else ():
        if isinstance(item, Mapping) and isinstance(item.get("user_config"), Mapping):
            found: Mapping[str, Any] = item["user_config"]
            return found
    return {}
