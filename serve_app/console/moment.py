"""Makes what pages are sent: the whole state of a moment, or what is new since an earlier one. It is pure, and nothing
of a `Moment` changes later, so this runs beside the event loop.

Nodes and models are told one by one. A page has of each what it was told last, and a delta has those that are new or
have changed since, and the ids and names of those that are gone. Of requests it has some (`row_news.py`).
"""

import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import msgspec

from serve_app import __version__
from serve_app.console.actions import may_all, possible
from serve_app.console.events import Event
from serve_app.console.requests import Row
from serve_app.console.row_news import RowNews, row_news, running_in
from serve_app.console.snapshot import Placed, Snapshot, event_json, models_json, nodes_json, placed_nodes
from serve_app.console.traffic import INTERVAL_S, Rings, Series, slot_of, whole_series
from serve_app.console.view import Seen, View
from serve_app.router.model_status import ModelStatus

_ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True)
class Moment:
    """This is what one router knows at the time `time`, in seconds since 1970. `residency` has the states of the
    replicas of models that share memory, `rings` the traffic of all routers from `first_slot` on, and `events` and
    `rows` the last events and requests."""

    time: float
    router: str
    keeps_prompts: bool
    models: Mapping[str, ModelStatus]
    snapshot: Snapshot | None
    residency: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rings: Rings = field(default_factory=dict)
    first_slot: int = 0
    events: Sequence[Event] = ()
    rows: Sequence[Row] = ()

    @cached_property
    def placed(self) -> Sequence[Placed]:
        """Returns the nodes with what is on them, which all views have in common."""
        return () if self.snapshot is None else placed_nodes(self.snapshot)

    def can(self, name: str) -> Sequence[str]:
        """Returns what an admin can do with a model."""
        model = self.models.get(name)
        return () if model is None else possible(model, self.residency.get(name, ()))


@dataclass(frozen=True)
class Told:
    """This is what the pages of one view have: each node by its id and each model by its name, as JSON, and the ids of
    requests that they show as running."""

    nodes: Mapping[str, bytes] = field(default_factory=dict)
    models: Mapping[str, bytes] = field(default_factory=dict)
    running: frozenset[int] = frozenset()


@dataclass(frozen=True)
class News:
    """This is what is new since the last delta: the values of the intervals since then, events, and requests. `kept`
    are the ids of all requests that the router still has."""

    values: Mapping[int, Mapping[str, Series]]
    events: Sequence[Event] = ()
    rows: Sequence[Row] = ()
    kept: Set[int] = frozenset()


@dataclass(frozen=True)
class Made:
    """This is what each view is told, what its pages have then, and the CPU time in seconds that making it took."""

    deltas: Mapping[View, bytes]
    told: Mapping[View, Told]
    cpu_s: float


def told_of(moment: Moment, seen: Seen) -> Told:
    """Returns the nodes and models of a moment as a view has them."""
    if moment.snapshot is None:
        return Told()
    nodes, models = nodes_json(moment.placed, seen), models_json(moment.snapshot, seen, moment.can)
    return Told(_encoded(nodes, "id"), _encoded(models, "name"))


def deltas_for(moment: Moment, news: News, before: Mapping[View, Told | None]) -> Made:
    """Returns what is new for each of these views, which have what `before` says. A view that has nothing yet is told
    everything."""
    began = time.thread_time()
    deltas, told = {}, {}
    for view, had in before.items():
        seen, has = view.seen(moment.models), had or Told()
        rows = row_news(seen.rows(news.rows), news.kept, has.running)
        told[view] = replace(told_of(moment, seen), running=rows.running)
        deltas[view] = b"".join(
            event_bytes("delta", _ENCODER.encode(each)) for each in _deltas(moment, news, seen, has, told[view], rows)
        )
    return Made(deltas, told, time.thread_time() - began)


def state_of(moment: Moment, view: View, told: Told | None = None, last_event: int | None = None) -> tuple[bytes, Told]:
    """Returns the whole state as JSON, and the nodes and models in it: those of the moment, or `told` if the view's
    pages have that. Events after `last_event` are left out, because a delta will tell them."""
    seen, key = view.seen(moment.models), view.key
    rows = seen.rows(moment.rows)
    shown = told_of(moment, seen) if told is None else told
    shown = replace(shown, running=shown.running | running_in(rows))
    series = whole_series(moment.rings, moment.time, moment.first_slot)
    events = [event for event in moment.events if last_event is None or event.id <= last_event]
    state = {
        "version": __version__,
        "time": round(moment.time, 3),
        "router": moment.router,
        "access": {
            "keys": key is not None,
            "key": None if key is None else key.name,
            "is_admin": view.is_admin,
            "may_plan": may_all(view.is_admin, key),
            "may_reload": may_all(view.is_admin, key),
            "keeps_prompts": moment.keeps_prompts,
        },
        "nodes": _raw(shown.nodes.values()),
        "models": _raw(shown.models.values()),
        "traffic": {
            "interval_s": INTERVAL_S,
            "slot": slot_of(moment.time),
            "models": {name: values for name, values in series.items() if seen.name(name)},
        },
        "events": [event_json(event) for event in seen.events(events)],
        "requests": rows,
    }
    return _ENCODER.encode(state), shown


def event_bytes(name: str, content: bytes) -> bytes:
    """Returns a server-sent event."""
    return b"event: " + name.encode() + b"\ndata: " + content + b"\n\n"


def _deltas(moment: Moment, news: News, seen: Seen, had: Told, has: Told, rows: RowNews) -> list[dict[str, Any]]:
    """Returns what is new for one view: the last values of intervals that have ended, and then the rest."""
    *ended, current = [
        {
            "time": round(moment.time, 3),
            "traffic": {"slot": slot, "models": {name: v for name, v in found.items() if seen.name(name)}},
        }
        for slot, found in news.values.items()
    ]
    for name, old, new in (("nodes", had.nodes, has.nodes), ("models", had.models, has.models)):
        if changed := [content for key, content in new.items() if old.get(key) != content]:
            current[name] = _raw(changed)
        if gone := [key for key in old if key not in new]:
            current[f"gone_{name}"] = gone
    if shown := seen.events(news.events):
        current["events"] = [event_json(event) for event in shown]
    for name, found in (
        ("requests", rows.rows), ("gone_requests", rows.gone), ("requests_left_out", rows.left_out),
    ):  # fmt: skip
        if found:
            current[name] = found
    return [*ended, current]


def _encoded(items: Iterable[Mapping[str, Any]], key: str) -> dict[str, bytes]:
    return {item[key]: _ENCODER.encode(item) for item in items}


def _raw(items: Iterable[bytes]) -> msgspec.Raw:
    return msgspec.Raw(b"[" + b",".join(items) + b"]")
