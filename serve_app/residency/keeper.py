"""Runs the book of one pool as an actor, which grants leases to the replicas of its node.

Its death loses nothing. Each lease is in Ray's key-value store before a replica hears of it, so the next keeper knows
all of them, and counts each until its replica joins or is seen to be dead. Replicas hold what they have meanwhile, and
requests for others wait.
"""

import asyncio
import json
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from serve_app.ray_serve import NAMESPACE
from serve_app.residency.book import Book, Decision, Report
from serve_app.residency.counted import Counted
from serve_app.residency.lease_records import PoolName, RayRecords, Records, remove_dead
from serve_app.residency.life_lock import Holding, Process, left_behind, lives
from serve_app.residency.member import Bytes, Member, Pool, State
from serve_app.residency.policy import Order, waiters

logger = logging.getLogger("ray.serve")

# These are seconds. Replicas that wait are looked at again because others come of age.
LOOK_EVERY_S, LOOK_FOR_DEATHS_S = 0.1, 1.0
# A call for orders returns after this many seconds without one, so that no dead replica holds one for ever.
POLL_S = 20.0
# A keeper without replicas ends after this many seconds, and gives its GPUs back to Ray.
LONELY_S = 60.0
# A keeper answers in milliseconds. It takes some seconds until a new one runs.
ANSWER_TIMEOUT_S = 30.0
MOST_DECISIONS = 100


@dataclass(frozen=True)
class PoolSettings:
    """Says what resident replicas of a pool may take of each device, what copies may take of the host, and Ray's
    options for the keeper, which has the pool's GPUs in Ray's books."""

    budget: Bytes
    host_budget: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Joined:
    """Is the answer to a replica that joins: the name of this run of the keeper with the settings that it has, or why
    the replica cannot join."""

    run: str
    settings: PoolSettings
    problem: str | None = None


class Keeper(Protocol):
    """Is what a replica asks of the keeper. Every method raises an exception while it cannot be reached."""

    async def join(self, report: Report) -> Joined:
        """Adds a replica, or adds it again with what it says for true."""
        ...

    async def update(self, run: str, report: Report) -> bool:
        """Takes over what has changed. Returns False if the replica has to join again."""
        ...

    async def orders(self, run: str, replica: str) -> list[Order] | None:
        """Waits for orders. Returns None if the replica has to join again."""
        ...

    async def leave(self, replica: str) -> None:
        """Forgets a replica that has freed all its memory."""
        ...


class KeeperActor:
    """Grants the leases of one pool. All methods run on one event loop, one after the other between their waits."""

    def __init__(
        self,
        name: PoolName,
        settings: PoolSettings,
        records: Records | None = None,
        lives: Callable[[str, Process], bool] = lives,
        clock: Callable[[], float] = time.monotonic,
        left_behind: Callable[[str], list[Holding]] = left_behind,
    ):
        self._name, self._records, self._lives, self._clock = name, records or RayRecords(), lives, clock
        self._settings = settings
        self._book = Book(settings.budget, settings.host_budget)
        self._run = secrets.token_hex(4)
        self._written, self._is_saved, self._is_warned = b"[]", True, False
        self._writing, self._news = asyncio.Lock(), asyncio.Condition()
        self._decisions: deque[Decision] = deque(maxlen=MOST_DECISIONS)
        self._alone_since = clock()
        self._looked_for_deaths = clock()
        found = json.loads(self._records.read(name.key) or "[]")
        self._counted = Counted(found)
        for record in found:
            self._book.restore(record, clock())
        for holding in left_behind(name.pool):
            logger.info("'%s' of an earlier node of Ray still ends, and what it holds is not free yet.", holding.model)
            self._book.add_left_behind(holding, clock())
        # Ray runs this on the actor's loop. It must not wait for a call, since all replicas may have died too.
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def join(self, report: Report) -> Joined:
        """See `Keeper.join`."""
        if (problem := self._book.problem(report.terms)) is not None:
            return Joined(self._run, self._settings, problem)
        self._book.join(report, self._clock())
        await self._changed()
        return Joined(self._run, self._settings)

    async def update(self, run: str, report: Report) -> bool:
        """See `Keeper.update`."""
        replica = report.terms.replica
        if run != self._run or not self._book.knows(replica):
            return False
        self._book.update(report, self._clock())
        await self._changed()
        return True

    async def orders(self, run: str, replica: str) -> list[Order] | None:
        """See `Keeper.orders`. An order is given out only once all that it allows is written down. One that only gives
        back waits for nothing."""
        try:
            async with asyncio.timeout(POLL_S), self._news:
                while run == self._run and self._book.knows(replica):
                    if self._book.has_orders(replica) and self._counted.covers(self._book.member(replica)):
                        return self._book.take(replica)
                    await self._news.wait()
        except TimeoutError:
            return []
        return None

    async def leave(self, replica: str) -> None:
        """See `Keeper.leave`."""
        await self._forget([replica])

    async def wake(self, model: str) -> State | None:
        """Does what `Book.wake` says."""
        before = self._book.wake(model, self._clock())
        await self._changed()
        return before

    async def park(self, model: str) -> list[State] | None:
        """Does what `Book.park` says."""
        before = self._book.park(model)
        await self._changed()
        return before

    async def decisions(self) -> list[Decision]:
        """Returns the last decisions, the oldest first."""
        return list(self._decisions)

    async def pool(self) -> Pool:
        """Returns the pool as it is known now."""
        return self._book.pool

    async def longest_wait_s(self) -> float:
        """Returns the bound of the policy for the replicas of this moment."""
        return self._book.longest_wait_s

    def stop(self) -> None:
        """Ends the keeper without a word to anybody."""
        self._task.cancel()

    async def _changed(self) -> None:
        """Decides anew, writes down what has changed, and wakes the calls that wait for orders."""
        decisions = self._book.decide(self._clock(), time.time())
        for decision in decisions:
            self._decisions.append(decision)
            logger.info("%s", decision.reason)
        self._is_saved = self._record() == self._written
        if decisions:  # Who leaves need not wait until that is written.
            await self._notify()
        await self._save()
        await self._notify()

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

    def _record(self) -> bytes:
        return json.dumps(self._book.records()).encode()

    async def _save(self) -> None:
        """Writes all leases down in one piece. Ray's store blocks, so a thread waits for it."""
        async with self._writing:
            if (record := self._record()) != self._written:
                records = self._book.records()
                self._counted.begin(records)
                try:
                    await asyncio.to_thread(self._records.write, self._name.key, record)
                except Exception as error:  # Ray's head may be restarting.
                    if not self._is_warned:
                        logger.warning("The pool '%s' waits for Ray's store: %s", self._name.pool, error)
                    self._is_warned = True
                    return
                self._counted.end(records)
                self._written, self._is_warned = record, False
            self._is_saved = (
                self._record() == self._written
            )  # It may have changed meanwhile, and is written again then.

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self._look()
            except Exception:  # Nothing else would see deaths, or write down what could not be written.
                logger.exception("The keeper of the pool '%s' could not look at its replicas.", self._name.pool)
                await asyncio.sleep(LOOK_FOR_DEATHS_S)

    async def _look(self) -> None:
        now = self._clock()
        if now - self._looked_for_deaths >= LOOK_FOR_DEATHS_S:
            self._looked_for_deaths = now
            if dead := await asyncio.to_thread(self._dead, self._book.pool.members):
                await self._forget(dead)
        pool = self._book.pool
        if not self._is_saved or waiters(pool):
            await self._changed()
        if pool.members:
            self._alone_since = now
        elif now - self._alone_since > LONELY_S:
            _end()

    def _dead(self, members: Iterable[Member]) -> list[str]:
        return [member.name for member in members if not self._lives(member.name, member.terms.process)]

    async def _forget(self, replicas: Iterable[str]) -> None:
        for replica in replicas:
            self._book.remove(replica)
        await self._changed()


