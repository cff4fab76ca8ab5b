"""Finds what a request uses of its key's tokens. It is guessed before the request runs and reported by the engine
later.

An engine reports what a stream used only if it is asked to. For a key with a limit of tokens it always is, and a client
that did not ask does not see the report. A stream that still has no usage, such as one that its client left, is counted
by its events, and any other answer without a usage by its length.
"""

import re
from typing import Any

import msgspec

from serve_app.wire.body import Peek, RequestBody, is_true

# An average token has this many bytes, for an estimate before the request. English has four to five.
BYTES_PER_TOKEN = 4

# Text that a model or a client wrote cannot look like these, because quotes are escaped inside a JSON string. Only the
# arguments of a tool in Anthropic's form, and the schemas that a response repeats, are JSON of their own.
_COUNT = re.compile(
    rb'"(prompt|completion|total|input|output|cache_read_input|cache_creation_input)_tokens"\s{0,8}:\s{0,8}(\d{1,12})'
)
_COUNT_END = b'_tokens"'
# A count has at most this many bytes before and after the beginning of _COUNT_END, and at most the third in total.
_BEFORE, _BEHIND, _KEPT = 21, 40, 64
# The names of the Messages and Responses APIs. In the first one, what a cache had is not part of the input.
_ALSO = {b"prompt": (b"input", b"cache_read_input", b"cache_creation_input"), b"completion": (b"output",)}
# If usage is asked for, pt writes this into every event before the last, as OpenAI does. Some writers leave blanks.
_NO_USAGE_YET = re.compile(rb',\s?"usage":\s?null\}')
# A stream of events begins with one of these, and JSON does not.
_STREAM = (b"data:", b"event:", b"id:", b"retry:", b":")

# A stream with an event that begins like one of these has failed. Nothing that a model or a client wrote can look like
# them, because JSON escapes the end of a line.
_FAILURES = (
    b"\nevent: error\n", b"\nevent: response.failed\n", b'\ndata: {"error":', b'\ndata: {"object":"error"',
    b'\ndata: {"type":"error"', b'\ndata: {"type":"response.failed"',
)  # fmt: skip
_MOST_FAILURE = max(map(len, _FAILURES))

# Streams of these endpoints report their usage only on demand, in an event of its own without choices.
ON_DEMAND = frozenset({"/v1/chat/completions", "/v1/completions"})


class _Event(msgspec.Struct):
    choices: list[msgspec.Raw] | None = None
    usage: Any = None


_EVENT = msgspec.json.Decoder(_Event)


def estimate_tokens(body_bytes: int, max_tokens: int | None = None, answers: int = 1) -> int:
    """Returns the tokens that a request may take: its body's length in tokens, and what its answers may have."""
    return body_bytes // BYTES_PER_TOKEN + max(0, max_tokens or 0) * answers


def asking(path: str, seen: Peek, body: RequestBody) -> RequestBody | None:
    """Returns the body with a demand for the stream's usage, or None if it has one or cannot. `path` is the endpoint's.

    Raises InvalidRequest for a body that is not a JSON object.
    """
    options = seen.stream_options
    if path not in ON_DEMAND or not is_true(seen.stream) or not isinstance(options, dict | None):
        return None
    options = dict(options or {})
    if is_true(options.get("include_usage")):
        return None
    # vLLM reports usage in every event if both are set, and here the client gets none.
    options.pop("continuous_usage_stats", None)
    return body.with_fields(stream_options={**options, "include_usage": True})


def without_usage(events: bytes) -> bytes:
    """Returns whole events without the one that has nothing but usage."""
    if b'"usage"' not in events:
        return events
    blocks = _NO_USAGE_YET.sub(b"}", events).split(b"\n\n")
    return b"\n\n".join(block for block in blocks if not _is_usage(block))


def _is_usage(block: bytes) -> bool:
    if b'"usage"' not in block or not block.startswith(b"data:"):
        return False
    try:
        event = _EVENT.decode(block[5:])
    except msgspec.DecodeError:
        return False
    return event.choices == [] and event.usage is not None


