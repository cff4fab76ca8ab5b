"""Writes server-sent events whose name is their `type`, as Anthropic's Messages and OpenAI's Responses have them."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

Event = Mapping[str, Any]


def named_events(events: Iterable[Event]) -> bytes:
    """Returns the events as bytes, each with the value of its field `type` as its name."""
    return b"".join(
        f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
        for event in events
    )
