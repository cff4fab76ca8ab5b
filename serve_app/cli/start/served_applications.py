"""Reads the applications that Serve reports, as in `ServeInstanceDetails`."""

from collections.abc import Mapping
from typing import Any


def living(applications: Mapping[str, Any]) -> set[str]:
    """Returns the names of the applications of `ServeInstanceDetails` that Serve does not delete."""
    status = {name: getattr(item["status"], "value", item["status"]) for name, item in applications.items()}
    return {name for name, value in status.items() if value != "DELETING"}


def same_application(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether Serve takes two configs of an application for the same. Serve reports a config with the fields
    that were set, in the types of its schema."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeApplicationSchema

    try:
        first, second = (
            ServeApplicationSchema.model_validate(dict(item)).model_dump(mode="json", exclude_unset=True)
            for item in (one, other)
        )
    except (ValidationError, ValueError):  # A policy may be none that this program can import.
        return False
    return bool(first == second)
