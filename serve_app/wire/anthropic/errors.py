"""Has the form of errors of Anthropic's Messages API, which all layers in front of an engine use for its paths.

The error of a message has Anthropic's `type` and `message`, and this project's `code` and `param` where there are
any, which Anthropic's clients skip.
"""

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import RequestError
from serve_app.wire.headers import header

PATHS = ("/v1/messages", "/v1/messages/count_tokens")
# The types by status. Others below 500 are invalid_request_error, and others from 500 on are api_error.
TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip
# An error of an engine has at most this many bytes, and a longer body passes as it is.
MOST_ERROR_BYTES = 2**20


def is_messages_path(path: str) -> bool:
    """Returns whether the path is that of one of Anthropic's endpoints, below whatever prefix."""
    return path.removesuffix("/").endswith(PATHS)


def messages_error(error: RequestError) -> dict[str, Any]:
    """Returns the body, and the data of an event: `{"type": "error", "error": {"type", "message", …}}`."""
    return _object(error.status, error.message, {"code": error.code, "param": error.param})


def rewritten(status: int, body: bytes) -> bytes:
    """Returns the body of any error of that status in Anthropic's form."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        said = body[:2000].decode("utf-8", "replace").strip()
    error = said.get("error") if isinstance(said, Mapping) else None
    known = error if isinstance(error, Mapping) else {}
    message = known.get("message") or (said if isinstance(said, str) else json.dumps(said)) or f"HTTP {status}"
    return json.dumps(_object(status, str(message), known)).encode()


def _object(status: int, message: str, known: Mapping[str, Any]) -> dict[str, Any]:
    kind = TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    more = {name: known[name] for name in ("code", "param") if isinstance(known.get(name), str)}
    return {"type": "error", "error": {"type": kind, "message": message, **more}}


def in_messages_form(scope: Scope, send: Send) -> Send:
    """Returns `send` for the answer to a request. On Anthropic's paths, it gives errors Anthropic's form, whichever
    layer has written them."""
    return _Rewriter(send).send if scope["type"] == "http" and is_messages_path(scope["path"]) else send


class MessagesErrors:
    """Puts `in_messages_form` around an application."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI call."""
        await self._app(scope, receive, in_messages_form(scope, send))


class _Rewriter:
    """Holds the head and the body of an error back until the body is whole."""

    def __init__(self, send: Send):
        self._send = send
        self._head: Message | None = None
        self._body = bytearray()

    async def send(self, message: Message) -> None:
        """Passes a message on, or the whole error with its last message."""
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._head = message
        elif self._head is None:
            await self._send(message)
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            is_long = len(self._body) > MOST_ERROR_BYTES
            if is_long or not message.get("more_body", False):
                await self._end(message, is_long)

    async def _end(self, last: Message, is_long: bool) -> None:
        head, body = self._head, bytes(self._body)
        assert head is not None, "this is called with a head"
        self._head = None
        headers = list(head.get("headers", ()))
        if not is_long and not (header(headers, b"content-type") or b"").startswith(b"text/event-stream"):
            body = rewritten(head["status"], body)
            replaced = (b"content-length", b"content-type")
            headers = [(name, value) for name, value in headers if bytes(name).lower() not in replaced]
            headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({**head, "headers": headers})
        await self._send({**last, "body": body})
