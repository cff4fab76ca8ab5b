"""What a request uses of its key's tokens: guessed before it runs, and told by the engine when it has.

An engine tells what a stream used only where it is asked to. For a key with a limit of tokens it always is, and a
client that did not ask does not see the answer. A stream without a usage all the same, such as one that its client
left, is counted by its events, nearly all of which have a token or more.
"""

import re
from typing import Any

import msgspec

from serve_app.wire.body import Peek, is_true, with_fields

# Bytes of a token on the average, for an estimate before the request; English is at four to five.
BYTES_PER_TOKEN = 4

# The bytes at the end of a response in which its usage is looked for.
TAIL_BYTES = 2048

# Text that a model or a client wrote cannot look like these: inside a JSON string the quotes are escaped.
TOTAL_TOKENS = re.compile(rb'"total_tokens"\s*:\s*(\d{1,12})')
# pt writes it into every event before the last, as OpenAI does, where usage is asked for.
NO_USAGE_YET = b', "usage": null}'

# Endpoints whose streams tell their usage only on demand, in an event of its own without choices.
ON_DEMAND = frozenset({"/v1/chat/completions", "/v1/completions"})


class _Event(msgspec.Struct):
    choices: list[msgspec.Raw] | None = None
    usage: Any = None


_EVENT = msgspec.json.Decoder(_Event)


def estimate_tokens(body_bytes: int, max_tokens: int | None = None, answers: int = 1) -> int:
    """Tokens that a request may take, before it runs: its body's length in tokens, and what its answers may have."""
    return body_bytes // BYTES_PER_TOKEN + max(0, max_tokens or 0) * answers


def total_tokens(tail: bytes) -> int | None:
    """The last `total_tokens` in the end of a response. None where there is none."""
    found = TOTAL_TOKENS.findall(tail)
    return int(found[-1]) if found else None


def asking(path: str, seen: Peek, body: bytes) -> bytes | None:
    """The body, asking for the stream's usage; None where it does so itself, or cannot. `path` is the endpoint's.

    Raises InvalidRequest for a body that is no JSON object.
    """
    options = seen.stream_options
    if path not in ON_DEMAND or not is_true(seen.stream) or not isinstance(options, dict | None):
        return None
    options = dict(options or {})
    if is_true(options.get("include_usage")):
        return None
    # vLLM tells usage in every event where both are set, and here the client gets none.
    options.pop("continuous_usage_stats", None)
    return with_fields(body, stream_options={**options, "include_usage": True})


def without_usage(events: bytes) -> bytes:
    """Whole events, without the one that has nothing but usage."""
    if b'"usage"' not in events:
        return events
    blocks = events.replace(NO_USAGE_YET, b"}").split(b"\n\n")
    return b"\n\n".join(block for block in blocks if not _is_usage(block))


def _is_usage(block: bytes) -> bool:
    if b'"usage"' not in block or not block.startswith(b"data:"):
        return False
    try:
        event = _EVENT.decode(block[5:])
    except msgspec.DecodeError:
        return False
    return event.choices == [] and event.usage is not None


class UsageMeter:
    """Looks at an answer on its way to a client whose key has a limit of tokens.

    `prompt_tokens` is a guess. `is_hidden`: the client did not ask for the usage.
    """

    def __init__(self, prompt_tokens: int = 0, is_hidden: bool = False):
        self._prompt_tokens = prompt_tokens
        self._is_hidden = is_hidden
        self._tail = b""
        self._events = 0
        self._half = b""

    def feed(self, piece: bytes) -> bytes:
        """Takes the next piece of the body. Returns what the client gets of it."""
        self._tail = (self._tail + piece[-TAIL_BYTES:])[-TAIL_BYTES:]
        self._events += piece.count(b"data: {")
        if not self._is_hidden:
            return piece
        whole, end, self._half = (self._half + piece).rpartition(b"\n\n")
        return without_usage(whole + end)

    def rest(self) -> bytes:
        """What came after the last whole event, at the end."""
        half, self._half = self._half, b""
        return half

    def total_tokens(self, estimate: int = 0) -> int | None:
        """What the engine said; else the count of events, if it is more than was estimated; else None."""
        told = total_tokens(self._tail)
        counted = self._prompt_tokens + self._events
        return told if told is not None else counted if self._events and counted > estimate else None


def metered(path: str, seen: Peek, body: bytes) -> tuple[bytes, UsageMeter]:
    """The body to send on, and what looks at its answer. Raises InvalidRequest."""
    asked = asking(path, seen, body)
    return (body if asked is None else asked), UsageMeter(estimate_tokens(len(body)), asked is not None)
