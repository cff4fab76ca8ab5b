"""`serve-app check` says whether the file is right and whether the cluster could hold each model."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from serve_app.access.keys import ENVIRONMENT, FILE_VARIABLE
from serve_app.access.origin import is_loopback
from serve_app.adapters.configured import adapter_names, clashes_of
from serve_app.cli.adapter_notes import adapter_findings
from serve_app.cli.cluster import connected
from serve_app.cli.engine_args import doubtful_engine_args, wrong_engine_args
from serve_app.cli.plan.pools import amounts, long_waits
from serve_app.config import ModelConfig
from serve_app.deploy.node_env import node_environments, this_environment
from serve_app.deploy.resolve_model import RequestOf, requests_of, require_all_replicas, resolve_model
from serve_app.deploy.serve_env import NAMES, NodeEnvironment, file_environment, lacking
from serve_app.errors import ConfigError, PlacementError, ServeAppError, nearest
from serve_app.facts.inventory import Inventory, as_empty, local_inventory, ray_inventory
from serve_app.facts.nodes import Node, ray_nodes
from serve_app.facts.serve_file import ApplicationSpec, read_applications
from serve_app.field_errors import field_errors
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.pool import PoolPlan
from serve_app.planning.resolve import fix_lines
from serve_app.planning.resource_demand import Demand
from serve_app.residency.pools import plan_file, pool_problems

# If no cluster runs, the environment against which a file is checked has this name.
HERE = "this environment"
# The builders that an application may name, and the deployment of each.
BUILDERS = {"serve_app.app:model": "Model", "serve_app.app:router": "Router"}


def check(file: Path, address: str | None) -> int:
    """Prints a line for each model. Returns 1 if one cannot be placed or an adapter cannot be served, else 0. Raises
    ConfigError for a wrong file."""
    applications = read_applications(file)
    require_valid(applications)
    require_serves_schema(file)
    document = yaml.safe_load(file.read_text())
    nodes, inventory, environments, where = _cluster(address)
    is_here = HERE in environments
    print(f"{where}: {'; '.join(map(str, nodes))}")
    for note in (*unset_host(document), *unset_variables(document), *missing_settings(document, environments)):
        print(f"note: {note}")
    for note in (*open_access(document, applications, os.environ if is_here else None), *dangling_names(applications)):
        print(f"note: {note}")
    adapters = adapter_findings(applications, is_here)
    for note in (*doubtful_engine_args(applications), *adapters.notes):
        print(f"note: {note}")
    for note in () if is_here else unheard_keys(document, os.environ):
        print(f"note: {note}")
    models = [application for application in applications if application.is_model]
    request_of = requests_of([application.model_settings() for application in models], inventory)
    pools = _in_pools(models, inventory, request_of)
    for note in long_waits(pools.plans, applications):
        print(f"note: {note}")
    placed = [_report(application, nodes, inventory, request_of, pools) for application in models]
    for line in adapters.errors:
        print(f"NO  {line}")
    return 0 if all(placed) and not adapters.errors else 1


def require_valid(applications: Sequence[ApplicationSpec]) -> None:
    """Raises one ConfigError that lists the mistakes of all applications."""
    problems = []
    configs: dict[str, ModelConfig] = {}
    for application in applications:
        try:
            if application.is_model:
                configs[application.name] = application.model_settings()
            elif application.is_router:
                application.router_settings()
        except ConfigError as error:
            start = f"{application.name}: "
            problems += [f"{start}{line.removeprefix(start)}" for line in str(error).splitlines()]
        problems += [f"{application.name}: {line}" for line in wrong_engine_args(application)]
    problems += pool_problems(configs)
    problems += clashes_of({application.name: application.model_dump() for application in applications})
    if problems:
        raise ConfigError("\n".join(problems))


def open_access(
    document: Mapping[str, Any], applications: Sequence[ApplicationSpec], own: Mapping[str, str] | None
) -> list[str]:
    """Returns a note on a file that would be refused at the start, because others could reach the server and nothing in
    the file names API keys.

    `own` is the environment that Serve would be started with, or None for a cluster that runs already, which does not
    get that of this process. This is only a note, because the environment in which the cluster's nodes started may name
    keys.
    """
    host = (document.get("http_options") or {}).get("host") or "127.0.0.1"
    environment = file_environment(document).keys() | (own or {}).keys()
    is_meant = any(item.is_router and item.router_settings().allow_open_access for item in applications)
    if is_loopback(str(host)) or is_meant or {FILE_VARIABLE, ENVIRONMENT} & environment:
        return []
    nobody = "nothing in this file" if own is None else "neither this file nor this environment"
    return [
        f"http_options.host is {host}, and {nobody} names API keys. Models will not start unless the environment of "
        f"Ray's nodes names keys. Set {FILE_VARIABLE} under controller_options.runtime_env.env_vars, or set "
        "allow_open_access: true under 'args' of the router if everyone who reaches the server may use it."
    ]


def unheard_keys(document: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """Returns notes on API keys that this environment names and that a cluster that runs already does not get."""
    return [
        f"{name} of this environment does not reach the cluster, which runs already. Set it where Ray starts on "
        "each node, or under controller_options.runtime_env.env_vars of the file."
        for name in (FILE_VARIABLE, ENVIRONMENT)
        if name in environment and name not in file_environment(document)
    ]


def dangling_names(applications: Sequence[ApplicationSpec]) -> list[str]:
    """Returns notes on names in the router's config that do not lead to a model of the file."""
    models = {application.name for application in applications if not application.is_router}
    adapters = adapter_names({application.name: application.model_dump() for application in applications})
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
            if name not in models | config.aliases.keys() | adapters:
                notes.append(f"{application.name}: {field}: this file has no model named '{name}'.")
        for alias in config.aliases.keys() & models:
            notes.append(f"{application.name}: aliases.{alias}: the alias hides the model of that name.")
    return notes


