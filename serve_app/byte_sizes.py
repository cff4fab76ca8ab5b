"""Reads the sizes that a user writes: of memory, of each device's memory, and of vLLM's counts of tokens."""

import ast
import re
from collections.abc import Mapping
from typing import Literal

import yaml

from serve_app.errors import ConfigError

# Decimal and binary units as accelerate reads them. accelerate takes "gb" for gigaBITS; we refuse that spelling.
UNITS = {
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip

MaxMemoryKey = int | Literal["cpu", "disk"]


def parse_bytes(value: object, where: str) -> int:
    """Returns the bytes of a size such as "3GB" (10⁹) or "3GiB" (2³⁰).

    Raises ConfigError for a bare number, a negative size, bits ("gb") and unknown units, with the right spelling.
    """
    text = str(value).strip()
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or isinstance(value, bool):
        raise ConfigError(f"{where}: '{text}' is not a size. Write a number and a unit, such as 3GB or 3GiB.")
    number, unit = match.groups()
    if number.startswith("-"):
        raise ConfigError(f"{where}: '{text}' is negative. Write a size of zero or more, such as 3GB.")
    if not unit:
        raise ConfigError(f"{where}: '{text}' has no unit. Write {number}GB (10⁹ bytes) or {number}GiB (2³⁰ bytes).")
    if unit not in UNITS:
        by_lower = {known.lower(): known for known in UNITS} | {letter: f"{letter.upper()}B" for letter in "kmgt"}
        right = by_lower.get(unit.lower())
        hint = f"Write {number}{right}." if right else f"Known units: {', '.join(UNITS)}."
        raise ConfigError(f"{where}: unknown unit '{unit}' in '{text}'. {hint}")
    return int(float(number) * UNITS[unit])


def parse_max_memory(value: object) -> dict[MaxMemoryKey, int]:
    """Returns the bytes for each device: a GPU's index, "cpu" or "disk".

    It takes a mapping, or a string of one as in `swift deploy --max_memory '{0: "3GB", 1: "10GB"}'`.
    """
    mapping = _read_mapping(value) if isinstance(value, str) else value
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"max_memory: expected a mapping such as {{0: 3GB, 1: 10GB}}, got {value!r}.")
    if not mapping:
        raise ConfigError("max_memory is empty. Leave it out, or name a device, such as {0: 3GB}.")
    parsed: dict[MaxMemoryKey, int] = {}
    for key, size in mapping.items():
        device = _parse_device(key)
        if device in parsed:
            raise ConfigError(f"max_memory: device {device} is named twice.")
        parsed[device] = parse_bytes(size, f"max_memory[{device}]")
    return parsed


def _read_mapping(text: str) -> object:
    """Returns the value of a Python, JSON or YAML literal, or the text itself if it is none of them."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _parse_device(key: object) -> MaxMemoryKey:
    text = str(key).strip()
    if isinstance(key, bool) or not (match := re.fullmatch(r"(?:cuda:|gpu:)?(\d+)|(cpu|disk)", text)):
        raise ConfigError(f"max_memory: unknown device '{text}'. Use a GPU index (0, 1, …), cpu or disk.")
    index, tier = match.groups()
    return int(index) if index is not None else tier  # type: ignore[return-value]


def token_count(value: object) -> int:
    """Returns a number as vLLM reads it: 8192, "8k" (8000) or "8K" (8192). Raises ValueError."""
    factors = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", str(value))
    count = int(float(match[1]) * factors.get(match[2], 1)) if match else 0
    if count < 1:
        raise ValueError(f"{value!r} is not a number of tokens")
    return count
