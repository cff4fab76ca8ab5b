"""A keeper and its replicas in one process, on a clock that jumps: what each death leaves, and that no two replicas
hold the same bytes."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable

import pytest

from serve_app.errors import EngineError
from serve_app.residency.book import Report
from serve_app.residency.lease_holder import LeaseHolder
from serve_app.residency.life_lock import Holding
from serve_app.residency.member import Bytes, State, Terms
from serve_app.residency.policy import Forget, Leave, Order, Wake
from tests.residency.one_process import LocalKeeper

USES_VIRTUAL_CLOCK = True
BUDGET = 2


class Cluster(LocalKeeper):
    """A keeper, and replicas that pretend to load."""

    def __init__(self) -> None:
        super().__init__(BUDGET)
        self.replicas: list[Replica] = []

    def check(self) -> None:
        """No two hold the same bytes, whatever the keeper believes, and the next keeper would count all of them."""
        alive = [replica for replica in self.replicas if replica.name not in self.dead]
        held = sum(replica.held for replica in alive)
        assert held <= BUDGET, held
        counted = self.records.leases()
        assert all(replica.held <= counted.get(replica.name, 0) for replica in alive), counted


class Replica:
    """One that takes a second to load and half a second to free its memory. Requests for it end as soon as it is
    resident."""

    def __init__(self, cluster: Cluster, name: str, size: int = 1):
        self.name, self.cluster, self.size = name, cluster, size
        self.state: State = "stopped"
        self.has_copy, self.held = False, 0
        self.waiting: list[float] = []
        self.served, self.longest = 0, 0.0
        self.seen: Counter[str] = Counter()
        self.holder = LeaseHolder(cluster, self.report, self.obey)
        cluster.replicas.append(self)

    def now(self) -> float:
        """Seconds of the loop."""
        return asyncio.get_running_loop().time()

    def report(self) -> Report:
        """What it is now."""
        terms = Terms(self.name, self.name, ({"cpu": self.size},), 1, 1.0, 1.0, 0.5, 2.0, 1.0)
        lease: Bytes = {"cpu": self.size} if self.state in ("waking", "resident", "draining") else {}
        age_s = self.now() - min(self.waiting, default=self.now())
        return Report(terms, self.state, lease, self.has_copy, len(self.waiting), age_s, 0, 10.0)

    def ask(self) -> None:
        """One request."""
        self.waiting.append(self.now())
        self._serve()
        self.holder.changed()

    def _serve(self) -> None:
        if self.state == "resident":
            self.longest = max([self.longest, *(self.now() - begun for begun in self.waiting)])
            self.served, self.waiting = self.served + len(self.waiting), []

    async def obey(self, order: Order) -> None:
        """Loads, leaves or forgets."""
        self.seen[type(order).__name__] += 1
        if isinstance(order, Wake):
            self.state, self.held = "waking", self.size
            self.cluster.check()
            await asyncio.sleep(1.0)
            self.state = "resident"
            self._serve()
        elif isinstance(order, Leave):
            self.state = "draining"
            await asyncio.sleep(0.5)
            self.state, self.held = ("parked" if order.parks else "stopped"), 0
            self.has_copy = order.parks
        elif isinstance(order, Forget):
            self.has_copy = False
            self.state = "stopped" if self.state == "parked" else self.state

    def die(self) -> None:
        """By SIGKILL: nothing is told, and its memory is free once the keeper sees it."""
        for task in self.holder._tasks:
            task.cancel()
        self.cluster.dead.add(self.name)
        self.held = 0


async def started(cluster: Cluster, *names: str) -> list[Replica]:
    """Replicas that have joined."""
    replicas = [Replica(cluster, name) for name in names]
    for replica in replicas:
        await replica.holder.start()
    return replicas


async def until(is_so: Callable[[], bool], timeout_s: float = 100.0) -> None:
    """Waits for at most so many seconds of the loop."""
    async with asyncio.timeout(timeout_s):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_three_share_the_memory_for_two() -> None:
    """Each is served in its turn, and one of the others leaves for it."""
    cluster = Cluster()
    replicas = await started(cluster, "a", "b", "c")
    for replica in replicas:
        replica.ask()
    await until(lambda: all(replica.served for replica in replicas))
    assert sorted(replica.state for replica in replicas) == ["parked", "resident", "resident"]
    decisions = await cluster.keeper.decisions()
    assert [type(decision.order).__name__ for decision in decisions] == ["Wake", "Wake", "Leave", "Wake"]
    await until(lambda: cluster.records.leased() == 2)


async def test_an_operator_wakes_and_parks_without_a_request() -> None:
    """Nothing waits, and both are done at once. A model that is not there is told."""
    cluster = Cluster()
    first, second, third = await started(cluster, "a", "b", "c")
    for name in "ab":
        assert await cluster.keeper.wake(name) == "stopped"
    await until(lambda: first.state == second.state == "resident")
    await asyncio.sleep(1)  # The keeper is told after a moment.
    assert await cluster.keeper.park("a") == ["resident"]
    await until(lambda: first.state == "parked" and cluster.records.leased() == 1)
    assert await cluster.keeper.wake("c") == "stopped"
    await until(lambda: third.state == "resident")
    assert second.state == "resident"  # There was room for both.
    assert (first.served, await cluster.keeper.wake("x"), await cluster.keeper.park("x")) == (0, None, None)


async def test_no_order_goes_out_before_its_lease_is_written_down() -> None:
    """While Ray's head is away, requests wait."""
    cluster = Cluster()
    (replica,) = await started(cluster, "a")
    cluster.records.is_down = True
    replica.ask()
    await asyncio.sleep(5)
    assert replica.state == "stopped"
    cluster.records.is_down = False
    await until(lambda: replica.served == 1, 2.0)


