"""Makes what is to be deployed of a model that was planned beside what runs: never a file that would end what runs."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import yaml
from ruamel.yaml.error import YAMLError

from serve_app.cli.plan.write import dumped, round_trip
from serve_app.errors import ConfigError
from serve_app.facts.yaml_bounds import require_bounded

ADD = "# Add this to the applications of your file."
BLOCK = "What you download is one application. Add it to the applications of your file"
# Values of these keys may be secrets, so a file that has one is not shown.
SECRET = re.compile(r"env_vars|hf_token|.*(secret|password|api_?keys?)", re.IGNORECASE)
MODEL = "serve_app.app:model"


def to_deploy(text: str, served: tuple[str, str] | None, running: Collection[str]) -> tuple[str, str]:
    """Returns the file that is served, by its name and text, with the one model of the config file `text` in it, and a
    note. Where that file is not known, cannot be shown, or lacks one of the models that run, which would end then, it
    returns the model's application alone."""
    name, application = next(
        (item["name"], item) for item in round_trip().load(text)["applications"] if _is_model(item)
    )
    alone = f"{ADD}\n{dumped(round_trip(), [application])}"
    if served is None:
        return alone, f"{BLOCK}."
    file, content = served
    try:
        require_bounded(content, file)
        plain, document = yaml.safe_load(content), round_trip().load(content)
        names = {item["name"]: item for item in plain["applications"]}
    except (ConfigError, yaml.YAMLError, YAMLError, ValueError, KeyError, TypeError):
        return alone, f"{BLOCK}, {file}, of which a copy cannot be made here."
    if secret := next(_secrets(plain), None):
        return alone, f"{BLOCK}, {file}, which is not shown because its '{secret}' may hold secrets."
    if lost := sorted(set(running) - names.keys() - {name}):
        return alone, f"{BLOCK}. {file}, which `serve-app run` serves, does not have {', '.join(lost)}."
    if name in names and not _is_model(names[name]):
        return alone, f"{BLOCK}, and choose another name, because {file} has an application '{name}' already."
    if _takes_route(application, name, plain["applications"]):
        return alone, f"{BLOCK}, and choose another route_prefix, because an application of {file} has it already."
    if name not in names:
        document["applications"].append(application)
        return dumped(round_trip(), document), f"What you download is {file}, which runs now, with '{name}' added."
    own = next(item for item in document["applications"] if item["name"] == name)
    own["args"] = application["args"]
    return dumped(round_trip(), document), f"What you download is {file}, which runs now, with new args of '{name}'."


def _is_model(application: Mapping[str, Any]) -> bool:
    return application.get("import_path") == MODEL


def _takes_route(application: Mapping[str, Any], name: str, others: Collection[Mapping[str, Any]]) -> bool:
    route = application["route_prefix"]
    return any(item.get("route_prefix") == route and item["name"] != name for item in others)


def _secrets(value: Any) -> Iterator[str]:
    """Yields the keys of which the values may be secrets."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if inner and SECRET.fullmatch(str(key)):
                yield str(key)
            yield from _secrets(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _secrets(inner)
