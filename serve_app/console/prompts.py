"""Reads the beginning of a prompt from a request's body. It is used only where the config keeps prompts."""

from typing import Any

import msgspec

from serve_app.console.requests import MOST_PROMPT_CHARACTERS
from serve_app.errors import InvalidRequest
from serve_app.wire.body import RequestBody

# The fields that hold what a model is asked, in the order in which they are looked for.
FIELDS = ("messages", "prompt", "input", "query", "queries")
# A larger field is not decoded, because only its beginning would be kept.
MOST_FIELD_BYTES = 2**20


def prompt_of(body: RequestBody) -> str:
    """Returns the beginning of what a body asks: the last message of a conversation, or else the prompt or the input.
    It is empty if the body has none that can be read."""
    try:
        fields = body.fields
        raw = next((fields[name] for name in FIELDS if name in fields), None)
        if raw is None:
            return ""
        if len(bytes(raw)) > MOST_FIELD_BYTES:
            return "(too long to be shown)"
        return _text(msgspec.json.decode(raw))[:MOST_PROMPT_CHARACTERS]
    except (InvalidRequest, ValueError, RecursionError):
        return ""


def _text(value: Any) -> str:
    """Returns the text in a field, of a list that of its last item."""
    if isinstance(value, list):
        if value and all(isinstance(item, int) for item in value):
            return f"({len(value)} tokens)"
        return _text(value[-1]) if value else ""
    if isinstance(value, dict):
        return _text(value.get("content", value.get("text", "")))
    return value if isinstance(value, str) else ""
