"""Writes server-sent events whose name is their `type`, as Anthropic's Messages and OpenAI's Responses have them."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

Event = Mapping[str, Any]


def named_events(events: Iterable[Event]) -> bytes:
    """Returns the events as bytes, each with the value of its field `type` as its name."""
    return b"".join(
        b"event: %s\ndata: %s\n\n" % (event["type"].encode(), msgspec.json.encode(event)) for event in events
    )
