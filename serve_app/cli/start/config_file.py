"""Reads the config file that is to be served, at the start and again while it is served."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from serve_app.cli.check import require_valid
from serve_app.errors import ConfigError
from serve_app.facts.serve_file import ApplicationSpec, read_applications


def read_config(file: Path, http_options: Mapping[str, Any]) -> tuple[Sequence[ApplicationSpec], dict[str, Any]]:
    """Returns the applications of a file and the document for Serve, in which `http_options` replace those of the file.
    Raises ConfigError with all mistakes that are found without Ray."""
    applications = read_applications(file)
    require_valid(applications)
    document: dict[str, Any] = yaml.safe_load(file.read_text())
    document["http_options"] = _http_options(document, http_options)
    return applications, document


def _http_options(document: Mapping[str, Any], instead: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the file's options, with an address that only this machine reaches if the file names none.

    Serve's own default is 0.0.0.0 in a file, and 127.0.0.1 in a program. Raises ConfigError for an invalid port.
    """
    given = document.get("http_options") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"http_options: expected a mapping such as {{host: 127.0.0.1, port: 8000}}, got {given!r}.")
    options = {"host": "127.0.0.1", "port": 8000, **given, **instead}
    if not isinstance(options["port"], int) or isinstance(options["port"], bool) or not 0 < options["port"] < 65536:
        raise ConfigError(f"http_options.port: {options['port']!r} is not a port. Write a number from 1 to 65535.")
    return options
