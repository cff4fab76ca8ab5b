"""Keeps the last requests of one router replica with their times and outcomes, and those that run.

Nothing of a prompt is kept unless the config says so. A request that is over is kept as plain values, so nothing of its
connection stays.
"""

import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

import msgspec

from serve_app.router.exchange import Exchange
from serve_app.wire.usage import Usage

MOST_REQUESTS = 200
MOST_PROMPT_CHARACTERS = 2000
# Texts that a client chose are cut after so many characters.
MOST_TEXT = 200
# Ids are microseconds since 1970 in steps of this, and the place within a step is the router's, so that the ids of
# several routers differ. They stay below 2^53, which JavaScript counts exactly.
ID_STEP = 64

# The model of a request whose model was not found, or not looked for yet.
UNKNOWN = "unknown"

Outcome = Literal["running", "ok", "refused", "failed", "left"]


class Row(msgspec.Struct, omit_defaults=False):
    """This is one request. Times are in milliseconds, except for `time`, which is in seconds since 1970. `model` is
    "unknown" until the model was found."""

    id: int
    request_id: str
    time: float
    model: str
    path: str
    status: int | None
    outcome: Outcome
    error_code: str | None
    key: str | None
    streamed: bool
    retries: int
    resumes: int
    queue_ms: float | None
    first_ms: float | None
    total_ms: float | None
    prompt_tokens: int | None
    completion_tokens: int | None
    prompt: str | msgspec.UnsetType = msgspec.UNSET


class Running:
    """This is a request that is not over. `counted` are the tokens of its answer that were counted already."""

    __slots__ = ("counted", "exchange", "id", "prompt", "row", "time")

    def __init__(self, number: int, now: float, exchange: Exchange):
        self.id, self.time, self.exchange = number, now, exchange
        self.row: Row | None = None
        self.prompt = ""
        self.counted = 0

    def tokens(self, is_over: bool) -> int:
        """Returns the tokens of the answer that were not counted yet, by its events while it streams, and by its usage
        at the end, if it has one. Those of an answer that comes whole count at its end alone."""
        meter = self.exchange.downstream.meter
        if not is_over and not meter.is_stream:
            return 0
        said = meter.usage.completion
        made = (said or meter.events) if is_over else max(said, meter.events)
        new = max(0, made - self.counted)
        self.counted += new
        return new


class Ended:
    """This is a request that is over. What is shown of it is taken from its exchange at once, which must not be kept.
    It is made into a row only if somebody looks."""

    __slots__ = ("_facts", "_row", "outcome")

    def __init__(self, running: Running):
        self._facts = _facts(running)
        self.outcome = outcome_of(running.exchange)
        self._row: Row | None = None

    @property
    def row(self) -> Row:
        """Returns it as it is shown."""
        if self._row is None:
            self._row = _row(self._facts, self.outcome)
        return self._row


