"""What the router reads of a request: its body within limits, and of the body three fields.

The rest of the body is checked to be JSON and passed on as bytes: building a document of ten megabytes would cost
more than everything else that the router does.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.types import Message, Receive

from serve_app.config import ModelConfig, RouterConfig
from serve_app.engines.openai_errors import read_json
from serve_app.errors import ClientGone, HeadersTooLarge, InvalidRequest, RequestTimeout, RequestTooLarge

Headers = Sequence[tuple[bytes, bytes]]


class Peek(msgspec.Struct):
    """The fields that matter here. `model` is None where the body has none."""

    model: Any = None
    stream: Any = False
    max_tokens: Any = None
    max_completion_tokens: Any = None

    @property
    def token_limit(self) -> int:
        """Tokens that the answer may have at most; 0 where the request does not say."""
        limit = self.max_completion_tokens or self.max_tokens or 0
        return limit if isinstance(limit, int) and limit > 0 else 0


_PEEK = msgspec.json.Decoder(Peek)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
# Python's own reader takes 40 ms a megabyte, in which nothing else goes on, in another thread neither.
LARGE_BODY_BYTES = 2**18


def peek(body: bytes) -> Peek:
    """Reads the fields of a JSON object without building the others. Raises InvalidRequest with what is wrong."""
    try:
        found = _PEEK.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        if len(body) > LARGE_BODY_BYTES:
            raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
        found = _peek_slowly(body)  # And more patient: NaN is no JSON, but Python writes it.
    if found.model is not None and not isinstance(found.model, str):
        raise InvalidRequest(f"The field 'model' must be a string, not {type(found.model).__name__}.", param="model")
    return found


def _peek_slowly(body: bytes) -> Peek:
    try:
        document = read_json(body)
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    if not isinstance(document, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return Peek(**{name: document[name] for name in Peek.__struct_fields__ if name in document})


def with_model(body: bytes, name: str) -> bytes:
    """The body with another model in it: an engine refuses a name that is not its own. Raises InvalidRequest."""
    try:
        return msgspec.json.encode({**_FIELDS.decode(body), "model": name})  # The other fields stay the bytes they are.
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        document = read_json(body)
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    return json.dumps({**document, "model": name}, ensure_ascii=False).encode()


def header(headers: Headers, name: bytes) -> bytes | None:
    """The value of the first header of that name, lower-case."""
    return next((value for key, value in headers if key == name), None)


def require_small_headers(headers: Headers, config: RouterConfig) -> None:
    """Raises HeadersTooLarge. The HTTP server in front has a limit of its own, which may be lower."""
    size = sum(len(name) + len(value) + 4 for name, value in headers)  # ": " and the line's end
    if size > config.max_header_bytes:
        raise HeadersTooLarge(
            f"The headers have {size} bytes, over the limit of {config.max_header_bytes}. "
            "The router's max_header_bytes sets it."
        )


def require_plain_path(path: str) -> None:
    """Raises InvalidRequest for a path that climbs: behind a model's prefix it would lead to another's route."""
    if {".", ".."} & set(path.replace("\\", "/").split("/")):
        raise InvalidRequest("The path has a segment '.' or '..'. Write it without.")


async def read_body(headers: Headers, receive: Receive, config: RouterConfig | ModelConfig) -> bytes:
    """The whole body, at most `max_body_bytes` in at most `body_timeout_s` seconds.

    Raises RequestTooLarge as soon as it is known to be larger, RequestTimeout, and ClientGone.
    """
    declared = header(headers, b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > config.max_body_bytes:
        raise _too_large(config)
    try:
        async with asyncio.timeout(config.body_timeout_s):
            return await _read(receive, config)
    except TimeoutError:
        raise RequestTimeout(
            f"The body did not arrive within {config.body_timeout_s:g} s. {_whose(config)} body_timeout_s sets it."
        ) from None


def replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` for an application, with a body that was read already; then what comes after it."""
    unread = [body]

    async def replay() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return replay


async def _read(receive: Receive, config: RouterConfig | ModelConfig) -> bytes:
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("The client left before its body was read.")
        piece = message.get("body", b"")
        size += len(piece)
        if size > config.max_body_bytes:
            raise _too_large(config)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def _too_large(config: RouterConfig | ModelConfig) -> RequestTooLarge:
    return RequestTooLarge(
        f"The body is over the limit of {config.max_body_bytes} bytes. {_whose(config)} max_body_bytes sets it."
    )


def _whose(config: RouterConfig | ModelConfig) -> str:
    return "The router's" if isinstance(config, RouterConfig) else "The model's"
