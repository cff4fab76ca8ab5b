"""Checks the items of a request to the Responses API one by one, before vLLM reads them all at once. It is pure.

vLLM's type of an item is a union of thirty types. pydantic lists the errors of every type for every wrong item, and
vLLM writes them all into a text: a thousand wrong items take half a gigabyte and seconds of the event loop. So each
item is tried alone, with one element of each of its lists at a time, and the first wrong one is refused.
"""

from collections.abc import Callable, Iterator
from typing import Any

from serve_app.errors import InvalidRequest

# No object of an item has more fields. Each element of a list costs a copy of them.
MOST_FIELDS = 64


def require_known_items(items: list[Any], is_known: Callable[[Any], bool]) -> None:
    """Raises InvalidRequest, which names the place, for the first item that vLLM does not know. It takes 0.1 ms for
    each element of a list, so an event loop must not call this."""
    for index, item in enumerate(items):
        if not isinstance(item, dict) or _most_fields(item) > MOST_FIELDS or not all(map(is_known, slices(item))):
            kind = item.get("type") or item.get("role") if isinstance(item, dict) else type(item).__name__
            raise InvalidRequest(
                f"'input[{index}]': vLLM knows no item of this form ('{str(kind)[:64]}'). Check its type, its role and "
                "the parts of its content.",
                param="input",
            )


def _most_fields(value: Any) -> int:
    """Returns the most fields that an object within the value has."""
    found, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            found = max(found, len(one))
            left += one.values()
        elif isinstance(one, list):
            left += one
    return found


def slices(value: Any) -> Iterator[Any]:
    """Yields the value with at most one element in each of its lists, as often as it takes for each to be there."""
    if isinstance(value, list):
        if not value:
            yield []
        for element in value:
            for part in slices(element):
                yield [part]
    elif isinstance(value, dict):
        parts = {name: slices(field) for name, field in value.items()}
        first = {name: next(each) for name, each in parts.items()}
        yield first
        for name, each in parts.items():
            for part in each:
                yield {**first, name: part}
    else:
        yield value