class Usage:
    """Reads what an answer says of its tokens, wherever that is, since engines put long fields after it.

    It looks at each byte once and keeps few. `total` is the largest figure, because some answers repeat what the client
    wrote, which must not make them cheaper. The last one counts for the other two, which are for the metrics. Where an
    engine reports no total, it is the largest input and the largest output together, once there is an output.
    """

    def __init__(self) -> None:
        self._said_total: int | None = None
        self._last: dict[bytes, int] = {}
        self._most_input = self._most_output = 0
        self._end = b""

    @property
    def prompt(self) -> int:
        """Returns the tokens of the prompt."""
        return _sum(self._last, b"prompt")

    @property
    def completion(self) -> int:
        """Returns the tokens of the answer."""
        return _sum(self._last, b"completion")

    @property
    def total(self) -> int | None:
        """Returns the tokens of both, or None if the answer has not said it."""
        if not self._most_output:  # The first event of a stream of messages has the input alone.
            return self._said_total
        return max(self._said_total or 0, self._most_input + self._most_output)

    def feed(self, piece: bytes) -> None:
        """Takes the next piece of the answer."""
        text = self._end + piece
        at = text.find(_COUNT_END)
        while at >= 0:
            if found := _COUNT.search(text, max(0, at - _BEFORE), at + _BEHIND):
                self._said(found[1], int(found[2]))
            at = text.find(_COUNT_END, at + 1)
        self._end = text[-_KEPT:]

    def _said(self, name: bytes, count: int) -> None:
        if name == b"total":
            self._said_total = max(self._said_total or 0, count)
        else:
            self._last[name] = count
            # A later event may name less input and more of a cache, which are written in this order.
            self._most_input = max(self._most_input, sum(self._last.get(key, 0) for key in _ALSO[b"prompt"]))
            self._most_output = max(self._most_output, self._last.get(b"output", 0))


def _sum(counts: dict[bytes, int], name: bytes) -> int:
    return sum(counts.get(key, 0) for key in (name, *_ALSO[name]))


class UsageMeter:
    """Meters an answer on its way to its client.

    `prompt_tokens` is a guess. `is_hidden` means that the client did not ask for the usage.
    """

    def __init__(self, prompt_tokens: int = 0, is_hidden: bool = False):
        self.usage = Usage()
        self._prompt_tokens = prompt_tokens
        self._is_hidden = is_hidden
        self._is_stream = self._has_ended = self._has_failed = False
        self._line = b"\n"  # This is the end of what has come.
        self._bytes = 0
        self._events = 0
        self._half = bytearray()

    @property
    def is_stream(self) -> bool:
        """Returns whether the answer is a stream of events, as far as it has come."""
        return self._is_stream

    @property
    def events(self) -> int:
        """Returns the events of a stream so far, nearly every one of which has a token or more. It is 0 for another
        answer."""
        return self._events if self._is_stream else 0

    def feed(self, piece: bytes) -> bytes:
        """Takes the next piece of the body, and returns what the client gets of it."""
        self.usage.feed(piece)
        if not self._bytes:
            self._is_stream = piece.startswith(_STREAM)
        self._bytes += len(piece)
        self._events += piece.count(b"data: {")
        if self._is_stream:
            recent = self._line + piece
            self._has_failed = self._has_failed or any(beginning in recent for beginning in _FAILURES)
            self._line = recent[-_MOST_FAILURE:]
        return self._shown(piece) if self._is_hidden else piece

    def rest(self) -> bytes:
        """Returns what came after the last whole event when the answer has ended."""
        self._has_ended = True
        half = bytes(self._half)
        self._half.clear()
        return half

    def total_tokens(self, estimate: int = 0) -> int | None:
        """Returns what the engine said, or else what the answer shows if that is more than the estimate, or else None.

        Nearly every event of a stream has a token or more. Other answers are counted by their length, as prompts are.
        An answer that was cut or has failed may have said only what its client wrote, so it costs no less than it
        shows.
        """
        shown = self._events if self._is_stream else self._bytes // BYTES_PER_TOKEN
        counted, said = self._prompt_tokens + shown, self.usage.total
        is_whole = self._has_ended and not self._has_failed
        if said is not None and (is_whole or said >= counted):
            return said
        return counted if shown and counted > estimate else None

    def _shown(self, piece: bytes) -> bytes:
        """Returns whole events without those that are hidden. The end of an event may be cut itself."""
        unsearched = max(0, len(self._half) - 1)
        self._half += piece
        end = self._half.rfind(b"\n\n", unsearched) + 2
        if end < 2:
            return b""
        whole = bytes(self._half[:end])
        del self._half[:end]
        return without_usage(whole)


def metered(path: str, seen: Peek, body: RequestBody) -> tuple[RequestBody, UsageMeter]:
    """Returns the body to send on, and the meter of its answer. Raises InvalidRequest."""
    asked = asking(path, seen, body)
    return (body if asked is None else asked), UsageMeter(estimate_tokens(len(body.content)), asked is not None)
