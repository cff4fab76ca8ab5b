"""Says in our words what pydantic finds wrong in a file: the field, what was expected, and what was found."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from serve_app.errors import nearest

# A message shows this many characters of a value.
MOST_SHOWN = 60

# Other programs call these values so. They are called this here.
_FOREIGN_VALUES = {
    "gpu": "cuda", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32",
}  # fmt: skip
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


def field_errors(errors: Iterable[Any], given: object, kind: type[BaseModel] | None = None) -> list[str]:
    """Returns a line for each field that is wrong. `errors` are those of `ValidationError.errors()`, and `given` is
    what was validated. `kind` is the model that validated it, whose parts have the names that may be written there.

    Where a field may be of several types, pydantic has an error for each of them, which become one line here. A field
    has no line of its own if a part of it has one: pydantic then says of a list that it is too short, for example.
    """
    lines: list[str] = []
    choices: dict[str, list[Any]] = {}
    for error in errors:
        where = _place(error["loc"], given, is_missing=error["type"] == "missing")
        if error["type"] == "missing":
            lines.append(f"missing field '{where}'.")
        elif error["type"] == "extra_forbidden":
            *path, name = error["loc"]
            lines.append(_unknown(str(name), _place(path, given, is_missing=False), _names_at(kind, path)))
        elif error["type"] == "value_error":
            text = str(error["ctx"]["error"])
            lines.append(text if not where or text.startswith(where) else f"{where}: {text}")
        else:
            choices.setdefault(where, []).append(error)
    wrong = [where for where in choices if not any(other.startswith(f"{where}.") for other in choices)]
    return lines + [_line(where, choices[where]) for where in wrong]


def _place(path: Sequence[int | str], given: object, is_missing: bool) -> str:
    """Returns the path of a field. pydantic puts the names of types into it, which are no keys of what was given. The
    last part of the path of a missing field is its name."""
    parts, value = [], given
    for number, part in enumerate(path):
        is_item = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if is_item or (isinstance(value, Mapping) and part in value):
            value = value[part]  # type: ignore[index]  # It is a list with a number or a mapping.
        elif not is_missing or number < len(path) - 1:
            continue  # It is the name of a type.
        parts.append(str(part))
    return ".".join(parts)


def _unknown(name: str, where: str, known: Sequence[str]) -> str:
    """Returns the line of a field that the model at a place does not have. `known` are those that it has, or nothing if
    they are not known."""
    label = f"{where}: " if where else ""
    listed = f" Known fields: {', '.join(known)}." if known else ""
    return f"{label}unknown field '{name}'.{nearest(name, known) or listed}"


def _names_at(kind: object, path: Sequence[int | str]) -> list[str]:
    """Returns the fields of the model at a path below another model, or nothing where no model is found. Parts of the
    path that are keys, numbers or names of types lead no deeper."""
    for part in path:
        found = next((each for each in _models(kind) if part in each.model_fields), None)
        kind = kind if found is None else found.model_fields[str(part)].annotation
    return [name for each in _models(kind) for name in each.model_fields]


def _models(kind: object) -> list[type[BaseModel]]:
    """Returns the models in a type, such as that of a field that may be a list of them or None."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [model for each in get_args(kind) for model in _models(each)]


def _line(where: str, errors: Sequence[Any]) -> str:
    expected = " or ".join(dict.fromkeys(map(_expected, errors)))
    found = errors[0]["input"]
    text = repr(found)
    text = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"
    known = [name.strip(" '") for error in errors for name in _names(error)]
    hint = _meant(found, known) if isinstance(found, str) else ""
    label = f"{where}: " if where else ""
    if errors[0]["loc"][-1:] == ("[key]",):
        label += "as a name, "
    return f"{label}expected {expected}, got {text}.{hint}"


def _meant(found: str, known: Sequence[str]) -> str:
    """Returns the question whether one of these names was meant, or an empty text if none is near."""
    meant = _FOREIGN_VALUES.get(found.lower())
    return f" Did you mean '{meant}'?" if meant in known else nearest(found, known)


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
