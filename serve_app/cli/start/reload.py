"""Reads the file of a run again, and says what deploying it will do."""

from dataclasses import replace
from typing import TYPE_CHECKING

from serve_app.cli.changes import changes, for_all, not_applied
from serve_app.cli.check import require_serves_schema
from serve_app.cli.start.config_file import read_config

if TYPE_CHECKING:  # The runner uses this module.
    from serve_app.cli.start.runner import Start


def read_again(start: "Start") -> "Start":
    """Returns what the file says now. Raises ConfigError with all its mistakes."""
    applications, document = read_config(start.file, start.http_options)
    require_serves_schema(start.file)
    return replace(start, applications=applications, document=document)


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