async def test_one_that_only_gives_back_waits_for_no_record() -> None:
    """It frees its memory while Ray's head is away, and who gets that waits until it is written down."""
    cluster = Cluster()
    a, b, c = await started(cluster, "a", "b", "c")
    for replica in (a, b, c, a, b, c):  # Each has made its copy then.
        replica.ask()
        await until(lambda: not any(each.waiting for each in (a, b, c)))
        await asyncio.sleep(5)
    away = next(replica for replica in (a, b, c) if replica.state == "parked")
    cluster.records.is_down = True
    away.ask()
    await until(lambda: sum(replica.state == "parked" for replica in (a, b, c)) == 2)
    await asyncio.sleep(5)
    assert away.state == "parked"
    cluster.records.is_down = False
    await until(lambda: not away.waiting, 2.0)


async def test_the_death_of_a_keeper_loses_nothing() -> None:
    """Who is resident stays so, and who waits is served by the next keeper, which counts all leases from its start."""
    cluster = Cluster()
    a, b, c = await started(cluster, "a", "b", "c")
    a.ask()
    b.ask()
    await until(lambda: a.served == b.served == 1)
    cluster.kill_keeper()
    c.ask()
    await until(lambda: c.served == 1)
    assert sorted(replica.seen["Wake"] for replica in (a, b, c)) == [1, 1, 1]


async def test_two_deaths_of_keepers_in_a_row_lose_nothing() -> None:
    """The second one dies before anybody has joined it, though a waiter has made it decide."""
    cluster = Cluster()
    a, b = await started(cluster, "a", "b")
    a.ask()
    b.ask()
    await until(lambda: a.served == b.served == 1)
    cluster.kill_keeper()
    (c,) = await started(cluster, "c")
    c.ask()
    await asyncio.sleep(0.2)
    assert cluster.records.leased() == 2
    cluster.kill_keeper()
    await until(lambda: c.served == 1)


async def test_the_lease_of_a_dead_replica_is_free() -> None:
    """Once the keeper has seen that it is dead, also if it died while there was no keeper."""
    cluster = Cluster()
    a, b, c = await started(cluster, "a", "b", "c")
    a.ask()
    b.ask()
    await until(lambda: a.served == b.served == 1)
    a.die()
    c.ask()
    await until(lambda: c.served == 1)
    assert not b.seen["Leave"]
    c.die()
    cluster.kill_keeper()
    (d,) = await started(cluster, "d")
    d.ask()
    await until(lambda: d.served == 1)
    assert not b.seen["Leave"]


async def test_what_replicas_of_a_dead_node_hold_is_not_free() -> None:
    """A new node of Ray has another id and a keeper that knows nothing. Who waits gets the memory of the old node's
    replica when its processes have ended, and not before, also through the death of the new keeper."""
    cluster = Cluster()
    cluster.left = [Holding("old", "old", "default", (1, 1.0), (2, 1.0), {"cpu": BUDGET})]
    cluster.kill_keeper()
    (replica,) = await started(cluster, "a")
    replica.ask()
    await asyncio.sleep(10)
    assert replica.state == "stopped"
    cluster.left = []
    cluster.kill_keeper()
    await asyncio.sleep(10)
    assert replica.state == "stopped"
    cluster.dead.add("old")
    await until(lambda: replica.served == 1, 5.0)
    assert [member.name for member in (await cluster.keeper.pool()).members] == ["a"]


async def test_one_that_leaves_in_order_is_forgotten() -> None:
    """Its record too."""
    cluster = Cluster()
    (replica,) = await started(cluster, "a")
    await replica.holder.stop()
    await replica.holder.leave("a")
    assert list(cluster.records.values.values()) == [b"[]"]
    assert not (await cluster.keeper.pool()).members


async def test_one_that_does_not_fit_cannot_join() -> None:
    """It says so at its start."""
    cluster = Cluster()
    with pytest.raises(EngineError, match="needs"):
        await Replica(cluster, "large", size=3).holder.start()


@pytest.mark.parametrize("seed", range(8))
async def test_the_law_holds_through_deaths(seed: int) -> None:
    """Keepers and replicas die at random while requests come, and Ray's store is away at times. No bytes are held
    twice, and all requests are served."""
    draw, cluster = random.Random(seed), Cluster()
    replicas = await started(cluster, *"abcdef")
    asked = 0
    for _ in range(200):
        await asyncio.sleep(draw.expovariate(4.0))
        draw.choice(replicas).ask()
        asked += 1
        if draw.random() < 0.05:
            cluster.records.is_down = not cluster.records.is_down
        if draw.random() < 0.05:
            cluster.kill_keeper()
        if draw.random() < 0.2:  # Operators want what they want, and nobody is lost by it.
            wish = draw.choice([cluster.keeper.wake, cluster.keeper.park])
            await wish(draw.choice(replicas).name)
        if draw.random() < 0.05:
            place = draw.randrange(len(replicas))
            old = replicas[place]
            old.die()
            (replicas[place],) = await started(cluster, f"{old.name}{asked}")
            replicas[place].waiting = old.waiting
            replicas[place].holder.changed()
    cluster.records.is_down = False
    await until(lambda: not any(replica.waiting for replica in replicas), 600)
    assert sum(replica.served for replica in cluster.replicas) == asked
    assert max(replica.longest for replica in cluster.replicas) < await cluster.keeper.longest_wait_s() + 30
