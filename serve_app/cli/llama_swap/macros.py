"""Replaces the macros of a llama-swap config, such as ${models_dir}, by their values."""

import re
from collections.abc import Mapping
from typing import Any

from serve_app.errors import ConfigError

# llama-swap gives these their values while it runs. Nothing here needs them.
WHILE_IT_RUNS = frozenset({"PORT", "PID"})
# A value may grow to so many characters, and macros may stand in each other so deep.
MOST_SIGNS, MOST_DEPTH = 100_000, 16

_MACRO = re.compile(r"\$\{([A-Za-z0-9_.-]+)\}")


def expanded(text: str, macros: Mapping[str, Any], where: str) -> str:
    """Returns a text with its macros replaced. Those of the environment (`env.`) and of a running process stay.

    Raises ConfigError for a macro that is not defined, and for macros that stand in each other for ever.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        if name in WHILE_IT_RUNS or name.startswith("env."):
            return match[0]
        if name not in macros:
            raise ConfigError(f"{where}: the macro ${{{name}}} is not defined. Define it under 'macros'.")
        value = macros[name]
        return str(value).lower() if isinstance(value, bool) else str(value)

    for _ in range(MOST_DEPTH):
        new = _MACRO.sub(value_of, text)
        if new == text:
            return text
        if len(new) > MOST_SIGNS:
            raise ConfigError(f"{where}: its macros make it longer than {MOST_SIGNS} characters.")
        text = new
    raise ConfigError(f"{where}: its macros stand in each other more than {MOST_DEPTH} deep, or for ever.")


def environment_names(text: str) -> list[str]:
    """Returns the environment variables that a text names as ${env.NAME}."""
    return sorted({name.removeprefix("env.") for name in _MACRO.findall(text) if name.startswith("env.")})
