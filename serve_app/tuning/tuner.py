"""Measures points of a space one after another, until the best is found and confirmed or the time is over."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol, Self

from serve_app.errors import ConfigError
from serve_app.tuning.journal import Journal, Purpose, Trial
from serve_app.tuning.kept_serve import KeptServe
from serve_app.tuning.load import Target, run_level
from serve_app.tuning.measurement import Level, Measurement
from serve_app.tuning.objective import Objective, Score, broken, rank
from serve_app.tuning.own_serve import StartError
from serve_app.tuning.served_file import document_of
from serve_app.tuning.space import Point, Space
from serve_app.tuning.strategy import next_start
from serve_app.tuning.verdict import Verdict, score_of, verdict
from serve_app.tuning.workload import Workload

# A trial whose first level shows less than this share of the best score is not measured further.
HOPELESS = 0.75
# The first look at a level takes this share of its time.
PROBE = 0.4
# Until a trial has been measured, one is taken to last so many seconds, beside its load.
GUESSED_START_S = 60.0
# No trial is taken to last less than this.
LEAST_TRIAL_S = 0.001
# A start may take so many seconds even if the budget ends meanwhile.
LEAST_START_S = 60.0


@dataclass(frozen=True)
class Task:
    """This is what is to be done. `document` is the config file, and `models` are those that are tuned, each with its
    workload and the size of its vocabulary. Times are in seconds: each level is sent for `warm_up_s` before it is
    measured for `measure_s`. Before all of them, the highest one is sent for `first_load_s` more than its first look
    takes. `room` says why the planned memory of a point is not free now, or has an empty text; it is waited for
    `room_timeout_s`."""

    document: Mapping[str, Any]
    models: tuple[str, ...]
    objective: Objective
    workloads: Mapping[str, Workload]
    vocabularies: Mapping[str, int]
    levels: tuple[Level, ...]
    space: Space
    budget_s: float
    max_starts: int
    warm_up_s: float = 2.0
    measure_s: float = 10.0
    first_load_s: float = 3.0
    start_timeout_s: float = 900.0
    room: Callable[[Point], str] = lambda point: ""
    room_timeout_s: float = 60.0

    @property
    def load_s(self) -> float:
        """Returns the seconds of load of a whole trial."""
        first = self.first_load_s + self.warm_up_s + PROBE * self.measure_s
        return first + len(self.levels) * (self.warm_up_s + self.measure_s)


class Served(Protocol):
    """These are models that are served, as `KeptServe` serves them."""

    @property
    def url(self) -> str:
        """Returns their address."""

    def wait_until_ready(self, timeout_s: float) -> None:
        """Returns when all serve. Raises StartError."""

    def replicas(self) -> frozenset[int]:
        """Returns the pids of their replicas."""

    def status(self) -> dict[str, Any]:
        """Returns what `serve-app status --json` says."""

    def stop(self) -> None:
        """Ends them."""


class Server(Protocol):
    """Serves one file after another, as `KeptServe` does."""

    def serve(self, document: Mapping[str, Any], models: Sequence[str]) -> Served:
        """Begins to serve the models of a file. Raises StartError."""

    def close(self) -> None:
        """Ends everything."""


class View(Protocol):
    """Shows how it goes."""

    def began(self, trial: Trial, number: int, left_s: float) -> None:
        """Is told of each start, of its number, and of the seconds that are left of the budget."""

    def measured(self, found: Measurement) -> None:
        """Is told of each level."""

    def ended(self, trial: Trial, worth: Score) -> None:
        """Is told of each trial that has ended."""

    def cut(self, trial: Trial) -> None:
        """Is told of a trial whose models were not ready when the budget was over. It is not kept."""


class BudgetOver(Exception):
    """The budget was over before the models were ready, which says nothing of their settings."""


# Sends a level of load, as `run_level` does.
Send = Callable[[Target, Workload, Level, float, float, asyncio.Barrier | None], Awaitable[Measurement]]


class Tuner:
    """Does a task. It goes on from the trials that the journal has. It has to be closed, whatever happens."""

    def __init__(self, task: Task, journal: Journal, view: View, server: Server | None = None, send: Send = run_level):
        self._task, self._journal, self._view, self._send = task, journal, view, send
        self._server = server or KeptServe()
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    @property
    def space(self) -> Space:
        """Returns the points that may be measured."""
        return self._task.space

    @property
    def verdict(self) -> Verdict:
        """Returns which point is the best by what was measured so far."""
        return verdict(self._task.objective, self._task.space, self._journal.trials)

    def run(self) -> Verdict:
        """Measures until the end, and returns which point is the best. An exception leaves what was measured in the
        journal."""
        while (found := self._next()) is not None:
            point, purpose = found
            try:
                self._journal.add(self.measure(point, purpose))
            except BudgetOver:
                self._view.cut(Trial(point, purpose, "failed"))
                break
            self._view.ended(self._journal.trials[-1], score_of(self._task.objective, self._journal.trials[-1]))
        return self.verdict

    def _next(self) -> tuple[Point, Purpose] | None:
        task = self._task
        return next_start(task.objective, task.space, self._journal.trials, task.max_starts, self._in_time())

    def _in_time(self) -> int:
        """Returns how many more starts end within the budget, by the usual time of those before."""
        trials = [trial.total_s for trial in self._journal.trials]
        each = sorted(trials)[len(trials) // 2] if trials else GUESSED_START_S + self._task.load_s
        return max(0, math.floor(self._left_s() / max(each, LEAST_TRIAL_S)))

    def _left_s(self) -> float:
        return self._task.budget_s - (time.monotonic() - self._began)

    def measure(self, point: Point, purpose: Purpose) -> Trial:
        """Serves a point, sends it all levels, and returns what came out of it. Raises BudgetOver."""
        begin = time.monotonic()
        trial = Trial(point, purpose, "done", at=datetime.now(UTC).isoformat(timespec="seconds"))
        self._view.began(trial, len(self._journal.trials) + 1, self._left_s())
        try:
            with self._served(point) as serve:
                trial = replace(trial, start_s=time.monotonic() - begin)
                trial = self._loaded(serve, trial)
                if trial.status == "failed":
                    self._server.close()
        except StartError as error:
            if self._left_s() <= 0 and time.monotonic() - begin < self._task.start_timeout_s:
                raise BudgetOver from None
            trial = replace(trial, status="failed", why=str(error))
        return replace(trial, total_s=time.monotonic() - begin)

    @contextmanager
    def _served(self, point: Point) -> Iterator[Served]:
        self._require_room(point)
        try:
            serve = self._server.serve(document_of(self._task.document, self._task.models, point), self._task.models)
            left = max(self._left_s(), LEAST_START_S)
            serve.wait_until_ready(min(self._task.start_timeout_s, left))
            yield serve
        except BaseException:  # Ctrl-C is one.
            self._server.close()
            raise
        serve.stop()

    def _require_room(self, point: Point) -> None:
        """Waits until the planned memory of a point is free. Raises ConfigError if others have it."""
        if not self._task.room(point):
            return
        self._server.close()  # The Ray of the trial before holds memory too.
        deadline = time.monotonic() + self._task.room_timeout_s
        while why := self._task.room(point):
            if time.monotonic() >= deadline:
                raise ConfigError(f"tune: the planned memory is not free now, so nothing more is started: {why}")
            time.sleep(1)

    def _loaded(self, serve: Served, trial: Trial) -> Trial:
        """Sends the levels in turn. What cannot become the best is ended after the first look at it."""
        before = serve.replicas()
        found: list[Measurement] = []
        status, why = trial.status, self._warmed_up(serve, trial.purpose, found)
        if why:
            status = "stopped"
        else:
            found += self._all_levels(serve)
        held = tuple(_held(serve.status(), self._task.models))
        if serve.replicas() != before:
            status, why = "failed", "a replica died under load"
        elif found and not any(_is_clean(found, level) for level in {item.level for item in found}):
            status, why = "failed", next(broken(self._task.objective, item) for item in found if item.errors)
        return replace(trial, measurements=tuple(found), status=status, why=why, memory=held)

    def _all_levels(self, serve: Served) -> list[Measurement]:
        """Sends all levels. A rising load ends where it breaks a limit or requests fail, and one that falls goes on to
        the next lower level then."""
        found: list[Measurement] = []
        is_over: set[bool] = set()
        for level in self._levels():
            kind = level.rate > 0
            if kind in is_over:
                continue
            now = self._level(serve, level, 0.0, 1.0)
            found += now
            if self._rises and any(broken(self._task.objective, item) for item in now):
                is_over.add(kind)
        return found

    @property
    def _rises(self) -> bool:
        return self._task.objective.has_limits or self._task.objective.kind == "latency"

    def _levels(self) -> list[Level]:
        """Returns the levels in the order in which they are sent: the one that decides first. With limits, the load
        rises until one is broken."""
        rising = sorted(self._task.levels, key=rank)
        return rising if self._rises else rising[::-1]

    def _warmed_up(self, serve: Served, purpose: Purpose, found: list[Measurement]) -> str:
        """Sends the highest level for a short time, because the first requests after a start compile and fill caches.
        Returns why a point is not measured further, or an empty text. What was seen is added to `found` then."""
        level = max(self._task.levels, key=rank)
        seen = self._level(serve, level, self._task.first_load_s, PROBE)
        if purpose == "confirm" or self._task.objective.kind != "throughput" or self._task.objective.has_limits:
            return ""  # Another level decides.
        best = max((_at_level(trial, level) for trial in self._journal.trials), default=0.0)
        worth = 0.0 if any(item.errors for item in seen) else _rate(seen, level)
        if worth == 0.0 or worth >= HOPELESS * best:
            return ""
        found += seen
        return f"it had {worth / best:.0%} of the best rate at {level.title}"

    def _level(self, serve: Served, level: Level, warm_up_s: float, share: float) -> list[Measurement]:
        """Sends one level to all models at once."""

        async def all_models() -> list[Measurement]:
            together = asyncio.Barrier(len(self._task.models)) if len(self._task.models) > 1 else None
            return await asyncio.gather(
                *(
                    self._send(
                        Target(serve.url, model, self._task.vocabularies[model]), self._task.workloads[model], level,
                        self._task.warm_up_s + warm_up_s, self._task.measure_s * share, together,
                    )
                    for model in self._task.models
                )
            )  # fmt: skip

        found = asyncio.run(all_models())
        for item in found:
            self._view.measured(item)
        return found


def _is_clean(found: Sequence[Measurement], level: Level) -> bool:
    """Returns whether no request failed at a level."""
    return not any(item.errors for item in found if item.level == level)


def _rate(found: Sequence[Measurement], level: Level) -> float:
    """Returns the geometric mean of the models' tokens per second at a level, or 0."""
    rates = [item.tokens_per_s for item in found if item.level == level]
    if not rates or min(rates) <= 0:
        return 0.0
    return math.exp(sum(math.log(rate) for rate in rates) / len(rates))


def _at_level(trial: Trial, level: Level) -> float:
    return _rate(trial.measurements, level) if trial.status == "done" else 0.0


def _held(status: Mapping[str, Any], models: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the bytes that `serve-app status --json` says of each model: what all its replicas together were planned
    to hold, and what they held at most."""
    for model in status.get("models") or ():
        devices = [
            device
            for replica in model["replicas"]
            for device in (replica["report"] or {}).get("devices") or ()
            if device["planned"] is not None and device["peak"] is not None
        ]
        if model["name"] in models and devices:
            planned, peak = (sum(device[field] for device in devices) for field in ("planned", "peak"))
            yield {"model": model["name"], "planned": planned, "peak": peak}
