"""`serve-app check` says whether the file is right and whether the cluster could hold each model."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from serve_app.access.keys import ENVIRONMENT, FILE_VARIABLE
from serve_app.access.origin import is_loopback
from serve_app.cli.cluster import connected
from serve_app.config import ModelConfig
from serve_app.deploy.resolve_model import resolve_model
from serve_app.errors import ConfigError, ServeAppError, nearest
from serve_app.facts.inventory import Inventory, local_inventory, ray_inventory
from serve_app.facts.nodes import Node, ray_nodes
from serve_app.facts.serve_file import ApplicationSpec, read_applications

# What an application may name, and its deployment.
BUILDERS = {"serve_app.app:model": "Model", "serve_app.app:router": "Router"}


def check(file: Path, address: str | None) -> int:
    """Prints one line per model. Returns 0, or 1 when a model cannot be placed. Raises ConfigError for a wrong file."""
    applications = read_applications(file)
    require_valid(applications)
    require_serves_schema(file)
    nodes, inventory, where = _cluster(address)
    print(f"{where}: {'; '.join(map(str, nodes))}")
    for name in _unset_variables(file):
        print(f"note: the file uses ${{{name}}}, which is not set here. Activate the environment before `serve run`.")
    for note in (*open_access(file, applications), *dangling_names(applications)):
        print(f"note: {note}")
    placed = [_report(application, nodes, inventory) for application in applications if application.is_model]
    return 0 if all(placed) else 1


def require_valid(applications: Sequence[ApplicationSpec]) -> None:
    """Raises one ConfigError with the mistakes of all applications."""
    problems = []
    for application in applications:
        try:
            if application.is_model:
                ModelConfig.from_args(application.args)
            elif application.is_router:
                application.router_settings()
        except ConfigError as error:
            problems += [f"{application.name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ConfigError("\n".join(problems))


def open_access(file: Path, applications: Sequence[ApplicationSpec]) -> list[str]:
    """Returns a note on a file that would be refused at the start, because others could reach the server and nothing in
    the file names API keys.

    It is no mistake yet: the environment in which the cluster's nodes started may name them.
    """
    document = yaml.safe_load(file.read_text())
    host = (document.get("http_options") or {}).get("host") or "127.0.0.1"
    environment = _environment(document).keys() | os.environ.keys()
    is_meant = any(item.is_router and item.router_settings().allow_open_access for item in applications)
    if is_loopback(str(host)) or is_meant or {FILE_VARIABLE, ENVIRONMENT} & environment:
        return []
    return [
        f"http_options.host is {host}, and neither this file nor this environment names API keys. Models will not "
        f"start unless the environment of Ray's nodes names some. Set {FILE_VARIABLE} under "
        "controller_options.runtime_env."
        "env_vars, or allow_open_access: true under 'args' of the router, if everyone who reaches it may use it."
    ]


def dangling_names(applications: Sequence[ApplicationSpec]) -> list[str]:
    """Returns notes on names in the router's config that lead to no model of the file."""
    models = {application.name for application in applications if not application.is_router}
    notes = []
    for application in applications:
        if not application.is_router:
            continue
        config = application.router_settings()
        named = [(f"aliases.{alias}", name) for alias, name in config.aliases.items()]
        for name, others in config.fallbacks.items():
            named += [(f"fallbacks.{name}", other) for other in [name, *others]]
        if config.default_model is not None:
            named.append(("default_model", config.default_model))
        for field, name in named:
            if name not in models | config.aliases.keys():
                notes.append(f"{application.name}: {field}: this file has no model called '{name}'.")
        for alias in config.aliases.keys() & models:
            notes.append(f"{application.name}: aliases.{alias}: hides the model of that name.")
    return notes


def _unset_variables(file: Path) -> list[str]:
    """Returns the variables in the file's `env_vars` that Ray would expand to nothing."""
    values = " ".join(map(str, _environment(yaml.safe_load(file.read_text())).values()))
    return sorted({name for name in re.findall(r"\$\{(\w+)\}", values) if name not in os.environ})


