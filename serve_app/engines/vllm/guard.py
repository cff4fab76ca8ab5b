"""What a request may ask of vLLM, checked before vLLM reads it.

vLLM builds a body's objects, counts its choices and tokenizes on the event loop that passes everybody's tokens on, and
most of its bounds are far away. So a body is counted here first, on a thread, with the bounds that the pt engine has.
What is in them goes to vLLM as it came.
"""

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.engines.workers import Workers
from serve_app.errors import ContextTooLong, InvalidRequest, RequestError
from serve_app.wire.census import require_countable
from serve_app.wire.openai_errors import error_response

# Lists, objects and keys. Of messages vLLM's own reading takes some 0.2 ms each.
MOST_PARTS = 10_000
MOST_BIASES = 1024
# Prompts times choices.
MOST_SEQUENCES = 1024
MOST_NUMBER = 2**63
# Bytes of JSON for one character: an escape as \uXXXX.
ESCAPE_BYTES = 6


class _Sizes(msgspec.Struct):
    """The fields whose size counts, as far as vLLM would read them."""

    n: Any = 1
    prompt: msgspec.Raw = msgspec.Raw(b'""')
    input: msgspec.Raw = msgspec.Raw(b'""')
    messages: msgspec.Raw = msgspec.Raw(b"[]")
    tokens: msgspec.Raw = msgspec.Raw(b"[]")
    logit_bias: msgspec.Raw = msgspec.Raw(b"null")
    structured_outputs: msgspec.Raw = msgspec.Raw(b"null")
    top_k: Any = None


_SIZES = msgspec.json.Decoder(_Sizes)
_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True)
class Guard:
    """The bounds of one model: tokens of its context, and characters of its longest token. `reads_media` is whether
    its messages may bring images or sound, which are long and are no tokens."""

    max_model_len: int
    longest_token: int
    reads_media: bool = False

    def check(self, body: bytes) -> None:
        """Raises InvalidRequest that names the field. Takes time with a large body: not for the event loop."""
        require_countable(body, MOST_PARTS)
        try:
            sizes = _SIZES.decode(body)
        except msgspec.ValidationError:
            return  # No object: vLLM refuses it in its own words.
        except (ValueError, RecursionError) as error:
            if body.startswith(codecs.BOM_UTF8) or b"\0" in body[:4]:  # Python's json reads these, and so does vLLM.
                raise InvalidRequest("The body must be JSON in UTF-8, without a byte order mark.") from None
            if not body.lstrip().startswith(b"{"):  # A form, say, or no body.
                return
            # vLLM would read NaN, which is no JSON, and so go past the checks.
            raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
        if sizes.n is not None and not isinstance(sizes.n, int):  # vLLM would read "128" and 128.0 too.
            raise InvalidRequest("'n' must be a whole number.", param="n")
        for name in ("prompt", "input"):
            self._check_prompts(name, getattr(sizes, name), sizes.n)
        most = self._most_characters
        if not self.reads_media and len(bytes(sizes.messages)) > ESCAPE_BYTES * most:
            raise self._too_long("messages", f"have {len(bytes(sizes.messages))} bytes")
        if (count := bytes(sizes.tokens).count(b",")) >= most:
            raise self._too_long("tokens", f"are {count + 1} ids")
        if bytes(sizes.logit_bias).count(b":") > MOST_BIASES:
            raise InvalidRequest(f"'logit_bias' has more than {MOST_BIASES} entries.", param="logit_bias")
        # vLLM answers 500 to these two.
        if bytes(sizes.structured_outputs)[:1] not in (b"{", b"n"):
            raise InvalidRequest("'structured_outputs' must be an object.", param="structured_outputs")
        if isinstance(sizes.top_k, int | float) and abs(sizes.top_k) >= MOST_NUMBER:
            raise InvalidRequest(f"'top_k' must be below {MOST_NUMBER}.", param="top_k")

    def _check_prompts(self, name: str, prompts: msgspec.Raw, n: object) -> None:
        items = _prompts(prompts)
        choices = n if isinstance(n, int) else 1
        if len(items) * choices > MOST_SEQUENCES:
            raise InvalidRequest(
                f"The request asks for {len(items) * choices} sequences ({len(items)} prompts times n), and at most "
                f"{MOST_SEQUENCES} are taken at once. Send several requests.",
                param="n" if len(items) == 1 else name,
            )
        for item in items:
            if len(item) > ESCAPE_BYTES * self._most_characters:
                raise self._too_long(name, f"has {len(item)} bytes")

    @property
    def _most_characters(self) -> int:
        return self.max_model_len * self.longest_token

    def _too_long(self, name: str, what: str) -> ContextTooLong:
        return ContextTooLong(
            f"'{name}' {what}, more than this model's maximum context length, {self.max_model_len} tokens, can hold.",
            param=name,
        )


# A list of texts, of lists or of objects, however many spaces are before the first.
SEVERAL = re.compile(rb"\[\s*[\"\[{]")


def _prompts(prompts: msgspec.Raw) -> list[bytes]:
    """The JSON of each prompt. A list of numbers is one."""
    text = bytes(prompts)
    if SEVERAL.match(text):
        return [bytes(item) for item in _LIST.decode(text)]
    return [text]


def guarded(app: ASGIApp, guard: Guard) -> ASGIApp:
    """The application behind the guard. The body is in memory already, within the bound of its bytes."""
    workers = Workers()

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        body, read = await _body(receive)
        try:
            await workers.run(len(body), partial(guard.check, body))
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        await app(scope, read, send)

    return wrapped


async def _body(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and a `receive` that gives it again and then what comes after it."""
    messages: list[Message] = []
    more = True
    while more:
        message = await receive()
        messages.append(message)
        more = message["type"] == "http.request" and message.get("more_body", False)
    again: Callable[[], Message] = partial(messages.pop, 0)

    async def replay() -> Message:
        return again() if messages else await receive()

    return b"".join(message.get("body", b"") for message in messages), replay
