"""What is read of a request before an engine reads it: its body within limits, and of the body a few fields.

The rest of the body is checked to be JSON and passed on as bytes: building a document of ten megabytes would cost
more than everything else that the router does.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from pydantic import TypeAdapter, ValidationError
from starlette.types import Message, Receive, Scope, Send

from serve_app.config import ModelConfig, RouterConfig
from serve_app.errors import ClientGone, HeadersTooLarge, InvalidRequest, RequestError, RequestTimeout, RequestTooLarge
from serve_app.wire.census import census, require_countable
from serve_app.wire.openai_errors import TOO_DEEP, error_response

Headers = Sequence[tuple[bytes, bytes]]
T = TypeVar("T")

# Bytes of JSON of a model's name; of a number, or of a word such as "true": what is written longer is none.
MOST_NAME_BYTES = 1024
MOST_WORD_BYTES = 100
# Bytes of a client's own `x-request-id`: it stands in answers and in logs.
MOST_ID_BYTES = 128


@dataclass(frozen=True)
class Peek:
    """The fields that matter before the engine. `model` is None where the body has none.

    `token_limit` are the tokens that one answer may have at most, 0 where the request does not say. `answers` is how
    many there will be: `n` for each of the prompts.
    """

    model: str | None = None
    stream: object = False
    stream_options: object = None
    token_limit: int = 0
    answers: int = 1


_NULL = msgspec.Raw(b"null")


class _Fields(msgspec.Struct):
    """The same fields as JSON: whatever stands in them is not built before its size is known."""

    model: msgspec.Raw = _NULL
    stream: msgspec.Raw = _NULL
    stream_options: msgspec.Raw = _NULL
    max_tokens: msgspec.Raw = _NULL
    max_completion_tokens: msgspec.Raw = _NULL
    max_output_tokens: msgspec.Raw = _NULL
    n: msgspec.Raw = _NULL
    prompt: msgspec.Raw = _NULL


_PEEK = msgspec.json.Decoder(_Fields)
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_WHOLE = TypeAdapter(int)


def peek(body: bytes) -> Peek:
    """Reads these fields of a JSON object, and counts all others without building them.

    Takes time with a large body: not for the event loop. Raises InvalidRequest with what is wrong.
    """
    require_countable(body)
    found = _fields(_PEEK, body)
    try:
        return Peek(
            model=_name(found.model),
            stream=_word(found.stream),
            stream_options=msgspec.json.decode(found.stream_options),
            # Engines differ in which of the two fields they follow, so the larger one counts.
            token_limit=max(map(_whole, (found.max_tokens, found.max_completion_tokens, found.max_output_tokens))),
            answers=max(1, _whole(found.n)) * _prompts(found.prompt),
        )
    except ValueError as error:  # Of a number that is too large, or of text that is no UTF-8.
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None


def is_true(value: object) -> bool:
    """As pydantic reads it, which vLLM's requests are."""
    return value in (True, 1) or (isinstance(value, str) and value.lower() in {"1", "on", "t", "true", "y", "yes"})


def _name(model: msgspec.Raw) -> str | None:
    if len(bytes(model)) > MOST_NAME_BYTES:
        text = f"The field 'model' has {len(bytes(model))} bytes, and names have at most {MOST_NAME_BYTES}."
        raise InvalidRequest(text, param="model")
    name = msgspec.json.decode(model)
    if name is not None and not isinstance(name, str):
        raise InvalidRequest(f"The field 'model' must be a string, not {type(name).__name__}.", param="model")
    return name


def _word(value: msgspec.Raw) -> object:
    """A short value; None for a longer one."""
    return msgspec.json.decode(value) if len(bytes(value)) <= MOST_WORD_BYTES else None


def _whole(value: msgspec.Raw) -> int:
    """A whole number above zero in any way that pydantic reads, such as 16.0 or "+1_6"; 0 for what is none."""
    try:
        return max(0, _WHOLE.validate_python(_word(value)))
    except (ValidationError, msgspec.ValidationError):  # The second one is for 1e999.
        return 0


def _prompts(prompt: msgspec.Raw) -> int:
    """How many prompts there are in this JSON, without building them. Ids of tokens, a list of numbers, are one."""
    text = bytes(prompt)
    if not text.startswith(b"["):
        return 1
    return census(text).items + 1 if b'"' in text else max(1, text.count(b"[") - 1)


def with_model(body: bytes, name: str) -> bytes:
    """The body with another model in it: an engine refuses a name that is not its own. Raises InvalidRequest."""
    return with_fields(body, model=name)


def with_fields(body: bytes, **fields: Any) -> bytes:
    """The body of a request that was peeked at, with these fields in place of its own; the others stay the bytes that
    they are. Takes time with a large body: not for the event loop. Raises InvalidRequest."""
    read: dict[str, msgspec.Raw] = _fields(_OBJECT, body)
    try:
        return msgspec.json.encode({**read, **fields})
    except RecursionError:  # What stands in one of the fields was read, and can be nested deeper than it is written.
        raise InvalidRequest(f"The body is not valid JSON: {TOO_DEEP}.") from None


def _fields(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError:
        raise InvalidRequest("The body must be a JSON object.") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None


def header(headers: Headers, name: bytes) -> bytes | None:
    """The value of the first header of that name, lower-case."""
    return next((value for key, value in headers if key == name), None)


def declared_bytes(headers: Headers) -> int:
    """What the headers say of the body's length; 0 where they say nothing."""
    declared = header(headers, b"content-length") or b""
    return int(declared) if declared.isdigit() else 0


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


async def read_body(
    headers: Headers, receive: Receive, config: RouterConfig | ModelConfig, grow: Callable[[int], None] | None = None
) -> bytes:
    """The whole body, at most `max_body_bytes` in at most `body_timeout_s` seconds.

    `grow` hears the bytes of each piece before it is kept, and may raise. Raises RequestTooLarge as soon as the body is
    known to be larger, RequestTimeout, and ClientGone.
    """
    if declared_bytes(headers) > config.max_body_bytes:
        raise _too_large(config)
    try:
        async with asyncio.timeout(config.body_timeout_s):
            return await _read(receive, config, grow)
    except TimeoutError:
        raise RequestTimeout(
            f"The body did not arrive within {config.body_timeout_s:g} s. {_whose(config)} body_timeout_s sets it."
        ) from None


async def read_or_refused(
    scope: Scope, receive: Receive, send: Send, config: RouterConfig | ModelConfig
) -> bytes | None:
    """The whole body, as `read_body` has it; None where the client has left, or was told here what is wrong."""
    try:
        return await read_body(scope["headers"], receive, config)
    except ClientGone:
        return None
    except RequestError as error:
        await error_response(error)(scope, receive, send)
        return None


def replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` for an application, with a body that was read already; then what comes after it."""
    unread = [body]

    async def replay() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return replay


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
            return b"".join(pieces)


def _too_large(config: RouterConfig | ModelConfig) -> RequestTooLarge:
    return RequestTooLarge(
        f"The body is over the limit of {config.max_body_bytes} bytes. {_whose(config)} max_body_bytes sets it."
    )


def _whose(config: RouterConfig | ModelConfig) -> str:
    return "The router's" if isinstance(config, RouterConfig) else "The model's"
