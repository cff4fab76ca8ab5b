"""Says in our words what pydantic finds wrong in a file: the field, what was expected, and what was found."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from serve_app.errors import nearest

# A message shows this many characters of a value.
MOST_SHOWN = 60

# These are the words for pydantic's types of errors. Braces hold names of the error's context.
_EXPECTED = {
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "bool_parsing": "true or false",
    "string_type": "a text", "string_too_short": "a text of {min_length} or more characters",
    "list_type": "a list", "tuple_type": "a list", "too_short": "a list of {min_length} or more items",
    "dict_type": "a mapping", "model_type": "a mapping", "model_attributes_type": "a mapping",
    "mapping_type": "a mapping",
    "literal_error": "{expected}", "enum": "{expected}",
    "greater_than": "a number above {gt}", "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}", "less_than_equal": "a number of at most {le}",
}  # fmt: skip


def field_errors(errors: Iterable[Any], given: object) -> list[str]:
    """Returns a line for each field that is wrong. `errors` are those of `ValidationError.errors()`, and `given` is
    what was validated.

    Where a field may be of several types, pydantic has an error for each of them, which become one line here.
    """
    lines: list[str] = []
    choices: dict[str, list[Any]] = {}
    for error in errors:
        where = _place(error["loc"], given)
        if error["type"] == "missing":
            lines.append(f"missing field '{where}'.")
        elif error["type"] == "value_error":
            text = str(error["ctx"]["error"])
            lines.append(text if not where or text.startswith(where) else f"{where}: {text}")
        else:
            choices.setdefault(where, []).append(error)
    return lines + [_line(where, found) for where, found in choices.items()]


def _place(path: Sequence[int | str], given: object) -> str:
    """Returns the path of a field. pydantic puts the names of types into it, which are no keys of what was given."""
    parts, value = [], given
    for number, part in enumerate(path):
        is_item = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if is_item or (isinstance(value, Mapping) and part in value):
            value = value[part]  # type: ignore[index]  # It is a list with a number or a mapping.
        elif not isinstance(value, Mapping) or number < len(path) - 1 or "[" in str(part):
            continue  # It is the name of a type. The last part may be that of a field that is missing.
        parts.append(str(part))
    return ".".join(parts)


def _line(where: str, errors: Sequence[Any]) -> str:
    expected = " or ".join(dict.fromkeys(map(_expected, errors)))
    found = errors[0]["input"]
    text = repr(found)
    text = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"
    known = [name.strip(" '") for error in errors for name in _names(error)]
    hint = nearest(found, known) if isinstance(found, str) else ""
    label = f"{where}: " if where else ""
    if errors[0]["loc"][-1:] == ("[key]",):
        label += "as a name, "
    return f"{label}expected {expected}, got {text}.{hint}"


def _expected(error: Any) -> str:
    words = _EXPECTED.get(error["type"])
    if words is None:
        text = str(error["msg"]).removeprefix("Input should be ")
        return text[:1].lower() + text[1:]
    return words.format(**error.get("ctx", {}))


def _names(error: Any) -> list[str]:
    """Returns the names of which one was expected: "'pt', 'vllm' or 'auto'" has three."""
    if error["type"] != "literal_error":
        return []
    return [part for chunk in error["ctx"]["expected"].split(",") for part in chunk.split(" or ")]
