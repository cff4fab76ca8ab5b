"""Checks what a request asks of vLLM before vLLM reads it.

vLLM builds a body's objects, counts its choices and tokenizes on the event loop that passes all clients' tokens on, and
most of its bounds are very large. So a body is counted here first, on a thread, with the bounds of the pt engine. A
body within them goes to vLLM unchanged.
"""

import codecs
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.engines.vllm.bounds import MOST_NUMBER_BYTES, require_bounded_numbers
from serve_app.engines.vllm.endpoints import READING, require_served
from serve_app.engines.vllm.response_items import require_known_items
from serve_app.engines.vllm.response_tools import ToolAbilities
from serve_app.engines.workers import Workers
from serve_app.errors import ContextTooLong, InvalidRequest, RequestError
from serve_app.wire.arrival import known_body
from serve_app.wire.asgi import endpoint
from serve_app.wire.body import Fields, RequestBody
from serve_app.wire.census import census, decode_counted
from serve_app.wire.openai_errors import error_response
from serve_app.wire.responses.chat_request import PATH as RESPONSES
from serve_app.wire.responses.chat_request import STORED, require_stateless
from serve_app.wire.responses.repeated import require_repeatable

# A body may have this many lists, objects and keys. vLLM takes some 0.2 ms to read a message.
MOST_PARTS = 10_000
# These fields may have this many commas outside of texts. vLLM lists its errors for every wrong element.
MOST_ELEMENTS = 2 * MOST_PARTS
STRUCTURED = ("messages", "system", "tools")
MOST_BIASES = 1024
# This bounds prompts times choices.
MOST_SEQUENCES = 1024
# One character may take this many bytes of JSON, as the escape \uXXXX.
ESCAPE_BYTES = 6
# vLLM tokenizes each bad word with a space before it and without, and has room for this many tokens of one request.
# More are an error in the engine's process, which ends all answers.
MOST_BAD_WORDS, MOST_BAD_WORDS_BYTES, MOST_BAD_WORDS_TOKENS = 128, 2**14, 1024
# The end of an answer has its usage. What it repeats of the request after that must not push it out of sight.
MOST_USER_BYTES = 1024

_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_TEXTS = msgspec.json.Decoder(list[str])
# These fields hold one prompt or several, and these become part of one.
PROMPTS = ("prompt", "input", "documents", "queries", "items", "data_1", "data_2", "text_1", "text_2", "query")
TEXTS = ("messages", "system", "instructions")
# These fields may only be false.
NOT_SERVED = {
    "use_beam_search": "Each of its steps is a round of new requests, which keys' limits do not count.",
    "enable_response_messages": "The answer would end with them, where its usage must be.",
}


@dataclass(frozen=True)
class Guard:
    """These are the bounds of one model: tokens of its context, and characters of its longest token. `count_tokens`
    returns how many tokens vLLM makes of a text alone. `reads_media` says whether its messages may have images or
    sound, which are long but are not tokens. `is_known_item` returns whether vLLM knows an item of a response's
    input. `tools` says what the engine can do with the tools of a response."""

    max_model_len: int
    longest_token: int
    count_tokens: Callable[[str], int] = len
    reads_media: bool = False
    is_known_item: Callable[[Any], bool] = lambda _: True
    tools: ToolAbilities = field(default_factory=ToolAbilities)

    def check(self, body: RequestBody, path: str = "") -> None:
        """Raises InvalidRequest that names the field. A large body takes time, so the event loop must not call this.

        At the `path` of the Responses API, the input is one conversation, and nothing stored may be referred to.
        """
        body.require_countable(most_parts=MOST_PARTS)
        fields = _fields(body)
        require_bounded_numbers(fields)
        choices = _choices(fields)
        texts: tuple[str, ...] = TEXTS
        self._require_few_elements(fields, STRUCTURED)
        if path.removesuffix("/") == RESPONSES:
            require_stateless({name: _bytes(fields, name) not in (b"null", b"false") for name in STORED})
            require_repeatable({name: len(text) for name, text in fields.items()})
            texts = (*TEXTS, "input")
            self._require_few_elements(fields, ("input",))
            self._check_items(_bytes(fields, "input"))
            # Both are short, because a response repeats them.
            self.tools.check(_decoded(fields, "tools"), _decoded(fields, "tool_choice"))
        for name in PROMPTS:
            if name in fields and name not in texts:
                self._check_prompts(name, fields[name], choices)
        self._check_texts(fields, texts)
        if (count := _bytes(fields, "tokens").count(b",")) >= self._most_characters:
            raise self._too_long("tokens", f"are {count + 1} ids")
        if _bytes(fields, "logit_bias").count(b":") > MOST_BIASES:
            raise InvalidRequest(f"'logit_bias' has more than {MOST_BIASES} entries.", param="logit_bias")
        if _bytes(fields, "structured_outputs")[:1] not in (b"{", b"n"):  # vLLM answers 500 to these.
            raise InvalidRequest("'structured_outputs' must be an object.", param="structured_outputs")
        if len(_bytes(fields, "user")) > MOST_USER_BYTES:
            raise InvalidRequest(f"'user' may have at most {MOST_USER_BYTES} bytes.", param="user")
        for name, reason in NOT_SERVED.items():
            if _bytes(fields, name) not in (b"false", b"null"):
                raise InvalidRequest(f"'{name}' is not served. Leave it out. {reason}", param=name)
        self._check_bad_words(_bytes(fields, "bad_words"))

    def _require_few_elements(self, fields: Fields, names: Iterable[str]) -> None:
        for name in names:
            if (count := census(_bytes(fields, name)).items) > MOST_ELEMENTS:
                raise InvalidRequest(
                    f"'{name}' has {count} elements, but at most {MOST_ELEMENTS} are allowed.", param=name
                )

    def _check_items(self, text: bytes) -> None:
        if not text.startswith(b"["):
            return
        items = _read("input", text)
        assert isinstance(items, list), "it begins as one"
        require_known_items(items, self.is_known_item)

    def _check_texts(self, fields: Fields, texts: Iterable[str]) -> None:
        for name in () if self.reads_media else texts:
            if (size := len(_bytes(fields, name))) > ESCAPE_BYTES * self._most_characters:
                raise self._too_long(name, f"has {size} bytes")

    def _check_prompts(self, name: str, prompts: msgspec.Raw, choices: int) -> None:
        items = _prompts(prompts)
        if len(items) * choices > MOST_SEQUENCES:
            raise InvalidRequest(
                f"The request asks for {len(items) * choices} sequences ({len(items)} prompts times n), but at most "
                f"{MOST_SEQUENCES} are allowed at once. Send several requests.",
                param="n" if len(items) == 1 else name,
            )
        for item in items:
            is_medium = self.reads_media and item.startswith(b"{")
            if not is_medium and len(item) > ESCAPE_BYTES * self._most_characters:
                raise self._too_long(name, f"has {len(item)} bytes")

    def _check_bad_words(self, words: bytes) -> None:
        if len(words) > MOST_BAD_WORDS_BYTES:
            raise InvalidRequest(f"'bad_words' may have at most {MOST_BAD_WORDS_BYTES} bytes.", param="bad_words")
        try:
            texts = [word.lstrip() for word in _TEXTS.decode(words)]
        except ValueError:  # vLLM refuses it in its own words.
            return
        if len(texts) > MOST_BAD_WORDS:
            raise InvalidRequest(f"'bad_words' may have at most {MOST_BAD_WORDS} entries.", param="bad_words")
        count = sum(self.count_tokens(text) + self.count_tokens(f" {text}") for text in texts)
        if count > MOST_BAD_WORDS_TOKENS:
            raise InvalidRequest(
                f"'bad_words' are {count} tokens, with and without a space before each word, but at most "
                f"{MOST_BAD_WORDS_TOKENS} are allowed.",
                param="bad_words",
            )

    @property
    def _most_characters(self) -> int:
        return self.max_model_len * self.longest_token

    def _too_long(self, name: str, what: str) -> ContextTooLong:
        return ContextTooLong(
            f"'{name}' {what}, more than this model's maximum context length, {self.max_model_len} tokens, can hold.",
            param=name,
        )


