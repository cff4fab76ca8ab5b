"""Holds the numbers of a request to bounds, in whatever way they are written. It is pure.

vLLM reads its fields with pydantic, which takes " +1_0 " and "5.0" for numbers, and passes them on to its engine's
process, where a number that does not fit the engine's arrays is an error that ends all answers. So pydantic reads each
of these fields here too, and then it is bounded. What pydantic does not take, vLLM refuses in its own words.
"""

import math
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from pydantic import TypeAdapter, ValidationError

from serve_app.errors import InvalidRequest

# A number has at most this many bytes of JSON. A longer text is not a number.
MOST_NUMBER_BYTES = 100
# vLLM packs whole numbers into 64 bits.
MOST_WHOLE = 2**63
# One prompt may have this many choices, as with OpenAI. vLLM would take 16,384 of them.
MOST_CHOICES = 128
# The choices of one prompt have seeds that follow each other, and the engine keeps them in 64 bits.
MOST_SEED = MOST_WHOLE - MOST_CHOICES

WHOLE_NUMBERS = frozenset({
    "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "max_tool_calls", "top_k", "logprobs",
    "top_logprobs", "prompt_logprobs", "seed", "truncate_prompt_tokens", "thinking_token_budget", "stream_interval",
    "routed_experts_prompt_start", "priority", "dimensions", "top_n", "max_tokens_per_query", "max_tokens_per_doc",
})  # fmt: skip
FRACTIONS = frozenset({
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty",
})  # fmt: skip
# A list may have this many numbers. The engine has arrays of this length for each request. The one for stop ids has 128
# places, of which the model's own take some.
MOST_IN_LIST = {"stop_token_ids": 100, "allowed_token_ids": 1024, "logprob_token_ids": 128}
# These bound `repetition_detection`. Each token is compared with that many patterns between two steps of the engine.
MOST_IN_REPETITION = {"max_pattern_size": 64, "min_pattern_size": 64, "min_count": 64}

Number = TypeVar("Number", int, float)
_WHOLE = TypeAdapter(int)
_FRACTION = TypeAdapter(float)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def require_bounded_numbers(fields: Mapping[str, msgspec.Raw]) -> None:
    """Raises InvalidRequest, which names the field, if a number is out of bounds."""
    for name, value in fields.items():
        if name in WHOLE_NUMBERS:
            _require_whole(name, value, MOST_SEED if name == "seed" else MOST_WHOLE)
        elif name in FRACTIONS:
            _require_fraction(name, value)
        elif name in MOST_IN_LIST:
            _require_short(name, value, MOST_IN_LIST[name])
        elif name == "repetition_detection" and bytes(value).startswith(b"{"):
            _require_cheap(value)


def _require_cheap(repetition: msgspec.Raw) -> None:
    try:
        parts = _FIELDS.decode(repetition)
    except ValueError:  # The text is not UTF-8, which vLLM refuses.
        return
    for part, number in parts.items():
        if part in MOST_IN_REPETITION:
            _require_whole(f"repetition_detection.{part}", number, MOST_IN_REPETITION[part] + 1)


def _require_whole(name: str, value: msgspec.Raw, bound: int) -> None:
    number = _read(name, value, _WHOLE)
    if number is not None and abs(number) >= bound:
        raise InvalidRequest(f"'{name}' must be below {bound}.", param=name)


def _require_fraction(name: str, value: msgspec.Raw) -> None:
    number = _read(name, value, _FRACTION)
    if number is not None and not math.isfinite(number):
        raise InvalidRequest(f"'{name}' must be a finite number.", param=name)


def _require_short(name: str, value: msgspec.Raw, most: int) -> None:
    count = bytes(value).count(b",") + 1
    if count > most:
        raise InvalidRequest(f"'{name}' has {count} entries, but at most {most} are allowed.", param=name)


def _read(name: str, value: msgspec.Raw, reader: TypeAdapter[Number]) -> Number | None:
    """Returns the value as vLLM reads it, or None if vLLM refuses it or the field is left out."""
    if len(bytes(value)) > MOST_NUMBER_BYTES:
        raise InvalidRequest(f"'{name}' must be a number of at most {MOST_NUMBER_BYTES} characters.", param=name)
    try:
        return reader.validate_python(msgspec.json.decode(value))
    except ValidationError:
        return None
    except ValueError:  # The text is not UTF-8, or is 1e999, which Python reads as infinity.
        raise InvalidRequest(f"'{name}' must be a finite number.", param=name) from None