def unset_host(document: Mapping[str, Any]) -> list[str]:
    """Returns a note on a file that leaves the address open, because Serve's default differs from ours."""
    if (document.get("http_options") or {}).get("host"):
        return []
    return [
        "http_options.host is not set: `serve-app run` listens on 127.0.0.1, but `serve run` and `serve deploy` listen "
        "on 0.0.0.0, where a router without API keys does not start."
    ]


def unset_variables(document: Mapping[str, Any]) -> list[str]:
    """Returns notes on variables in the file's `env_vars` that Ray would expand to nothing."""
    values = " ".join(file_environment(document).values())
    unset = sorted({name for name in re.findall(r"\$\{(\w+)\}", values) if name not in os.environ})
    return [
        f"the file uses ${{{name}}}, which is not set here. Activate the environment that sets it before `serve run`"
        + ("; `serve-app run` sets it." if name == "VIRTUAL_ENV" else ".")
        for name in unset
    ]


def missing_settings(document: Mapping[str, Any], environments: Mapping[str, NodeEnvironment]) -> list[str]:
    """Returns a note on Serve's settings that neither the file nor the environment of some node has.

    Without them, Serve would run without HAProxy or without our limits. `serve-app run` sets them.
    """
    missing = {where: lacking(document, node.variables) for where, node in environments.items()}
    without = sorted(where for where, names in missing.items() if names)
    if not without:
        return []
    names = [name for name in NAMES if any(name in missing[where] for where in without)]
    told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [
        f"neither the file nor {', '.join(without)} sets {told}. `serve-app run` sets them. For `serve run` and "
        '`serve deploy`, run eval "$(serve-app node-env)" before you start Ray.'
    ]


def require_serves_schema(file: Path) -> None:
    """Raises ConfigError for what Ray Serve itself refuses: unknown keys, and a name or a route that is repeated."""
    from ray.serve.schema import ServeDeploySchema

    require_known_keys(file)
    document = yaml.safe_load(file.read_text())
    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        lines = field_errors(error.errors(), document)
        raise ConfigError("\n".join(f"{file}: Ray Serve refuses this file: {line}" for line in lines)) from None
    except (AttributeError, ImportError, ValueError, TypeError) as error:  # A policy cannot be imported.
        raise ConfigError(f"{file}: Ray Serve refuses this file: {error}") from None


def require_known_keys(file: Path) -> None:
    """Raises ConfigError for keys that Ray Serve would ignore silently. It imports nothing that the file names, which
    Serve's own schema does for policies."""
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    document = yaml.safe_load(file.read_text())
    problems = unknown_keys(document, ServeDeploySchema.model_fields, ServeApplicationSchema.model_fields)
    problems += wrong_http_options(document, HTTPOptionsSchema.model_fields)
    problems += unknown_options(document, set(DeploymentSchema.model_fields), set(AutoscalingConfig.model_fields))
    if problems:
        raise ConfigError("\n".join(f"{file}: {problem}" for problem in problems))


