"""Writes the event that ends a stream by an error, in the form of each API, and reads such events. It is pure."""

import json
from collections.abc import Mapping
from typing import Any

from serve_app.errors import RequestError
from serve_app.wire.anthropic.errors import is_messages_path, messages_error, rewritten
from serve_app.wire.openai_errors import error_object
from serve_app.wire.responses.chat_request import PATH as RESPONSES
from serve_app.wire.sse import named_events

_NAME = b"\nevent: "


def error_event(path: str, error: RequestError, sequence_number: int = 0) -> bytes:
    """Returns the event for a stream of this path. A stream of the Responses API has sent `sequence_number` events."""
    if is_messages_path(path):
        return named_events([messages_error(error)])
    if path.endswith(RESPONSES):
        said = {"code": error.code or error.type, "message": error.message, "param": error.param}
        return named_events([{"type": "error", "sequence_number": sequence_number, **said}])
    return b"data: %s\n\n" % json.dumps(error_object(error)).encode()


class EventCount:
    """Counts the named events of a stream as its pieces pass, for the number of an error event that comes after
    them."""

    def __init__(self) -> None:
        self.count = 0
        self._end = b"\n"  # The name of an event begins a line.

    def feed(self, piece: bytes) -> None:
        """Takes the next piece."""
        recent = self._end + piece
        self.count += recent.count(_NAME)
        self._end = recent[1 - len(_NAME) :]


def refusal_event(path: str, status: int, body: bytes) -> bytes:
    """Returns a refusal with this status, whose body is JSON in one line, as the event of a stream of this path."""
    if is_messages_path(path):
        return named_events([json.loads(rewritten(status, body))])
    if path.endswith(RESPONSES):
        error = _error_in(body)
        return named_events([{"type": "error", "sequence_number": 0, "code": None, "param": None, **error}])
    return b"data: %s\n\n" % body


def _error_in(body: bytes) -> dict[str, Any]:
    try:
        error = json.loads(body)["error"]
        return {name: error[name] for name in ("code", "message", "param") if name in error}
    except (ValueError, LookupError, TypeError, RecursionError):
        return {"message": body[:500].decode("utf-8", "replace")}


def error_of(event: Any) -> Mapping[str, Any] | None:
    """Returns the error, with `code` and `message`, of a decoded event that ends a stream by one, in whatever form, or
    None for another event."""
    if not isinstance(event, Mapping):
        return None
    if event.get("type") == "response.failed" and isinstance(response := event.get("response"), Mapping):
        error = response.get("error")
    elif event.get("type") == "error" and "error" not in event:
        error = event
    else:
        error = event.get("error")
    return error if isinstance(error, Mapping) else None
