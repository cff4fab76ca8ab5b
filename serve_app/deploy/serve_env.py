"""Holds the settings that Ray Serve must find in its environment, with the reasons, in one place.

Serve reads them when its modules are imported, so they must be in the environment of its controller, its proxies and
its replicas before those start. There are three ways, and each takes the settings from here:

- `serve-app run` sets them for the Ray that it starts. If a Ray runs already, it passes the ones that the nodes lack
  as `controller_options` of the config.
- `serve-app node-env` prints them for `ray start`, so that `serve deploy` needs nothing in its file.
- A file for plain `serve run` repeats them under `controller_options`, as deploy_configs/prod.yaml does.

A value in the user's own file or environment wins.
"""

import re
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.errors import ConfigError
from serve_app.ray_serve import MIDDLEWARES_VARIABLE

HAPROXY_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
HAPROXY_COMMAND = "serve-app-haproxy"
# A file names the command in this way without knowing the machine, and Ray expands the variable.
HAPROXY_IN_FILES = f"${{VIRTUAL_ENV}}/bin/{HAPROXY_COMMAND}"


@dataclass(frozen=True)
class Setting:
    """This is one environment variable of Ray Serve. An empty value means that each machine has its own."""

    name: str
    value: str
    reason: str


SETTINGS = (
    Setting("RAY_SERVE_LOG_TO_STDERR", "0", "Serve's own lines stay in its log files"),
    Setting("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60", "a slow machine needs more than Serve's 5 s"),
    Setting(
        MIDDLEWARES_VARIABLE,
        "serve_app.access.door:middlewares",
        "API keys and limits hold in Serve's own proxies too",
    ),
    Setting("RAY_SERVE_ENABLE_HA_PROXY", "1", "HAProxy takes the requests, and no Python is in front of a replica"),
    Setting("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1", "replicas run on their main event loop and log in batches"),
    Setting(HAPROXY_BINARY, "", "this command becomes Ray's HAProxy and ends with Serve"),
    Setting("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "86400", "a stream may outlive a change of the routes by a day"),
    Setting(
        "RAY_SERVE_PORT_QUARANTINE_S",
        "3600",
        "a replica's port rests this long after its end, and otherwise those 86400 s",
    ),
    Setting(
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT",
        "32700",
        "ports from 30000 on allow 2700 starts of replicas for each node and hour",
    ),
    Setting(
        "RAY_SERVE_HAPROXY_MAXCONN", "16384", "so many connections may be open, with two files each; 4096 are too few"
    ),
    Setting(
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE", "65536", "headers may have up to 60 kB; at 16384 a header of 16 kB is a 400"
    ),
    Setting(
        "RAY_SERVE_HAPROXY_METRICS_ENABLED", "0", "Ray would parse a datagram for each request, but the router counts"
    ),
    Setting(
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
        "2",
        "streams are waited for anyway, and 30 would make Ctrl-C take 30 s",
    ),
)
NAMES = tuple(setting.name for setting in SETTINGS)


@dataclass(frozen=True)
class NodeEnvironment:
    """What a node reports: which of the settings Ray was started with there, and where its `serve-app-haproxy` is."""

    variables: Mapping[str, str]
    haproxy: str


def serve_environment(haproxy: str) -> dict[str, str]:
    """Returns all settings by name, with the path of `serve-app-haproxy`."""
    return {setting.name: setting.value or haproxy for setting in SETTINGS}


def haproxy_command() -> Path:
    """Returns the path of `serve-app-haproxy`, beside the interpreter or among the scripts of its installation.

    Raises ConfigError if it is in neither place.
    """
    folders = [Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))]
    folders += [Path(sysconfig.get_path("scripts", scheme)) for scheme in ("posix_user",)]
    for folder in folders:
        if (folder / HAPROXY_COMMAND).is_file():
            return folder / HAPROXY_COMMAND
    raise ConfigError(
        f"{HAPROXY_COMMAND} is not in {folders[0]}, where this Python is. Install serve-app again with this Python's "
        "pip, because a copied package has no commands."
    )


def file_environment(document: Mapping[str, Any]) -> dict[str, str]:
    """Returns the variables that a config file sets for all of Serve under `controller_options`."""
    runtime_env = (document.get("controller_options") or {}).get("runtime_env") or {}
    return {str(name): str(value) for name, value in (runtime_env.get("env_vars") or {}).items()}