def _end() -> None:
    """Ends this actor for good. The next replica makes another one."""
    import ray

    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


class RayKeeper:
    """Reaches the keeper of a pool on this node, and makes it if there is none."""

    def __init__(self, name: PoolName, settings: PoolSettings):
        self._name, self._settings = name, settings
        self._actor: Any = None
        self._has_joined = False

    async def join(self, report: Report) -> Joined:
        """See `Keeper.join`.

        A replica that joins for the first time brings the newest config. If that gives the pool other settings, the
        keeper is replaced by one that has them, which costs nothing, since leases outlive it.
        """
        self._actor = None  # The last one may have ended for good.
        joined: Joined = await self._ask("join", report)
        if not self._has_joined and joined.settings != self._settings:
            logger.warning("The settings of the pool '%s' have changed, so its keeper is replaced.", self._name.pool)
            await asyncio.to_thread(_kill, self._actor)
            self._actor = None
            joined = await self._ask("join", report)
        self._has_joined = True
        return joined

    async def update(self, run: str, report: Report) -> bool:
        """See `Keeper.update`."""
        return bool(await self._ask("update", run, report))

    async def orders(self, run: str, replica: str) -> list[Order] | None:
        """See `Keeper.orders`."""
        orders: list[Order] | None = await self._ask("orders", run, replica, timeout_s=POLL_S + ANSWER_TIMEOUT_S)
        return orders

    async def leave(self, replica: str) -> None:
        """See `Keeper.leave`."""
        if self._actor is not None:
            await self._ask("leave", replica)

    async def _ask(self, method: str, *arguments: Any, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """Calls the actor. Raises TimeoutError if it does not answer, as one for which Ray has no place."""
        try:
            async with asyncio.timeout(timeout_s):
                if self._actor is None:
                    self._actor = await asyncio.to_thread(self._connect)
                return await getattr(self._actor, method).remote(*arguments)
        except TimeoutError:
            asked = dict(self._settings.options) or "nothing"
            raise TimeoutError(
                f"it has not answered for {timeout_s:g} s. It asks Ray for {asked}, which others may hold. Set "
                "residency.pool_memory to what they leave."
            ) from None

    def _connect(self) -> Any:
        remove_dead()
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return (
            ray.remote(KeeperActor)
            .options(
                name=self._name.actor,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                max_concurrency=1000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(self._name.node, soft=False),
                **{"num_cpus": 0, **self._settings.options},
            )
            .remote(self._name, self._settings)
        )


def _kill(actor: Any) -> None:
    import ray

    ray.kill(actor, no_restart=True)