def _fields(body: RequestBody) -> Fields:
    """Returns the fields of a JSON object as they are in the body, or none if vLLM refuses the body in its own
    words."""
    try:
        return body.fields
    except InvalidRequest:
        content = body.content
        if content.startswith(codecs.BOM_UTF8) or b"\0" in content[:4]:  # Python's json reads these, and so does vLLM.
            raise InvalidRequest("The body must be JSON in UTF-8, without a byte order mark.") from None
        if not content.lstrip().startswith(b"{"):  # This may be a form, a list, or no body.
            return {}
        raise  # vLLM would read NaN, which is not JSON, and so bypass the checks.


def _bytes(fields: Fields, name: str) -> bytes:
    return bytes(fields[name]) if name in fields else b"null"


def _decoded(fields: Fields, name: str) -> object:
    return _read(name, _bytes(fields, name))


def _read(name: str, text: bytes) -> object:
    """Returns the value of a field. Raises InvalidRequest that names it, if it is nested too deep."""
    try:
        return decode_counted(text)
    except ValueError as error:
        raise InvalidRequest(f"'{name}' cannot be read: {error}.", param=name) from None


def _choices(fields: Fields) -> int:
    """Returns `n`. vLLM would also read "128" and 128.0."""
    text = _bytes(fields, "n")
    try:
        choices = msgspec.json.decode(text, type=int | None) if len(text) <= MOST_NUMBER_BYTES else text
    except ValueError:
        choices = text
    if isinstance(choices, bytes):
        raise InvalidRequest("'n' must be a whole number.", param="n")
    return 1 if choices is None else choices


# This matches a list of texts, of lists or of objects, however many spaces are before the first one.
SEVERAL = re.compile(rb"\[\s*[\"\[{]")


def _prompts(prompts: msgspec.Raw) -> list[bytes]:
    """Returns the JSON of each prompt. A list of numbers is one."""
    text = bytes(prompts)
    if SEVERAL.match(text):
        return [bytes(item) for item in _LIST.decode(text)]
    return [text]


def guarded(app: ASGIApp, guard: Guard) -> ASGIApp:
    """Returns the application with the guard in front. `replica/whole_body.py` comes before it and has read the body.
    What is not served is answered with 404, as vLLM answers what it does not have."""
    workers = Workers()

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in READING:
            await app(scope, receive, send)
            return
        path = endpoint(scope)
        try:
            require_served(scope["method"], path)
        except RequestError as error:
            response = error_response(error)
            response.status_code = 404
            await response(scope, receive, send)
            return
        body = known_body(scope)
        assert body is not None, "what vLLM serves has a method with a body, and that was read"
        try:
            await workers.run(len(body.content), partial(guard.check, body, path))
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        await app(scope, receive, send)

    return wrapped
