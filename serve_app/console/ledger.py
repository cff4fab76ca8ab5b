"""Keeps what this router saw: its requests, its traffic and its events, whether or not somebody watches.

Each call of the router costs some microseconds, and everything is bounded: requests and events by their number, and
traffic by the models that the directory knows.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from serve_app.console.events import Event, EventLog, Happened, Joined, Kind, model_events, residency_events
from serve_app.console.prompts import prompt_of
from serve_app.console.requests import MOST_REQUESTS, UNKNOWN, RequestLog, Row, is_error
from serve_app.console.shared import OtherRouter, Record, rings_of_all
from serve_app.console.snapshot import Queued
from serve_app.console.traffic import LATE_S, Rings, Traffic
from serve_app.errors import ModelUnavailable
from serve_app.router.console import RouterParts
from serve_app.router.exchange import Exchange
from serve_app.router.model_status import ModelStatus
from serve_app.wire.body import RequestBody
from serve_app.wire.body_threads import beside_loop

# What other routers are told of this one's requests and events.
MOST_SHARED_ROWS, MOST_SHARED_EVENTS = 100, 50
# The revisions of this router's requests and of those of the others.
Mark = tuple[int, int]
# A model that is gone is still counted for so many seconds, since Serve's status may be read late.
KEPT_S = 600.0
# What differs from an older reading has not happened now, so it is no event.
RECENT_S = 15.0
# It is known for so many seconds which events another router has told.
KEPT_HEARD_S = 3600.0


class Ledger:
    """Keeps the records of one router replica."""

    def __init__(self, parts: RouterParts, clock: Callable[[], float]):
        self._parts, self._clock = parts, clock
        self.requests = RequestLog(parts.replica, clock)
        self.traffic = Traffic(clock())
        self.events = EventLog()
        self.models: Mapping[str, ModelStatus] = {}
        self.others: Sequence[OtherRouter] = ()
        self._own_events: deque[Event] = deque(maxlen=MOST_SHARED_EVENTS)
        # The time of the last event of each other router that was told here, and when that router was heard last.
        self._heard: dict[bytes, tuple[float, float]] = {}
        self._other_rows: dict[int, tuple[int, Row]] = {}
        self._other_revision = 0
        self._joined = Joined()
        self._residency: Mapping[str, Sequence[str]] = {}
        self._is_known = False
        self._seen_at: dict[str, float] = {}
        self._active: dict[str, int] = {}

    def began(self, exchange: Exchange) -> None:
        """Notes a request."""
        self.requests.began(exchange)

    async def admitted(self, exchange: Exchange, body: RequestBody) -> None:
        """Keeps the beginning of a request's prompt."""
        running = self.requests.find(exchange)
        if running is not None:
            running.prompt = await beside_loop(len(body.content), partial(prompt_of, body))

    def retried(self, exchange: Exchange) -> None:
        """Notes that a request is sent again."""
        self._joined.add("retried", exchange.record.model)

    def resumed(self, exchange: Exchange) -> None:
        """Notes that another replica continues a stream."""
        self._joined.add("resumed", exchange.record.model)

    def ended(self, exchange: Exchange) -> None:
        """Notes that a request is over."""
        found = self.requests.ended(exchange)
        if found is None:
            return
        running, outcome = found
        now, model, code = self._clock(), exchange.record.model, exchange.downstream.error_code
        if model != UNKNOWN:
            is_stream = exchange.downstream.meter.is_stream  # Another answer comes whole, so it has no first token.
            first = exchange.timing.to_first_s if exchange.timing.first and is_stream else None
            self.traffic.ended(now, model, is_error(exchange), first)
            if is_stream:
                self.traffic.made(now, model, running.tokens(is_over=True))
            else:
                self.traffic.made_since(running.time, now, model, running.tokens(is_over=True))
        if outcome == "refused":
            self._joined.add("refused", "" if model == UNKNOWN else model, code or str(exchange.downstream.status))
        elif outcome == "failed" and code == ModelUnavailable.code:
            self._joined.add("lost", model)

    def refused(self, status: int) -> None:
        """Notes a request that the door refused."""
        self._joined.add("refused", "", str(status))

    def own(self, kind: Kind, model: str, text: str) -> None:
        """Adds an event that no other router sees, so that it is told to them."""
        self._own_events.append(self.events.add(self._clock(), kind, "" if model == UNKNOWN else model, text))

    def add(self, happened: Sequence[Happened]) -> None:
        """Adds events that every router sees by itself."""
        for each in happened:
            self.events.add(self._clock(), each.kind, each.model, each.text)

    async def tick(self) -> None:
        """Looks at the requests that run and at the models."""
        now = self._clock()
        self._count(now)
        models = dict(await self._parts.directory.models())
        models = {name: self._parts.directory.seen_from_outside(model) for name, model in models.items()}
        residency = self._parts.residency.states()
        if self._is_known:  # What is there at the start has not happened.
            self.add(model_events(self.models, models))
            self.add(residency_events(self._residency, residency))
        self.models, self._residency, self._is_known = models, residency, True
        for happened in self._joined.due(now):
            self.own(happened.kind, happened.model, happened.text)
        self._seen_at |= dict.fromkeys(models, now)
        self._seen_at = {name: at for name, at in self._seen_at.items() if now - at < KEPT_S}
        self.traffic.forget_all_but(self._seen_at)

    def _count(self, now: float) -> None:
        """Counts the tokens that streams have made since the last time, and the requests that run and wait."""
        active: dict[str, int] = {}
        for running in self.requests.running():
            model = running.exchange.record.model
            if model != UNKNOWN:
                active[model] = active.get(model, 0) + 1
                self.traffic.made(now, model, running.tokens(is_over=False))
        for model, count in active.items():
            self.traffic.seen(now, model, self._parts.forwarder.queued(model)["waiting"], count)
        self._active = active

    def queued(self) -> dict[str, Queued]:
        """Returns the requests of this router that wait, are held and run, by model."""
        found = {}
        for model in {*self._active, *self.models}:
            queued, active = self._parts.forwarder.queued(model), self._active.get(model, 0)
            if queued["waiting"] or queued["held"] or active:
                found[model] = Queued(queued["waiting"], queued["held"], active)
        return found

    def rings(self) -> Rings:
        """Returns the traffic of all routers."""
        return rings_of_all(self.traffic.rings(), self.others)

    def first_slot(self) -> int:
        """Returns the first interval that any router counted."""
        return min([self.traffic.first_slot, *(other.record.first_slot for other in self.others)])

    @property
    def mark(self) -> Mark:
        """Returns the mark of this moment, for `rows_since`."""
        return self.requests.revision, self._other_revision

    def rows_since(self, mark: Mark = (0, 0)) -> list[Row]:
        """Returns the requests of all routers that are new or have changed since a mark, up to `MOST_REQUESTS`, by
        their ids."""
        own = self.requests.rows(mark[0])
        if not self._other_rows:
            return own
        others = [row for revision, row in self._other_rows.values() if revision > mark[1]]
        return sorted([*own, *others], key=lambda row: row.id)[-MOST_REQUESTS:]

    def row_ids(self) -> frozenset[int]:
        """Returns the ids of all requests that are kept."""
        return frozenset(self.requests.ids()).union(self._other_rows)

    def record(self, since_slot: int) -> Record:
        """Returns what other routers are told, with the traffic from an interval on, or from an earlier one that has
        changed since."""
        since_slot = min([since_slot, *self.traffic.late(self._clock() - LATE_S)])
        return Record(
            self._clock(), self.traffic.first_slot, self.traffic.rings(since_slot), self.queued(),
            self.requests.rows()[-MOST_SHARED_ROWS:], list(self._own_events),
        )  # fmt: skip

    def heard(self, others: Mapping[bytes, OtherRouter]) -> None:
        """Takes over what other routers told, and adds their events that are new here."""
        self.others = tuple(others.values())
        rows = {row.id: row for other in self.others for row in other.record.rows}
        for number, row in rows.items():
            if number not in self._other_rows or self._other_rows[number][1] != row:
                self._other_revision += 1
                self._other_rows[number] = self._other_revision, row
        self._other_rows = {number: kept for number, kept in self._other_rows.items() if number in rows}
        for router, other in others.items():
            self._hear_events(router, other.record.events)
        now = self._clock()
        self._heard = {router: kept for router, kept in self._heard.items() if now - kept[1] < KEPT_HEARD_S}

    def _hear_events(self, router: bytes, events: Sequence[Event]) -> None:
        """Adds the events of a router that are new here. Of a router that was not known, only what has just happened is
        news. One that was silent for a while, or to which nobody listened, goes on where it was."""
        now = self._clock()
        last, _ = self._heard.get(router, (now - RECENT_S, now))
        for event in events:
            if event.time > last:
                self.events.add(event.time, event.kind, event.model, event.text)
        self._heard[router] = max([last, *(event.time for event in events)]), now
