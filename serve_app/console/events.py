"""Has what happened, in sentences for a person: the last events, and which ones follow from two states. It is pure."""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "ready", "loading", "failed", "lost", "started", "scaled", "swapped", "resumed", "retried", "refused", "gone",
    "config",
]  # fmt: skip

# The events that are kept.
MOST_EVENTS = 200
# A text with more characters is cut.
MOST_TEXT = 500


@dataclass(frozen=True)
class Event:
    """This is one event. `model` is empty if it concerns no single model. `others` are further models that `text`
    names, so that only who may see all of them is shown it."""

    id: int
    time: float
    kind: Kind
    model: str
    text: str
    others: frozenset[str] = frozenset()


class EventLog:
    """Keeps the last events of one router replica."""

    def __init__(self, most: int = MOST_EVENTS):
        self._events: deque[Event] = deque(maxlen=most)
        self._last_id = 0

    def add(self, now: float, kind: Kind, model: str, text: str, others: Collection[str] = ()) -> Event:
        """Adds an event at the time `now`, in seconds since 1970."""
        self._last_id += 1
        shown = text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 1] + "…"
        event = Event(self._last_id, now, kind, model, shown, frozenset(others) - {model})
        self._events.append(event)
        return event

    def since(self, number: int = 0) -> list[Event]:
        """Returns the events with a larger id than this, the oldest first."""
        return [event for event in self._events if event.id > number]

    @property
    def last_id(self) -> int:
        """Returns the id of the last event, or 0 if there was none."""
        return self._last_id