def lacking(document: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """Returns the settings that neither the file nor this environment has."""
    return [name for name in NAMES if name not in file_environment(document) and name not in environment]


def overrides(document: Mapping[str, Any], environment: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Returns a sentence for each setting to which the user's file, or else the environment, gives another value."""
    notes = []
    in_file = file_environment(document)
    for name, value in ours.items():
        for where, given in (("the file", in_file), ("the environment", environment)):
            if name in given:
                if expanded(given[name], environment) != value:
                    notes.append(f"{where} sets {name}={given[name]}, which is used instead of {value}.")
                break
    return notes


def found_on_nodes(
    document: Mapping[str, Any], environment: Mapping[str, str], nodes: Mapping[str, NodeEnvironment]
) -> list[str]:
    """Returns what `overrides` does, for a cluster that runs already. The environments of its nodes count.
    `environment`, the one here, only expands the file's variables. Each value of the file and of some nodes has a
    sentence."""
    in_file = file_environment(document)
    here = {name: value for name, value in environment.items() if name not in NAMES}
    haproxy = next((node.haproxy for node in nodes.values() if node.haproxy), expanded(HAPROXY_IN_FILES, here))
    notes = overrides(document, here, serve_environment(haproxy))
    places: dict[tuple[str, str, str], list[str]] = {}
    for where, node in sorted(nodes.items()):
        for name, ours in serve_environment(node.haproxy).items():
            given = node.variables.get(name, ours)
            if name not in in_file and given != ours:
                places.setdefault((name, given, ours), []).append(where)
    for (name, given, ours), found in places.items():
        more = f" and {len(found) - 2} more nodes" if len(found) > 2 else ""
        notes.append(
            f"the environment of {', '.join(found[:2])}{more} sets {name}={given}, which is used instead of {ours}."
        )
    return notes


def expanded(value: str, environment: Mapping[str, str]) -> str:
    """Returns a value of `env_vars` with `${NAME}` replaced as Ray replaces it."""
    return re.sub(r"\$\{(\w+)\}", lambda found: environment.get(found[1], ""), value)


def for_cluster(document: Mapping[str, Any], nodes: Mapping[str, NodeEnvironment]) -> dict[str, str]:
    """Returns the settings that some node and the file both lack, so that Serve gets them with the config.

    A value that other nodes were started with is taken in the place of ours. Raises ConfigError where they cannot be
    the same for all nodes.
    """
    in_file = file_environment(document)
    missing = [
        name for name in NAMES if name not in in_file and any(name not in node.variables for node in nodes.values())
    ]
    paths = {node.variables.get(HAPROXY_BINARY) or node.haproxy for node in nodes.values()}
    if HAPROXY_BINARY in missing and (len(paths) > 1 or "" in paths):
        found = "; ".join(f"{name}: {node.haproxy or 'none'}" for name, node in sorted(nodes.items()))
        raise ConfigError(
            f"{HAPROXY_COMMAND} is not at the same path on all nodes ({found}), so the config cannot name its path. "
            'Install serve-app on every node, and run eval "$(serve-app node-env)" there before you start Ray.'
        )
    ours = serve_environment(next(iter(paths), ""))
    agreed = {name: _agreed(name, nodes) for name in missing}
    return {name: ours[name] if value is None else value for name, value in agreed.items()}


def _agreed(name: str, nodes: Mapping[str, NodeEnvironment]) -> str | None:
    """Returns the value of the nodes that have one, or None if none has. Raises ConfigError if they differ."""
    given = {where: node.variables[name] for where, node in nodes.items() if name in node.variables}
    values = {value: where for where, value in sorted(given.items(), reverse=True)}  # The first node of each value.
    if len(values) > 1:
        found = "; ".join(sorted(f"{where}: {value}" for value, where in values.items()))
        raise ConfigError(
            f"{name} differs between nodes ({found}), and another node has no value. Set it under "
            "controller_options.runtime_env.env_vars of the file, or start Ray with the same value on every node."
        )
    return next(iter(values), None)


def with_environment(document: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    """Returns the config with these variables under `controller_options`. Variables that are there already stay."""
    options = dict(document.get("controller_options") or {})
    runtime_env = dict(options.get("runtime_env") or {})
    env_vars = {**variables, **(runtime_env.get("env_vars") or {})}
    if not env_vars:
        return dict(document)
    return {**document, "controller_options": {**options, "runtime_env": {**runtime_env, "env_vars": env_vars}}}
