"""Says what `serve deploy` of another config file will do to each application that runs. It is pure.

Serve compares a version of each application: its import path, `args`, `runtime_env` and the policies under
`deployments:` (`ray_serve.code_version`). That of a model with adapters leaves its adapters out (`app.py`). Another
version replaces all replicas, some at a time. A few of the other options do so too, and the rest change in place.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serve_app.adapters.configured import MODEL_PATH, lasting_version
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.ray_serve import code_version

Kind = Literal["starts", "stops", "restarts", "changes in place", "stays as it is"]

# Options of a deployment that make Serve replace its replicas (DeploymentVersion.requires_actor_restart, Ray 2.60).
REPLACING = frozenset(
    {
        "ray_actor_options",
        "placement_group_bundles",
        "placement_group_strategy",
        "placement_group_bundle_label_selector",
        "placement_group_fallback_strategy",
        "max_replicas_per_node",
        "gang_scheduling_config",
    }
)
# Serve reads these options when it starts, and never again.
AT_START_ONLY = ("http_options", "grpc_options", "controller_options", "proxy_location")
# Top-level options that Serve applies to every application.
FOR_ALL = ("target_capacity", "logging_config")


@dataclass(frozen=True)
class Change:
    """A change says what happens to one application, and which fields cause it, each as `field: before → after`."""

    name: str
    kind: Kind
    why: tuple[str, ...] = ()


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Returns one change for each application of two documents that Serve's schema has accepted, sorted by name."""
    old, new = ({item["name"]: item for item in document["applications"]} for document in (before, after))
    return [_change(name, old.get(name), new.get(name)) for name in sorted({**old, **new})]


def not_applied(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Returns the top-level options that differ but that `serve deploy` leaves unchanged."""
    return [name for name in AT_START_ONLY if before.get(name) != after.get(name)]


def for_all(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Returns the top-level options that differ and that Serve applies to every application."""
    return [name for name in FOR_ALL if before.get(name) != after.get(name)]


def _change(name: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> Change:
    if old is None:
        return Change(name, "starts")
    if new is None:
        return Change(name, "stops")
    differences = list(_differences("", *_by_name(old, new)))
    why = tuple(f"{path}: {_short(a)} → {_short(b)}" for path, a, b in differences)
    if not differences:
        return Change(name, "stays as it is")
    versions = [_version(item) for item in (old, new)]
    options = {part for path, _, _ in differences if path.startswith("deployments.") for part in path.split(".")[2:3]}
    replaces = versions[0] != versions[1] or options & REPLACING
    return Change(name, "restarts" if replaces else "changes in place", why)


def _version(application: Mapping[str, Any]) -> str:
    """Returns what decides whether replicas are replaced. The version of a model with adapters does not follow
    them."""
    if application.get("import_path") != MODEL_PATH:
        return code_version(application)
    args: Mapping[str, Any] = application.get("args") or {}
    try:
        has_adapters = ModelConfig.from_args(args).has_adapters
    except ConfigError:  # It does not start, so nothing lasts.
        has_adapters = False
    if not has_adapters:
        return code_version(application)
    return "lasting " + lasting_version(args, application.get("runtime_env") or {})


def _by_name(*applications: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the applications with their deployments by name. A deployment without an entry has the code's options."""
    several = [{item["name"]: item for item in one.get("deployments") or []} for one in applications]
    names = {name for deployments in several for name in deployments}
    return [
        {**one, "deployments": {name: deployments.get(name, {"name": name}) for name in sorted(names)}}
        for one, deployments in zip(applications, several, strict=True)
    ]


def _differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields the fields that differ as (path, before, after). The value of a missing field is None."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(f"{path}.{key}" if path else str(key), old.get(key), new.get(key))
    elif old != new:
        yield path, old, new


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