def _environment(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the variables that the file sets for all of Serve."""
    environment = (document.get("controller_options") or {}).get("runtime_env") or {}
    variables: dict[str, Any] = environment.get("env_vars") or {}
    return variables


def require_serves_schema(file: Path) -> None:
    """Raises ConfigError for what Ray Serve itself refuses: unknown keys, a name or a route that is there twice."""
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    document = yaml.safe_load(file.read_text())
    problems = unknown_keys(document, ServeDeploySchema.model_fields, ServeApplicationSchema.model_fields)
    problems += unknown_options(document, set(DeploymentSchema.model_fields), set(AutoscalingConfig.model_fields))
    if problems:
        raise ConfigError("\n".join(f"{file}: {problem}" for problem in problems))
    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"{file}: Ray Serve refuses it: {'; '.join(lines)}") from None
    except (AttributeError, ImportError, ValueError, TypeError) as error:  # A policy that cannot be imported.
        raise ConfigError(f"{file}: Ray Serve refuses it: {error}") from None


def unknown_keys(document: dict[str, Any], top: Iterable[str], application: Iterable[str]) -> list[str]:
    """Returns what Serve would drop in silence: keys and deployments that do not exist, and a wrong builder. Each
    has a line."""
    problems = [f"unknown key '{key}'.{nearest(key, top)}" for key in document if key not in top]
    for item in document["applications"]:
        name = item.get("name")
        problems += [
            f"{name}: unknown key '{key}'.{nearest(key, application)}" for key in item if key not in application
        ]
        path = str(item.get("import_path"))
        if not path.startswith("serve_app."):
            continue
        if path not in BUILDERS:
            problems.append(f"{name}: import_path '{path}' does not exist.{nearest(path, BUILDERS)}")
            continue
        for deployment in item.get("deployments") or []:
            if deployment.get("name") != BUILDERS[path]:
                problems.append(f"{name}: deployments: '{deployment.get('name')}' must be '{BUILDERS[path]}'.")
            if "ray_actor_options" in deployment and BUILDERS[path] == "Model":
                problems.append(
                    f"{name}: ray_actor_options would replace the GPUs and the environment that serve-app "
                    "sets. Leave it out."
                )
    return problems


def unknown_options(document: dict[str, Any], deployment: set[str], scaling: set[str]) -> list[str]:
    """Returns what Serve would drop in silence under `deployments`. Each option has a line."""
    problems = []
    for item in document["applications"]:
        for number, options in enumerate(item.get("deployments") or ()):
            place = f"{item.get('name')}: deployments[{number}]"
            asked = options.get("autoscaling_config")
            parts = [(place, options, deployment)]
            parts += [(f"{place}.autoscaling_config", asked, scaling)] if isinstance(asked, dict) else []
            for where, given, known in parts:
                unknown = sorted(set(given) - known)
                problems += [f"{where}: unknown key '{key}'.{nearest(key, known)}" for key in unknown]
    return problems


def _report(application: ApplicationSpec, nodes: Sequence[Node], inventory: Inventory) -> bool:
    try:
        demand = resolve_model(application.model_settings(), nodes, inventory).demand
    except ServeAppError as error:
        print(f"NO  {application.name}: {error}")
        return False
    print(f"ok  {application.name}: a replica takes {demand}")
    return True


def _cluster(address: str | None) -> tuple[list[Node], Inventory, str]:
    """Returns the nodes and devices by which models are judged, and a name for the place that has them."""
    with connected(address) as where:
        if where is None:
            here = local_inventory()
            return [Node("this machine", os.cpu_count() or 1, len(here.gpus))], here, "no Ray cluster runs here"
        from ray.exceptions import RayError

        try:
            return ray_nodes(), ray_inventory(), f"the Ray cluster at {where}"
        except RayError as error:
            raise ConfigError(f"a node of the cluster did not report its GPUs: {error}") from None