def wrong_http_options(document: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """Returns a line for each option that Serve would ignore silently, and for a port that is none."""
    options = document.get("http_options") or {}
    if not isinstance(options, Mapping):
        return []  # Serve's own schema refuses it.
    problems = [f"http_options: unknown key '{key}'.{nearest(key, known)}" for key in options if key not in known]
    port = options.get("port", 8000)
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
        problems.append(f"http_options.port: {port!r} is not a port. Write a number from 1 to 65535.")
    return problems


def unknown_keys(document: dict[str, Any], top: Iterable[str], application: Iterable[str]) -> list[str]:
    """Returns what Serve would ignore silently: keys and deployments that do not exist, and a wrong builder. Each
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
    """Returns the options under `deployments` that Serve would ignore silently. Each option has a line."""
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


def unplaced(
    applications: Sequence[ApplicationSpec], nodes: Sequence[Node], inventory: Inventory
) -> dict[str, ServeAppError]:
    """Returns why the nodes could not hold these models, by name, for those that they could not hold. Each is judged
    alone."""
    request_of = requests_of([application.model_settings() for application in applications], inventory)
    pools = _in_pools(applications, inventory, request_of)
    found = {}
    for application in applications:
        try:
            pools.require_place(application.name)
            _demand_of(application, nodes, inventory, request_of)
        except ServeAppError as error:
            found[application.name] = error
    return found


@dataclass(frozen=True)
class _Pools:
    """These are the models of a file that swap, by name: what they take of their pools, or why they have no place."""

    takes: Mapping[str, str]
    problems: Mapping[str, str]
    plans: Sequence[PoolPlan]

    def require_place(self, name: str) -> None:
        """Raises PlacementError if a model swaps and has no place in its pool. Other models have one here."""
        if name in self.problems:
            raise PlacementError(self.problems[name])


def _in_pools(applications: Sequence[ApplicationSpec], inventory: Inventory, request_of: RequestOf) -> _Pools:
    """Plans the models that swap beside those that hold their GPUs all the time, on devices as if they were empty,
    because what runs there now may be what is about to be replaced."""
    configs = {item.name: (item.model_settings(), item.least_replicas) for item in applications}
    if not any(config.swaps for config, _ in configs.values()):
        return _Pools({}, {}, ())
    requests: list[ModelRequest] = []
    unread: dict[str, str] = {}
    for name, (config, count) in configs.items():
        if config.swaps is None and config.device == "cpu":
            continue
        try:
            requests.append(replace(request_of(config, inventory), name=name, replicas=count))
        except ConfigError as error:
            unread |= {name: str(error)} if config.swaps is not None else {}
    plan = plan_file(requests, as_empty(inventory))
    problems = {
        problem.model: "\n".join([problem.message, *fix_lines(problem.fixes)])
        for problem in plan.problems
        if configs[problem.model][0].swaps is not None
    }
    takes = {
        model.model.name: f"{amounts(model.leases[0])} of the pool '{pool.name}' while it is resident"
        for pool in plan.pools
        for model in pool.models
    }
    return _Pools(takes, unread | problems, plan.pools)


def _report(
    application: ApplicationSpec,
    nodes: Sequence[Node],
    inventory: Inventory,
    request_of: RequestOf,
    pools: _Pools,
) -> bool:
    count = application.least_replicas
    try:
        pools.require_place(application.name)
        demand = _demand_of(application, nodes, inventory, request_of)
    except ServeAppError as error:
        print(f"NO  {application.name}: {error}")
        return False
    takes = "a replica takes" if count == 1 else f"each of {count} replicas takes"
    in_pool = f", and {pools.takes[application.name]}" if application.name in pools.takes else ""
    print(f"ok  {application.name}: {takes} {demand}{in_pool}")
    return True


def _demand_of(
    application: ApplicationSpec, nodes: Sequence[Node], inventory: Inventory, request_of: RequestOf
) -> Demand:
    """Returns what each replica of a model asks of Ray. Raises ServeAppError if the nodes could not hold those with
    which it starts."""
    resolved = resolve_model(application.model_settings(), nodes, inventory, request_of=request_of)
    require_all_replicas(resolved.config, application.least_replicas, resolved.demand, nodes, inventory, request_of)
    return resolved.demand


def _cluster(address: str | None) -> tuple[list[Node], Inventory, dict[str, NodeEnvironment], str]:
    """Returns the nodes, devices and environments against which a file is checked, and a name for the place that has
    them."""
    with connected(address) as where:
        if where is None:
            here = local_inventory()
            nodes = [Node("this machine", os.cpu_count() or 1, len(here.gpus))]
            return nodes, here, {HERE: this_environment()}, "no Ray cluster runs here"
        from ray.exceptions import RayError

        try:
            return ray_nodes(), ray_inventory(), node_environments(), f"the Ray cluster at {where}"
        except RayError as error:
            raise ConfigError(f"a node of the cluster did not report its GPUs and environment: {error}") from None
