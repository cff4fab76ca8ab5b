"""Counts the values of a request's body before it is decoded.

No other thread of Python runs while a body is decoded, so its values have a bound. numpy counts them, which lets other
threads run. With these bounds no step takes longer than some 20 ms, whatever the body's size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from serve_app.errors import InvalidRequest
from serve_app.wire.openai_errors import TOO_DEEP, require_shallow

# This bounds lists, objects and their keys. A long conversation has a few hundred. Building one takes 0.1 to 0.5 µs.
MOST_PARTS = 50_000
# This bounds numbers and texts in lists, such as token ids. Building one takes 0.02 µs, and checking it as long again.
MOST_ITEMS = 2**18
# A smaller body cannot hold enough to matter.
UNCOUNTED_BYTES = 2**16
CHUNK_BYTES = 2**20

QUOTE, BACKSLASH, COMMA, COLON, BRACKET, BRACE = b'"\\,:[{'


@dataclass(frozen=True)
class Census:
    """What a JSON text holds outside its strings. `parts` are lists, objects and keys, and `items` are commas."""

    parts: int
    items: int


def decode_body(body: bytes, counted: Callable[[], Census] | None = None) -> object:
    """Returns the decoded JSON. `counted` gives the body's census if that is known.

    Raises InvalidRequest if the body is not JSON or holds too many values. It takes time with a large body.
    """
    require_countable(body, counted=counted)
    try:
        return decode_counted(body)
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None


def decode_counted(text: bytes) -> object:
    """Returns the JSON of a text that was counted. Raises ValueError if it is not JSON or is nested too deep."""
    try:
        document = msgspec.json.decode(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    require_shallow(document, text)
    return document


def require_countable(
    body: bytes,
    most_parts: int = MOST_PARTS,
    what: str = "The body",
    param: str | None = None,
    counted: Callable[[], Census] | None = None,
) -> None:
    """Raises InvalidRequest for a JSON text with more parts or items than may be built. `what` names the text, and
    `counted` gives its census if that is known."""
    if len(body) <= UNCOUNTED_BYTES:
        return
    found = census(body) if counted is None else counted()
    if found.parts > most_parts or found.items > MOST_ITEMS:
        raise InvalidRequest(
            f"{what} has {found.parts} lists, objects and keys, and {found.items} values in lists, but at most "
            f"{most_parts} and {MOST_ITEMS} are allowed. Send several requests.",
            param=param,
        )


def census(body: bytes) -> Census:
    """Counts without decoding, a chunk at a time. The result means nothing if the text is not JSON."""
    octets = np.frombuffer(body, np.uint8)
    parts = items = 0
    in_string = escaped = False
    for start in range(0, len(octets), CHUNK_BYTES):
        chunk = octets[start : start + CHUNK_BYTES]
        quotes = chunk == QUOTE
        skipped, escaped = _escaped(chunk, escaped)
        quotes[skipped] = False
        # The count is odd after an opening quote and even after a closing one. An overflow of the byte keeps that.
        inside = (np.cumsum(quotes, dtype=np.uint8) + np.uint8(in_string)) & 1
        outside = inside == 0
        parts += int(np.count_nonzero(outside & ((chunk == COLON) | (chunk == BRACKET) | (chunk == BRACE))))
        items += int(np.count_nonzero(outside & (chunk == COMMA)))
        in_string = bool(inside[-1])
    return Census(parts, items)


def _escaped(chunk: np.ndarray, first: bool) -> tuple[np.ndarray, bool]:
    """Returns the places in `chunk` after an odd number of backslashes, and whether the place after the chunk is one.

    `first` says whether the chunk's first place is one.
    """
    at = np.flatnonzero(chunk == BACKSLASH)
    if first and at.size and at[0] == 0:
        at = at[1:]  # This backslash is escaped itself.
    if not at.size:
        return np.array([0] if first and chunk.size else [], dtype=np.intp), False
    begins = np.flatnonzero(np.diff(at, prepend=-2) != 1)
    lengths = np.diff(begins, append=at.size)
    behind = at[begins + lengths - 1][lengths % 2 == 1] + 1
    return (np.append(behind[behind < chunk.size], 0) if first else behind[behind < chunk.size]), bool(
        behind.size and behind[-1] == chunk.size
    )
