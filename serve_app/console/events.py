"""Has what happened, in sentences for a person: the last events, and which ones follow from two states. It is pure."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from serve_app.router.model_status import ModelStatus
from serve_app.status.cluster_status import ClusterStatus, ModelView

Kind = Literal[
    "ready", "loading", "failed", "lost", "started", "scaled", "swapped", "resumed", "retried", "refused", "gone",
    "config",
]  # fmt: skip

# The events that are kept.
MOST_EVENTS = 200
# A text with more characters is cut.
MOST_TEXT = 500
# What happens to many requests is told at this interval in seconds.
JOINED_EVERY_S = 10.0


@dataclass(frozen=True)
class Event:
    """This is one event. `id` rises from event to event. `model` is empty if it concerns no single model. `others` are
    further models that `text` names, so that only who may see all of them is shown it."""

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
        """Adds an event at the time `now`, in seconds since 1970. Its id is the time in microseconds, or more if that
        is taken, so that who sees a part of the events cannot count the others."""
        self._last_id = max(int(now * 1e6), self._last_id + 1)
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


@dataclass(frozen=True)
class Happened:
    """This is an event before it has a number and a time."""

    kind: Kind
    model: str
    text: str


def model_events(before: Mapping[str, ModelStatus], after: Mapping[str, ModelStatus]) -> list[Happened]:
    """Returns what happened to models and adapters between two readings of the directory."""
    found = [
        Happened("gone", name, f"{_what(status)} {name} was removed.")
        for name, status in before.items()
        if name not in after
    ]
    for name, now in after.items():
        then = before.get(name)
        if then is None:
            is_ready = now.state == "ready"
            state = "ready." if is_ready else f"{_state_text(now)}."
            found.append(Happened("ready" if is_ready else "config", name, f"{_what(now)} {name} is new and {state}"))
        elif then.state != now.state or (now.state == "failed" and then.message != now.message and now.message):
            found.append(_change_of(name, now))
    return found


def _what(status: ModelStatus) -> str:
    return f"The adapter of {status.parent}" if status.parent else "The model"


def _state_text(status: ModelStatus) -> str:
    return f"{status.state}: {status.message}" if status.message else status.state


def _change_of(name: str, now: ModelStatus) -> Happened:
    replicas = f" with {now.replicas} replica{'' if now.replicas == 1 else 's'}" if now.replicas else ""
    why = f": {now.message}" if now.message else "."
    if now.state == "ready":
        return Happened("ready", name, f"{name} is ready{replicas}.")
    if now.state == "loading":
        return Happened("loading", name, f"{name} is loading{why}")
    if now.state == "failed":
        return Happened("failed", name, f"{name} has failed{why}")
    if now.state == "asleep":
        return Happened("scaled", name, f"{name} is asleep, because it has no replica. The first request wakes it.")
    return Happened("gone", name, f"{name} is being removed.")


def residency_events(before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]]) -> list[Happened]:
    """Returns what happened to models that share memory, between two readings of the states of their replicas."""
    found = []
    for name, states in after.items():
        then = before.get(name)
        if then is None or list(then) == list(states):
            continue
        was, now = "resident" in then, "resident" in states
        if now and not was:
            found.append(Happened("swapped", name, f"{name} holds its memory now."))
        elif was and not now:
            found.append(Happened("swapped", name, f"{name} gives back its memory to its pool."))
    return found


# In these states of a deployment, Serve itself replaces or stops replicas. Such a replica is STOPPING for at least two
# seconds, which a reading at each tick sees. One that dies in these states is gone at once.
_SERVE_STOPS = frozenset({"UPDATING", "UPSCALING", "DOWNSCALING"})
_RUNS = "RUNNING"


def cluster_events(before: ClusterStatus, after: ClusterStatus, statuses: Mapping[str, str]) -> list[Happened]:
    """Returns what happened to replicas and nodes between two states of a cluster. `statuses` has Serve's status of
    each model's deployment after it."""
    found = [Happened("gone", "", f"The node {text} is gone.") for text in after.gone if text not in before.gone]
    known = {node.name for node in before.nodes}
    found += [
        Happened("started", "", f"The node {node.name} has joined.") for node in after.nodes if node.name not in known
    ]
    then_by_name = {model.name: model for model in before.models}
    for model in after.models:
        then = then_by_name.get(model.name)
        if then is not None:
            found += _replica_events(then, model, statuses.get(model.name, ""))
    return found


def _replica_events(then: ModelView, now: ModelView, status: str) -> Iterator[Happened]:
    name = now.name
    if now.wanted != then.wanted and then.state != "stopping":
        yield Happened("scaled", name, f"{name} should have {_replicas(now.wanted)} instead of {then.wanted}.")
    ran = {view.replica for view in then.replicas if view.state == _RUNS}
    runs = {view.replica for view in now.replicas if view.state == _RUNS}
    is_there = {view.replica for view in now.replicas}
    are_fewer = now.state == "stopping" or now.wanted < then.wanted
    for replica in sorted(ran - runs):
        if are_fewer or (status in _SERVE_STOPS and replica in is_there):
            yield Happened("scaled", name, f"The replica {replica} of {name} stops.")
        else:
            yield Happened("lost", name, f"The replica {replica} of {name} was lost.")
    if then.state == "ready":  # Otherwise the model itself becomes ready.
        for replica in sorted(runs - ran):
            yield Happened("started", name, f"The replica {replica} of {name} runs.")


def _replicas(count: int) -> str:
    return f"{count} replica{'' if count == 1 else 's'}"


class Joined:
    """Joins what happens to many requests, so that a flood of them is no flood of events: the first one is told at
    once, and the others of the same kind, model and code each `JOINED_EVERY_S`, with their number."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Kind, str, str], int] = {}
        self._told_at: dict[tuple[Kind, str, str], float] = {}

    def add(self, kind: Kind, model: str, code: str = "") -> None:
        """Counts a request. `code` says why it was refused."""
        what = kind, model, code
        if len(self._counts) < MOST_EVENTS or what in self._counts:
            self._counts[what] = self._counts.get(what, 0) + 1

    def due(self, now: float) -> list[Happened]:
        """Returns the events that are due."""
        self._told_at = {what: at for what, at in self._told_at.items() if now - at < JOINED_EVERY_S}
        due = {what: count for what, count in self._counts.items() if what not in self._told_at}
        for what in due:
            del self._counts[what]
            self._told_at[what] = now
        return [Happened(kind, model, _joined(kind, model, code, count)) for (kind, model, code), count in due.items()]


def _joined(kind: Kind, model: str, code: str, count: int) -> str:
    many = count != 1
    whose = f" for {model}" if model else ""
    requests = f"{count} requests{whose} were" if many else f"1 request{whose} was"
    if kind == "refused":
        return f"{requests} refused ({code})."
    if kind == "retried":
        return f"{requests} sent again, because {'their' if many else 'its'} replica was lost."
    if kind == "resumed":
        streams = f"{count} streams of {model} go on" if many else f"1 stream of {model} goes on"
        return f"{streams} at another replica, because {'their' if many else 'its'} replica was lost."
    return f"{count} answer{'s' if many else ''} of {model} ended with an error, because a replica was lost."
