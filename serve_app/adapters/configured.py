"""Says which adapters an application of Serve names, and which part of its `args` a change of them leaves alone. It is
pure."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from serve_app.adapters.clashes import clashes, names_of_model
from serve_app.adapters.records import Adapters, Records
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


def clashes_of(applications: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a line for each name of an adapter that another adapter, model or alias has, with both places. The
    applications are by name, as a config file has them."""
    models = {name: item for name, item in applications.items() if item.get("import_path") == MODEL_PATH}
    named = [names_of_model(name, map(str, named_adapters(item))) for name, item in sorted(models.items())]
    return clashes(named, _aliases(applications))


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
