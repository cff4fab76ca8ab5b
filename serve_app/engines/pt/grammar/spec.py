"""Describes what a client asks for as an output format, which is never larger than what can be compiled."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

from serve_app.errors import InvalidRequest

Kind = Literal["json_schema", "regex", "grammar"]

# The time of compiling grows faster than these sizes, and beyond them it takes seconds.
MOST_BYTES = {"json_schema": 65_536, "regex": 8192, "grammar": 8192}


@dataclass(frozen=True)
class GrammarSpec:
    """This is a JSON schema as JSON, a regular expression, or an EBNF grammar. `param` is its field.

    Making one raises InvalidRequest if it is too large or not text.
    """

    kind: Kind
    source: str
    param: str

    def __post_init__(self) -> None:
        _require_small(len(self.source), self.kind, self.param)  # Each character has at least one byte.
        try:
            size = len(self.source.encode())
        except UnicodeEncodeError:
            raise InvalidRequest(f"'{self.param}' has half a surrogate pair in it.", param=self.param) from None
        _require_small(size, self.kind, self.param)

    @classmethod
    def of_schema(cls, schema: object, param: str) -> Self:
        """Returns the format of a decoded JSON schema."""
        require_small_schema(schema, param)
        return cls("json_schema", json.dumps(schema), param)

    @classmethod
    def of_choices(cls, choices: Iterable[str], param: str) -> Self:
        """Returns the EBNF grammar of exactly these texts."""
        choices = list(choices)
        _require_small(sum(map(len, choices)), "grammar", param)
        source = "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
        return cls("grammar", source, param)


def require_small_schema(schema: object, param: str) -> None:
    """Raises InvalidRequest for a schema whose JSON is too large to be compiled.

    It is only counted until it is too much, because writing it would stop every thread of Python meanwhile.
    """
    size, left = 0, [schema]
    while left:
        value = left.pop()
        size += len(value) if isinstance(value, str) else 1
        if isinstance(value, dict | list):
            size += len(value)
            left += value if isinstance(value, list) else [*value, *value.values()]
        _require_small(size, "json_schema", param)


def _require_small(size: int, kind: Kind, param: str) -> None:
    if size > MOST_BYTES[kind]:
        raise InvalidRequest(
            f"'{param}' has {size} bytes or more, but a {kind.replace('_', ' ')} may have at most {MOST_BYTES[kind]}.",
            param=param,
        )
