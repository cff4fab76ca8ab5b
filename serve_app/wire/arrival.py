"""Reads a request's body once and within limits. After that, every layer of the process has it from the scope."""

import asyncio
from collections.abc import Callable

from starlette.types import Message, Receive, Scope, Send

from serve_app.config import ModelConfig, RouterConfig
from serve_app.errors import ClientGone, HeadersTooLarge, InvalidRequest, RequestError, RequestTimeout, RequestTooLarge
from serve_app.wire.body import RequestBody
from serve_app.wire.headers import Headers, declared_bytes
from serve_app.wire.openai_errors import error_response

# A client's own `x-request-id` may have this many bytes, since it appears in answers and logs.
MOST_ID_BYTES = 128

# An ASGI scope has the body that was read already under this name.
_BODY = "serve_app.body"


def require_small_headers(headers: Headers, config: RouterConfig) -> None:
    """Raises HeadersTooLarge if they are. The HTTP server in front has a limit of its own, which may be lower."""
    size = sum(len(name) + len(value) + 4 for name, value in headers)  # The 4 bytes are ": " and the line's end.
    if size > config.max_header_bytes:
        raise HeadersTooLarge(
            f"The headers have {size} bytes, over the limit of {config.max_header_bytes}. "
            "The router's max_header_bytes sets it."
        )


def require_plain_path(path: str) -> None:
    """Raises InvalidRequest for a path that climbs, since behind a model's prefix it would lead to another's route."""
    if {".", ".."} & set(path.replace("\\", "/").split("/")):
        raise InvalidRequest("The path has a segment '.' or '..'. Write the path without it.")


async def read_body(
    scope: Scope, receive: Receive, config: RouterConfig | ModelConfig, grow: Callable[[int], None] | None = None
) -> RequestBody:
    """Returns the whole body, at most `max_body_bytes` in at most `body_timeout_s` seconds. It is that of the scope if
    a layer in front has read it, and otherwise what `receive` gives.

    `grow` gets the bytes of each piece before it is kept, and may raise. Raises RequestTooLarge as soon as the body is
    known to be larger, RequestTimeout, and ClientGone.
    """
    if (body := known_body(scope)) is not None:
        if len(body.content) > config.max_body_bytes:
            raise _too_large(config)
        return body
    if declared_bytes(scope["headers"]) > config.max_body_bytes:
        raise _too_large(config)
    try:
        async with asyncio.timeout(config.body_timeout_s):
            return RequestBody(await _read(receive, config, grow))
    except TimeoutError:
        raise RequestTimeout(
            f"The body did not arrive within {config.body_timeout_s:g} s. {_whose(config)} body_timeout_s sets it."
        ) from None


async def read_or_refused(
    scope: Scope, receive: Receive, send: Send, config: RouterConfig | ModelConfig
) -> RequestBody | None:
    """Returns the whole body as `read_body` does, or None if the client has left or has been sent the error here."""
    try:
        return await read_body(scope, receive, config)
    except ClientGone:
        return None
    except RequestError as error:
        await error_response(error)(scope, receive, send)
        return None


def known_body(scope: Scope) -> RequestBody | None:
    """Returns the body if this process has read it already, or None, for example behind Serve's Python proxy."""
    body: RequestBody | None = scope.get(_BODY)
    return body


def with_body(scope: Scope, receive: Receive, body: RequestBody) -> tuple[Scope, Receive]:
    """Returns the request with this body for the application behind: in the scope for our own layers, and by
    `receive` for all.

    What is still unread of the original body is skipped.
    """
    unread = [body.content]

    async def replay() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        while (message := await receive())["type"] == "http.request":
            pass
        return message

    return {**scope, _BODY: body}, replay


async def _read(receive: Receive, config: RouterConfig | ModelConfig, grow: Callable[[int], None] | None) -> bytes:
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("The client left before its body was read.")
        piece = message.get("body", b"")
        size += len(piece)
        if size > config.max_body_bytes:
            raise _too_large(config)
        if grow is not None:
            grow(len(piece))
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)  # A body in one piece is not copied.


def _too_large(config: RouterConfig | ModelConfig) -> RequestTooLarge:
    return RequestTooLarge(
        f"The body is over the limit of {config.max_body_bytes} bytes. {_whose(config)} max_body_bytes sets it."
    )


def _whose(config: RouterConfig | ModelConfig) -> str:
    return "The router's" if isinstance(config, RouterConfig) else "The model's"
