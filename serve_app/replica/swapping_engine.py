"""Is an engine that shares its memory with others of a pool: it holds memory only while the keeper has leased it some.

It is an `Engine` itself, around a real one that comes and goes. A replica is `stopped` (there is no engine), `parked`
(the engine lives and its memory is in a copy on the host), or holds a lease and is `waking`, `resident` or `draining`.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.types import ASGIApp

from serve_app.engines.draft_counts import DraftCounts
from serve_app.engines.engine import Engine, Parking
from serve_app.engines.lost_adapter import LostAdapter
from serve_app.engines.prompt_cache_counts import PromptCacheCounts
from serve_app.engines.rank_memory import RankMemory
from serve_app.errors import AdapterError, EngineError, ServeAppError, StillTooLarge
from serve_app.model_fields import ResidencyConfig
from serve_app.replica.held_requests import HeldRequests
from serve_app.replica.metrics import SwapMetrics
from serve_app.replica.report import ResidencyReport
from serve_app.replica.watched_folder import Stamp, stamp_of
from serve_app.residency.book import Report
from serve_app.residency.keeper import Keeper
from serve_app.residency.lease_holder import LeaseHolder
from serve_app.residency.life_lock import LifeLock, this_process
from serve_app.residency.member import Bytes, State, Terms
from serve_app.residency.policy import Forget, Leave, Order, Wake
from serve_app.terminal import notify, say

logger = logging.getLogger("ray.serve")

# These are guesses in seconds until the times are measured.
FIRST_START_S, FIRST_WAKE_S, FIRST_LEAVE_S = 30.0, 2.0, 0.5
# An order that takes more seconds than these has hung, and the replica is replaced. A large model loads for minutes.
MOST_WAKE_S, MOST_LEAVE_S = 1800.0, 300.0


@dataclass(frozen=True)
class Seat:
    """This is one way to run: the bytes that it takes of each device, what makes the engine for it, and the bytes that
    the engine keeps of each device while it is parked."""

    lease: Bytes
    make: Callable[[], Engine]
    residue: Bytes = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Taken:
    """This is one version of an adapter that the replica was given: its folder, and the state of its files then."""

    folder: Path
    stamp: Stamp


class SwappingEngine:
    """Runs the engine of one replica while it has a lease.

    `weights` are the bytes of a copy of its weights, as planned, and `still` those that keys and values of requests
    which stand still may take beside it. What it keeps of devices while it is parked, it keeps
    when it is stopped too if it `keeps_residue`. `most_running` is the number of requests that the engine takes at
    once, and `replica` is the replica's name, which no other one has.
    """

    def __init__(
        self,
        name: str,
        replica: str,
        swaps: ResidencyConfig,
        seats: Sequence[Seat],
        weights: int,
        keeper: Keeper,
        clock: Callable[[], float] = time.monotonic,
        keeps_residue: bool = False,
        most_running: float = math.inf,
        still: int = 0,
    ):
        self._name, self._replica, self._swaps, self._clock = name, replica, swaps, clock
        self._seats, self._weights, self._still = list(seats), weights, still
        self._residue, self._keeps_residue = seats[0].residue, keeps_residue
        self._seat: Seat | None = None
        self._state: State = "stopped"
        self._has_copy = False
        self._may_park = swaps.host_memory is None or swaps.host_memory >= weights
        self._start_s, self._wake_s, self._leave_s = FIRST_START_S, FIRST_WAKE_S, FIRST_LEAVE_S
        self._guessed: set[State] = {"parked", "stopped"}  # It has not come back from these yet.
        self._engine: Engine | None = None
        self._app: ASGIApp | None = None
        self._failure: ServeAppError | None = None
        self._first: asyncio.Future[None] | None = None
        self._first_since = clock()
        self._lease: Bytes = {}
        self._started: Engine | None = None  # This one has not returned from its start.
        self._order_ends: float | None = None
        self._process = this_process()
        self._requests = HeldRequests(name, self._changed, clock, most_running)
        self._holder = LeaseHolder(keeper, self._report, self._obey, notify)
        self._lock: LifeLock | None = None
        self._metrics = SwapMetrics()
        self._adapters: dict[str, Taken] = {}
        self._adapter_lost: LostAdapter = self._notify_lost

    async def start(self) -> ASGIApp:
        """Joins the pool, waits until the engine has been loaded for the first time, and returns the application."""
        self._lock = LifeLock(self._replica, self._swaps.pool, self._name)
        self._first = asyncio.get_running_loop().create_future()
        self._first_since = self._clock()
        await self._holder.start()
        ended = asyncio.ensure_future(self._holder.ended())
        await asyncio.wait({self._first, ended}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not self._first.done():
            self._holder.require_alive()
        await self._first
        return self._requests

    @property
    def state(self) -> State:
        """Returns whether it has its memory."""
        return self._state

    def residency(self) -> ResidencyReport:
        """Returns its state for `serve-app status`, with the seconds until it is resident once it may be, as they were
        measured last, or as a guess before that."""
        seconds = {"parked": self._wake_s, "stopped": self._start_s}.get(self._state, 0.0)
        is_guess = self._state in self._guessed
        return ResidencyReport(self._state, self._swaps.pool, round(seconds, 2), is_guess)

    async def check_health(self) -> None:
        """Raises EngineError if the engine has failed, or the pool has refused the replica."""
        if self._failure is not None:
            raise self._failure
        self._holder.require_alive()
        if self._order_ends is not None and self._clock() > self._order_ends:
            raise EngineError(
                f"the replica is still {self._state}, which takes far longer than it should, so it is replaced"
            )
        if self._engine is not None and self._state in ("resident", "parked"):
            await self._engine.check_health()

    def load(self) -> float:
        """Returns the engine's load, and 1 while requests wait for it."""
        if self._engine is None or self._state not in ("resident", "draining"):
            return 1.0 if self._requests.waiting else 0.0
        return self._engine.load()

    def cache_blocks(self) -> int | None:
        """Returns the engine's, or None while there is no engine."""
        return None if self._engine is None else self._engine.cache_blocks()

    def draft_counts(self) -> DraftCounts | None:
        """Returns the engine's, or None while there is no engine."""
        return None if self._engine is None else self._engine.draft_counts()

    def prompt_cache_counts(self) -> PromptCacheCounts | None:
        """Returns the engine's, or None while there is no engine."""
        return None if self._engine is None else self._engine.prompt_cache_counts()

    def parking(self) -> Parking | None:
        """Returns None, because only the keeper has it parked."""
        return None

    async def memory(self) -> Sequence[RankMemory]:
        """Returns what the engine holds, which is nothing while it is away."""
        if self._engine is None or self._state != "resident":
            return ()
        return await self._engine.memory()

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Does what `Engine` says. An engine that is stopped gets it when it starts again, so its folder is needed
        until the adapter is replaced or removed."""
        taken = Taken(folder, await asyncio.to_thread(stamp_of, folder))
        while (engine := self._engine) is not None:
            await engine.load_adapter(name, folder)
            if self._engine is engine:  # Another one may have started meanwhile, which has not got it.
                break
        self._adapters[name] = taken

    def watch_adapters(self, lost: LostAdapter) -> None:
        """Does what `Engine` says. An adapter is lost too if an engine that starts again cannot be given it."""
        self._adapter_lost = lost

    async def unload_adapter(self, name: str) -> None:
        """Does what `Engine` says."""
        self._adapters.pop(name, None)
        if self._engine is not None:
            await self._engine.unload_adapter(name)

    async def stop(self) -> None:
        """Frees everything, then leaves the pool. If that breaks off a load, or if the engine has failed, its memory is
        free only once this process has ended, and the keeper waits for that."""
        self._requests.fail("the replica stops")
        was_obeying = await self._holder.stop()
        engine = self._engine or self._started
        self._engine = self._started = None
        self._requests.end()
        if engine is not None:
            await engine.stop()
        if was_obeying or self._failure is not None:
            return
        await self._holder.leave(self._replica)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _changed(self) -> None:
        self._holder.changed()

    def _report(self) -> Report:
        requests, first = self._requests, self._first is not None and not self._first.done()
        age_s = max(requests.oldest_age_s, self._clock() - self._first_since if first else 0.0)
        return Report(
            self._terms(), self._state, self._lease, self._has_copy,
            requests.waiting + int(first), age_s, requests.running, requests.idle_s,
        )  # fmt: skip

    def _terms(self) -> Terms:
        swaps, parked = self._swaps, self._state == "parked" and self._seat is not None
        options = (self._seat,) if parked else self._seats  # A copy goes back to where it came from.
        parks = self._may_park and (self._engine is None or self._engine.parking() is not None)
        return Terms(
            self._replica, self._name, tuple(seat.lease for seat in options if seat is not None),
            self._weights + self._still if parks else 0, self._wake_s, self._start_s, self._leave_s,
            swaps.min_resident_s, swaps.drain_s, swaps.priority, self._residue, self._keeps_residue, self._process,
            "parked" in self._guessed, "stopped" in self._guessed,
        )  # fmt: skip

    async def _obey(self, order: Order) -> None:
        """Carries out an order. What goes wrong ends this replica, which Serve replaces."""
        most_s = MOST_LEAVE_S + self._swaps.drain_s if isinstance(order, Leave) else MOST_WAKE_S
        self._order_ends = self._clock() + most_s
        try:
            match order:
                case Wake(_, lease):
                    await self._wake(lease)
                case Leave(_, parks, _):
                    await self._leave(parks)
                case Forget():
                    await self._forget()
        except Exception as error:
            await self._fail(error)
        self._order_ends = None

    async def _wake(self, lease: Bytes) -> None:
        begin, was = self._clock(), self._state
        self._state = "waking"
        self._hold(lease)
        self._changed()
        if self._engine is None:
            self._seat = next(seat for seat in self._seats if dict(seat.lease) == dict(lease))
            self._residue = self._seat.residue
            self._started = self._seat.make()
            self._app = await self._started.start()
            lost = await self._bring_adapters(self._started)
            self._engine, self._started = self._started, None
            self._engine.watch_adapters(self._lost_by_engine)
            for name, reason in lost.items():
                self._adapter_lost(name, reason, False)
        else:
            await self._parking().wake()
            self._has_copy = self._parking().copy_bytes() > 0
        took = self._clock() - begin
        if was == "parked":
            self._wake_s = took
        else:
            self._start_s = took
        self._guessed.discard(was)
        self._state = "resident"
        assert self._app is not None, "the engine has started"
        self._requests.open(self._app)
        self._metrics.swapped(was, "resident", took, sum(lease.values()))
        say(f"'{self._name}' is resident after {took:.2f} s from {was}, with {self._requests.running} requests")
        if self._first is not None and not self._first.done():
            self._first.set_result(None)

    async def _bring_adapters(self, engine: Engine) -> dict[str, str]:
        """Gives a new engine the adapters that the last one had, and returns the reasons why it has not got others, by
        their names. Versions come, go and are replaced meanwhile. Those that are lost are not kept for the next engine,
        because who was told of it brings them again."""
        brought: dict[str, Taken] = {}
        lost: dict[str, str] = {}
        while True:
            missing = next((name for name, taken in self._adapters.items() if brought.get(name) is not taken), None)
            gone = next((name for name in brought if name not in self._adapters), None)
            if missing is not None:
                taken = self._adapters[missing]
                reason = await _why_not_brought(engine, missing, taken)
                brought[missing] = taken
                if self._adapters.get(missing) is taken and reason is not None:
                    lost[missing] = reason
                    del self._adapters[missing], brought[missing]
                elif reason is None:
                    lost.pop(missing, None)
            elif gone is not None:
                del brought[gone]
                await _unloaded(engine, gone)
            else:
                return lost

    def _lost_by_engine(self, name: str, reason: str, has_old: bool) -> None:
        """Passes on that the engine has lost an adapter. It gets it again at its next start if it has an older version,
        and otherwise from who is told of it."""
        if not has_old:
            self._adapters.pop(name, None)
        self._adapter_lost(name, reason, has_old)

    def _notify_lost(self, name: str, reason: str, _: bool) -> None:
        notify(f"'{self._name}' has lost its adapter '{name}': {reason}")

    async def _leave(self, parks: bool) -> None:
        self._state = "draining"
        freed = sum(self._lease.values())
        self._requests.close()
        has_ended = await self._requests.drained(self._swaps.drain_s)
        begin = self._clock()
        if parks and await self._parked():
            self._requests.stand_still()
            self._state, self._has_copy = "parked", True
            self._hold(self._residue)
        else:
            if not has_ended:
                await self._requests.cut()
            await self._end_engine()
        self._leave_s = self._clock() - begin
        self._metrics.swapped("resident", self._state, self._leave_s, freed)
        self._changed()
        say(f"'{self._name}' is {self._state} after {self._leave_s:.2f} s")

    async def _parked(self) -> bool:
        """Parks the engine, and returns whether it has. It is stopped instead if the host has no room for its copy."""
        parking = None if self._engine is None else self._engine.parking()
        if parking is None:
            return False
        try:
            try:
                await parking.park(self._still)
            except StillTooLarge as error:
                say(f"'{self._name}' sends requests that run back to the router: {error}")
                await self._requests.cut()
                await parking.park(self._still)
        except EngineError as error:
            logger.warning("'%s' cannot park and is stopped instead: %s", self._name, error)
            return False
        return True

    async def _forget(self) -> None:
        self._has_copy = False
        if self._state == "parked":
            self._state = "draining"
            await self._requests.cut()
            await self._end_engine()
        elif self._engine is not None and (parking := self._engine.parking()) is not None:
            await parking.forget_copy()

    async def _end_engine(self) -> None:
        engine, self._engine, self._app, self._seat = self._engine, None, None, None
        self._requests.end()
        if engine is not None:
            await engine.stop()
        self._state, self._has_copy = "stopped", False
        self._hold(self._residue if self._keeps_residue else {})

    def _hold(self, lease: Bytes) -> None:
        """Sets what the replica holds. Its lock says so too, to whoever comes after its node of Ray has died."""
        self._lease = lease
        if self._lock is not None:
            self._lock.hold(lease)

    async def _fail(self, error: Exception) -> None:
        logger.exception("'%s' has lost its engine.", self._name)
        reason = error if isinstance(error, ServeAppError) else EngineError(f"{type(error).__name__}: {error}")
        self._failure = reason
        notify(f"'{self._name}' cannot go on: {reason}")
        self._requests.fail(str(reason))
        # The lease stays until this process has ended, because nobody knows what the engine still holds.
        if self._first is not None and not self._first.done():
            self._first.set_exception(reason)

    def _parking(self) -> Parking:
        parking = None if self._engine is None else self._engine.parking()
        if parking is None:
            raise EngineError("the engine cannot park")
        return parking


async def _why_not_brought(engine: Engine, name: str, taken: Taken) -> str | None:
    """Loads an adapter, and returns why it could not be loaded, or None. One whose files have changed since it was
    taken is another one, which nobody has checked."""
    if await asyncio.to_thread(stamp_of, taken.folder) != taken.stamp:
        return f"the files in {taken.folder} have changed since it was loaded"
    try:
        await engine.load_adapter(name, taken.folder)
    except AdapterError as error:
        return str(error)
    except Exception as error:  # It is read from a disk that may have changed.
        logger.exception("The adapter '%s' could not be loaded again.", name)
        return repr(error)
    return None


async def _unloaded(engine: Engine, name: str) -> None:
    """Removes an adapter that went while it was brought. A failure costs only its memory."""
    try:
        await engine.unload_adapter(name)
    except AdapterError as error:
        logger.warning("The adapter '%s' could not be removed whole: %s", name, error)
