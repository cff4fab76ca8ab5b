"""Reads the file of a run again, and says what deploying it will do."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from serve_app.cli.changes import AT_START_ONLY, changes, for_all, not_applied
from serve_app.cli.check import require_serves_schema
from serve_app.cli.start.config_file import read_config
from serve_app.cli.start.served_applications import living, same_application

if TYPE_CHECKING:  # The runner uses this module.
    from serve_app.cli.start.runner import Start


def read_again(start: "Start") -> "Start":
    """Returns what the file says now. Raises ConfigError with all its mistakes."""
    applications, document = read_config(start.file, start.http_options)
    require_serves_schema(start.file)
    return replace(start, applications=applications, document=document, text=start.file.read_text())


def with_started_options(start: "Start", own: "Start") -> "Start":
    """Returns what was deployed, with the options that Serve reads at its start alone as those of the run's `own` file,
    because they go on as they were."""
    others = {name: value for name, value in start.document.items() if name not in AT_START_ONLY}
    kept = {name: own.document[name] for name in AT_START_ONLY if name in own.document}
    return replace(start, document={**others, **kept})


def as_served(start: "Start", applications: Mapping[str, Any]) -> "Start":
    """Returns a start with the applications as Serve runs them, which others may have deployed since. `applications`
    are those of `ServeInstanceDetails`. What Serve runs as the file said stays as it was written there."""
    written = {item["name"]: item for item in start.document["applications"]}
    logging = start.document.get("logging_config")
    served = []
    for name in sorted(living(applications)):
        config = applications[name].get("deployed_app_config") or {"name": name}
        own = written.get(name)
        if own is not None and same_application({"logging_config": logging, **own} if logging else own, config):
            config = own
        served.append(config)
    return replace(start, document={**start.document, "applications": served})


def ended_by(start: "Start", own: "Start", applications: Mapping[str, Any]) -> list[str]:
    """Returns the names of the applications that deploying `start` would end and that the run's `own` file did not
    have. Serve ends those alone that were deployed by a config file."""
    others = living(applications) - set(start.names) - set(own.names)
    source = {name: applications[name].get("source") for name in others}
    return sorted(name for name in others if getattr(source[name], "value", source[name]) != "imperative")


def effects(before: "Start", after: "Start") -> list[str]:
    """Returns a line for each application that deploying the file changes, and for options that need another start."""
    lines = [
        f"{change.name} {change.kind}" + (f" ({', '.join(change.why)})" if change.why else "")
        for change in changes(before.document, after.document)
        if change.kind != "stays as it is"
    ]
    lines += [
        f"{name} differs, which counts from the next start on" for name in not_applied(before.document, after.document)
    ]
    return lines + [
        f"{name} differs and counts for every application" for name in for_all(before.document, after.document)
    ]
