"""Refuses what no engine takes, before a model is woken for it. It is pure.

A model that shares memory pushes another one out when a request comes, and only then its engine reads the request. What
can be told without the engine is told here: the types and bounds in which both engines agree. An engine may still
refuse more, and does so in its own words.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from pydantic import TypeAdapter, ValidationError

from serve_app.errors import InvalidRequest
from serve_app.wire.body import RequestBody

GENERATING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"})
# A longer value is no number.
MOST_NUMBER_BYTES = 100
_NUMBER = TypeAdapter(float)


@dataclass(frozen=True)
class Bounds:
    """Says which numbers a field may have. With `is_open`, it may not have the lowest one itself."""

    lowest: float
    highest: float = float("inf")
    is_open: bool = False

    def __str__(self) -> str:
        """Returns the bounds in words."""
        above = f"above {self.lowest:g}" if self.is_open else f"at least {self.lowest:g}"
        return above if self.highest == float("inf") else f"{above} and at most {self.highest:g}"

    def hold(self, number: float) -> bool:
        """Returns whether a number is within them."""
        return self.lowest <= number <= self.highest and not (self.is_open and number == self.lowest)


# Both engines refuse other values, which `tests/contracts/test_vllm.py` checks.
NUMBERS: Mapping[str, Bounds] = {
    "temperature": Bounds(0, 2), "top_p": Bounds(0, 1, is_open=True), "min_p": Bounds(0, 1), "top_k": Bounds(-1),
    "presence_penalty": Bounds(-2, 2), "frequency_penalty": Bounds(-2, 2),
    "repetition_penalty": Bounds(0, is_open=True), "n": Bounds(1), "min_tokens": Bounds(0),
}  # fmt: skip
LISTS = ("messages", "tools")


def require_possible(path: str, body: RequestBody) -> None:
    """Raises InvalidRequest, which names the field, for a request that no engine would answer. A large body takes
    time, so an event loop must not call this."""
    if path not in GENERATING:
        return
    fields = body.fields
    for name, bounds in NUMBERS.items():
        if name in fields:
            _require_number(name, bytes(fields[name]), bounds)
    for name in LISTS:
        if name in fields and not bytes(fields[name]).lstrip().startswith((b"[", b"null")):
            raise InvalidRequest(f"'{name}' must be a list.", param=name)


def _require_number(name: str, text: bytes, bounds: Bounds) -> None:
    if text.strip() == b"null":
        return
    try:  # pydantic reads texts too, as in the engines.
        number = _NUMBER.validate_python(msgspec.json.decode(text)) if len(text) <= MOST_NUMBER_BYTES else None
    except (ValueError, ValidationError, RecursionError):
        number = None
    if number is None or not bounds.hold(number):
        shown = text[:MOST_NUMBER_BYTES].decode("utf-8", "replace")
        raise InvalidRequest(f"'{name}' must be a number, {bounds}, and not {shown}.", param=name)
