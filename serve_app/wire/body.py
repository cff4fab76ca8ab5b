"""What the router reads of a request: its body within limits, and of the body three fields.

The rest of the body is checked to be JSON and passed on as bytes: building a document of ten megabytes would cost
more than everything else that the router does.
"""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from starlette.types import Message, Receive

from serve_app.config import ModelConfig, RouterConfig
from serve_app.errors import ClientGone, HeadersTooLarge, InvalidRequest, RequestTimeout, RequestTooLarge
from serve_app.wire.openai_errors import read_json

Headers = Sequence[tuple[bytes, bytes]]


class Peek(msgspec.Struct):
    """The fields that matter here. `model` is None where the body has none; `prompt` is not read before it must be."""

    model: Any = None
    stream: Any = False
    stream_options: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    n: Any = None
    prompt: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def token_limit(self) -> int:
        """Tokens that one answer may have at most; 0 where the request does not say. Engines differ in which of the two
        fields they follow, so the larger one counts."""
        return max(_whole(self.max_completion_tokens), _whole(self.max_tokens))

    @property
    def answers(self) -> int:
        """How many there will be: `n` for each of the prompts."""
        return max(1, _whole(self.n)) * _prompts(self.prompt)


_PEEK = msgspec.json.Decoder(Peek)
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
# Python's own reader takes 40 ms a megabyte, in which nothing else goes on, in another thread neither.
LARGE_BODY_BYTES = 2**18


def is_true(value: object) -> bool:
    """As pydantic reads it, which vLLM's requests are."""
    return value in (True, 1) or (isinstance(value, str) and value.lower() in {"1", "on", "t", "true", "y", "yes"})


def _whole(value: object) -> int:
    """A whole number above zero in any way that pydantic reads, such as 16.0 or "16"; 0 for what is none."""
    if isinstance(value, str) and len(value) < 20 and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and value > 0 else 0


# A list of texts or of lists, however many spaces are before the first.
_SEVERAL = re.compile(rb"\[\s*[\"\[]")


def _prompts(prompt: msgspec.Raw) -> int:
    """How many prompts there are in this JSON. Ids of tokens, a list of numbers, are one."""
    if not _SEVERAL.match(memoryview(prompt)):
        return 1
    return max(1, len(_ITEMS.decode(prompt)))


def peek(body: bytes) -> Peek:
    """Reads the fields of a JSON object without building the others. Raises InvalidRequest with what is wrong."""
    try:
        found = _PEEK.decode(body)
    except (ValueError, RecursionError) as error:
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
    found = {name: document[name] for name in Peek.__struct_fields__ if name in document}
    if "prompt" in found:
        found["prompt"] = msgspec.Raw(json.dumps(found["prompt"]).encode())
    return Peek(**found)


def with_model(body: bytes, name: str) -> bytes:
    """The body with another model in it: an engine refuses a name that is not its own. Raises InvalidRequest."""
    return with_fields(body, model=name)


def with_fields(body: bytes, **fields: Any) -> bytes:
    """The body with these fields in place of its own. Raises InvalidRequest."""
    try:
        return msgspec.json.encode({**_FIELDS.decode(body), **fields})  # The others stay the bytes they are.
    except (ValueError, RecursionError):
        pass
    try:
        document = read_json(body)
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    return json.dumps({**document, **fields}, ensure_ascii=False).encode()


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


async def read_body(
    headers: Headers, receive: Receive, config: RouterConfig | ModelConfig, grow: Callable[[int], None] | None = None
) -> bytes:
    """The whole body, at most `max_body_bytes` in at most `body_timeout_s` seconds.

    `grow` hears the bytes of each piece before it is kept, and may raise. Raises RequestTooLarge as soon as the body is
    known to be larger, RequestTimeout, and ClientGone.
    """
    declared = header(headers, b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > config.max_body_bytes:
        raise _too_large(config)
    try:
        async with asyncio.timeout(config.body_timeout_s):
            return await _read(receive, config, grow)
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
