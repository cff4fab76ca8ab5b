"""Describes what a field of a foreign file may hold, and says in words what was found instead."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from serve_app.errors import ConfigError

# A message shows this many characters of a text, and this many items of a list.
MOST_SHOWN_TEXT = 60
MOST_SHOWN_ITEMS = 4


@dataclass(frozen=True)
class FieldKind:
    """This is a rule for a value. `problem` returns what is needed instead of the value, or an empty text if it may
    stay."""

    problem: Callable[[Any], str]


def whole(least: int, most: int) -> FieldKind:
    """Returns the rule for a whole number from `least` to `most`. True and false are no numbers here."""

    def problem(value: Any) -> str:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            return f"a whole number of at least {least} is needed"
        return f"a whole number of at most {most} is needed" if value > most else ""

    return FieldKind(problem)


def is_whole(value: Any, least: int, most: int) -> bool:
    """Returns whether a value is a whole number from `least` to `most`."""
    return not whole(least, most).problem(value)


def number(above: float, most: float) -> FieldKind:
    """Returns the rule for a finite number above `above` and at most `most`."""

    def problem(value: Any) -> str:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and abs(value) <= most and isfinite(value) and value > above:
            return ""
        return f"a number above {above:g} and of at most {most:g} is needed"

    return FieldKind(problem)


def text(most: int) -> FieldKind:
    """Returns the rule for a printable text of 1 to `most` characters. Lone surrogates are not printable."""

    def problem(value: Any) -> str:
        is_text = isinstance(value, str) and 0 < len(value) <= most and value.isprintable()
        return "" if is_text else f"a printable text of 1 to {most} characters is needed"

    return FieldKind(problem)


def one_of(known: Collection[str]) -> FieldKind:
    """Returns the rule for one of these texts."""
    needed = f"one of {', '.join(sorted(known))} is needed"
    return FieldKind(lambda value: "" if isinstance(value, str) and value in known else needed)


def list_of(kind: FieldKind, most: int) -> FieldKind:
    """Returns the rule for a list of at most `most` items of one kind. The items are looked at only if there are not
    more."""

    def problem(value: Any) -> str:
        if not isinstance(value, (list, tuple)):
            return "a list is needed"
        if len(value) > most:
            return f"a list of at most {most} items is needed"
        wrong = next(((index, item) for index, item in enumerate(value) if kind.problem(item)), None)
        return "" if wrong is None else f"item {wrong[0]} is {shown(wrong[1])}, where {kind.problem(wrong[1])}"

    return FieldKind(problem)


FLAG = FieldKind(lambda value: "" if isinstance(value, bool) else "true or false is needed")
OBJECT = FieldKind(lambda value: "" if isinstance(value, Mapping) else "an object is needed")


def check_fields(fields: Mapping[str, Any], kinds: Mapping[str, FieldKind], where: str, inside: str = "") -> None:
    """Raises ConfigError for the first field that is not of its kind. A field that is missing or null is left alone.

    `where` names the file, and `inside` is the path of the object in it, such as "text_config.".
    """
    for name, kind in kinds.items():
        value = fields.get(name)
        if value is not None and (needed := kind.problem(value)):
            raise ConfigError(f"{where}: {inside}{name} is {shown(value)}; {needed}.")


def shown(value: Any) -> str:
    """Returns a value as a message shows it, with its JSON type: `"4096" (text)`. It is short whatever the value is."""
    if isinstance(value, str):
        cut = " …" if len(value) > MOST_SHOWN_TEXT else ""
        return f"{json.dumps(value[:MOST_SHOWN_TEXT])}{cut} (text)"
    if isinstance(value, (list, tuple)):
        items = [_scalar(item) for item in value[:MOST_SHOWN_ITEMS]] + ["…"] * (len(value) > MOST_SHOWN_ITEMS)
        return f"[{', '.join(items)}] (a list)"
    if isinstance(value, Mapping):
        return f"an object with {len(value)} field{'' if len(value) == 1 else 's'}"
    return f"{_scalar(value)} ({'true or false' if isinstance(value, bool) else 'a number'})"


def _scalar(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{…}"
    if isinstance(value, (list, tuple)):
        return "[…]"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"{'-' if value < 0 else ''}2^{value.bit_length() - 1} or more"
    if isinstance(value, (str, int, float)) or value is None:
        return json.dumps(value[:MOST_SHOWN_TEXT] if isinstance(value, str) else value)
    return type(value).__name__
