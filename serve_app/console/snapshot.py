"""Makes the state that the console shows from what was read. It is pure."""

from collections.abc import Iterable, Mapping
from typing import Any

from serve_app import __version__
from serve_app.console.events import Event
from serve_app.console.view import View

# The length of an entry of the traffic in seconds.
INTERVAL_S = 5


def state_of(view: View, router: str, now: float, keeps_prompts: bool, events: Iterable[Event]) -> Mapping[str, Any]:
    """Returns the whole state as JSON takes it."""
    return {
        "version": __version__,
        "time": now,
        "router": router,
        "access": {
            "keys": view.key is not None,
            "key": None if view.key is None else view.key.name,
            "is_admin": view.is_admin,
            "keeps_prompts": keeps_prompts,
        },
        "nodes": [],
        "models": [],
        "traffic": {"interval_s": INTERVAL_S, "slot": int(now // INTERVAL_S), "models": {}},
        "events": [event_json(event) for event in events if view.sees_all],
        "requests": [],
    }


def event_json(event: Event) -> Mapping[str, Any]:
    """Returns an event as JSON takes it."""
    return {"id": event.id, "time": event.time, "kind": event.kind, "model": event.model, "text": event.text}
