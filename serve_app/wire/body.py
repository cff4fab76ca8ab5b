"""Has the body of a request: its bytes, its fields, and the few fields that matter before an engine reads it.

The body is split into its fields once in each process, and their values stay bytes, because building a document of ten
megabytes would cost more than everything else that the router does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError

from serve_app.errors import InvalidRequest
from serve_app.wire.census import Census, census, require_countable
from serve_app.wire.openai_errors import TOO_DEEP
from serve_app.wire.process_local import ProcessLocal

Fields = Mapping[str, msgspec.Raw]

# A model's name may have the first number of bytes in JSON, and a number or a word such as "true" the second.
MOST_NAME_BYTES = 1024
MOST_WORD_BYTES = 100
# The fields of a body are kept as long as the request lasts, at some 200 bytes each. Requests have a few dozen. A body
# with more of them is split again when they are needed.
MOST_KEPT_FIELDS = 256


@dataclass(frozen=True)
class Peek:
    """Holds the fields that matter before the engine. `model` is None if the body has none.

    `token_limit` is how many tokens one answer may have, or 0 if the request does not say. `answers` is how many
    answers there will be: `n` for each of the prompts.
    """

    model: str | None = None
    stream: object = False
    stream_options: object = None
    token_limit: int = 0
    answers: int = 1


_NULL = msgspec.Raw(b"null")
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_WHOLE = TypeAdapter(int)


class RequestBody(ProcessLocal):
    """Holds the whole body of one request, which all layers of a process share (`wire/arrival.py`).

    Each part is read once. That takes time with a large body, so the event loop must not do it.
    """

    def __init__(self, content: bytes, fields: Fields | None = None):
        self.content = content
        self._fields = fields
        self._peek: Peek | None = None

    @cached_property
    def census(self) -> Census:
        """Returns the count of the body's values, which is made without building them."""
        return census(self.content)

    def require_countable(self, **bounds: Any) -> None:
        """Raises InvalidRequest for a body with more values than may be built, as `census.require_countable` does."""
        require_countable(self.content, counted=lambda: self.census, **bounds)

    @property
    def fields(self) -> Fields:
        """Returns the fields of the JSON object as they are in the body. Of two equal names the last one counts.

        Raises InvalidRequest with what is wrong.
        """
        if self._fields is not None:
            return self._fields
        fields = self._split()
        if len(fields) <= MOST_KEPT_FIELDS:
            self._fields = fields
        return fields

    def _split(self) -> Fields:
        self.require_countable()
        try:
            fields: Fields = _OBJECT.decode(self.content)
            return fields
        except msgspec.ValidationError:
            raise InvalidRequest("The body must be a JSON object.") from None
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"The body is not valid JSON: {error}.") from None

    def peek(self) -> Peek:
        """Returns the fields that matter before the engine. Raises InvalidRequest with what is wrong."""
        if self._peek is None:
            self._peek = self._looked_at(self.fields)
        return self._peek

    def _looked_at(self, fields: Fields) -> Peek:
        limits = (fields.get(name, _NULL) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"))
        try:
            return Peek(
                model=_name(fields.get("model", _NULL)),
                stream=_word(fields.get("stream", _NULL)),
                stream_options=msgspec.json.decode(fields.get("stream_options", _NULL)),
                # Engines differ in which of the fields they obey, so the largest one counts.
                token_limit=max(map(_whole, limits)),
                answers=max(1, _whole(fields.get("n", _NULL))) * _prompts(fields.get("prompt", _NULL)),
            )
        except (ValueError, RecursionError) as error:  # A number may be too large, or text not be UTF-8.
            raise InvalidRequest(f"The body is not valid JSON: {error}.") from None

    def with_fields(self, **values: Any) -> "RequestBody":
        """Returns the body with these fields in place of its own. The bytes of the others do not change.

        Raises InvalidRequest if a field is nested too deep.
        """
        try:
            written = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in values.items()}
        except RecursionError:  # A field that could be read can be nested too deep to be written.
            raise InvalidRequest(f"The body is not valid JSON: {TOO_DEEP}.") from None
        fields = {**self.fields, **written}
        return RequestBody(msgspec.json.encode(fields), fields)


def is_true(value: object) -> bool:
    """Returns whether a value is true to pydantic, with which vLLM reads its requests."""
    return value in (True, 1) or (isinstance(value, str) and value.lower() in {"1", "on", "t", "true", "y", "yes"})


def _name(model: msgspec.Raw) -> str | None:
    if len(bytes(model)) > MOST_NAME_BYTES:
        text = f"The field 'model' has {len(bytes(model))} bytes, but names have at most {MOST_NAME_BYTES}."
        raise InvalidRequest(text, param="model")
    name = msgspec.json.decode(model)
    if name is not None and not isinstance(name, str):
        raise InvalidRequest(f"The field 'model' must be a string, not {type(name).__name__}.", param="model")
    return name


def _word(value: msgspec.Raw) -> object:
    """Returns a decoded short value, or None for a longer one."""
    return msgspec.json.decode(value) if len(bytes(value)) <= MOST_WORD_BYTES else None


def _whole(value: msgspec.Raw) -> int:
    """Returns a whole number above zero in any form that pydantic reads, such as 16.0 or "+1_6", or else 0."""
    try:
        return max(0, _WHOLE.validate_python(_word(value)))
    except (ValidationError, msgspec.ValidationError):  # The second one is for 1e999.
        return 0


def _prompts(prompt: msgspec.Raw) -> int:
    """Returns how many prompts this JSON has, without building them. A list of numbers, that is token ids, is one."""
    text = bytes(prompt)
    if not text.startswith(b"["):
        return 1
    return census(text).items + 1 if b'"' in text else max(1, text.count(b"[") - 1)