class RequestLog:
    """Keeps the last `MOST_REQUESTS` requests by their ids. `router` is the router's name."""

    def __init__(self, router: str, clock: Callable[[], float] = time.time):
        self._clock = clock
        self._place = zlib.crc32(router.encode()) % ID_STEP
        self._last_id = 0
        self._rows: OrderedDict[int, Running | Ended] = OrderedDict()
        self._revisions: dict[int, int] = {}
        self._running: dict[int, Running] = {}
        self.revision = 0

    def began(self, exchange: Exchange) -> None:
        """Adds a request."""
        now = self._clock()
        number = max(int(now * 1e6) // ID_STEP * ID_STEP + self._place, self._last_id + ID_STEP)
        self._last_id = number
        running = Running(number, now, exchange)
        self._running[id(exchange)] = running
        self._rows[number] = running
        self._changed(number)
        if len(self._rows) > MOST_REQUESTS:
            old, _ = self._rows.popitem(last=False)
            self._revisions.pop(old, None)

    def find(self, exchange: Exchange) -> Running | None:
        """Returns a request that runs."""
        return self._running.get(id(exchange))

    def ended(self, exchange: Exchange) -> tuple[Running, Outcome] | None:
        """Notes that a request is over, and returns it with its outcome, or None if it did not begin here."""
        running = self._running.pop(id(exchange), None)
        if running is None:
            return None
        ended = Ended(running)
        if running.id in self._rows:
            self._rows[running.id] = ended
            self._changed(running.id)
        return running, ended.outcome

    def running(self) -> Collection[Running]:
        """Returns all requests that run, also those that are too old to be shown."""
        return self._running.values()

    def ids(self) -> Collection[int]:
        """Returns the ids of all requests that are kept."""
        return self._rows.keys()

    def rows(self, since: int = 0) -> list[Row]:
        """Returns the requests that are new or have changed since a `revision`, the oldest first."""
        for number, kept in self._rows.items():
            if isinstance(kept, Running):
                row = _row(_facts(kept), "running")
                if row != kept.row:
                    kept.row = row
                    self._changed(number)
        changed = (kept for number, kept in self._rows.items() if self._revisions[number] > since)
        rows = (kept.row for kept in changed)
        return [row for row in rows if row is not None]

    def _changed(self, number: int) -> None:
        self.revision += 1
        self._revisions[number] = self.revision


class _Facts(NamedTuple):
    """These are the values of a request that a row is made of."""

    id: int
    time: float
    request_id: str
    path: str
    model: str
    key: str | None
    retries: int
    resumes: int
    status: int
    error_code: str | None
    streamed: bool
    usage: Usage
    queued_s: float | None
    first_s: float | None
    total_ms: float
    prompt: str


def _facts(running: Running) -> _Facts:
    exchange = running.exchange
    record, timing, downstream = exchange.record, exchange.timing, exchange.downstream
    return _Facts(
        running.id,
        running.time,
        record.request_id[:MOST_TEXT],
        record.path[:MOST_TEXT],
        record.model,
        record.key,
        record.retries,
        record.resumes,
        downstream.status,
        downstream.error_code,
        downstream.meter.is_stream,
        downstream.meter.usage,
        timing.queued_s if timing.sent and timing.read else None,
        timing.to_first_s if timing.first else None,
        timing.total_ms,
        running.prompt,
    )


def _row(facts: _Facts, outcome: Outcome) -> Row:
    """Returns a request as it is shown. Its total time and its tokens are known once it is over."""
    is_over, usage = outcome != "running", facts.usage
    return Row(
        id=facts.id,
        request_id=facts.request_id,
        time=round(facts.time, 3),
        model=facts.model,
        path=facts.path,
        status=facts.status or None,
        outcome=outcome,
        error_code=facts.error_code,
        key=facts.key,
        streamed=facts.streamed,
        retries=facts.retries,
        resumes=facts.resumes,
        queue_ms=None if facts.queued_s is None else round(1000 * facts.queued_s, 1),
        first_ms=None if facts.first_s is None else round(1000 * facts.first_s, 1),
        total_ms=facts.total_ms if is_over else None,
        prompt_tokens=(usage.prompt or None) if is_over else None,
        completion_tokens=(usage.completion or None) if is_over else None,
        prompt=facts.prompt or msgspec.UNSET,
    )


def outcome_of(exchange: Exchange) -> Outcome:
    """Returns how a request ended. It was refused if it was answered by an error below 500, or before a replica was
    sent it."""
    downstream = exchange.downstream
    if downstream.has_left:
        return "left"
    code = downstream.error_status or downstream.status
    if code < 400:
        return "ok"
    return "refused" if code < 500 or not exchange.timing.sent else "failed"


def is_error(exchange: Exchange) -> bool:
    """Returns whether a request counts as an error of its model: it failed, or there was no room for it. What a client
    did wrong does not count."""
    downstream = exchange.downstream
    code = downstream.error_status or downstream.status
    return code >= 500 or code == 429
