"""Runs a pool by the policy with replicas that only pretend to load, to see whether the laws hold at every moment."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from serve_app.residency.member import HOLDS_A_LEASE, Bytes, Demand, Member, Pool, Terms
from serve_app.residency.policy import Forget, Leave, Order, Wake, decide, longest_wait_s, stay_s

# The keeper looks at this interval in seconds while requests wait.
LOOK_EVERY_S = 0.25


@dataclass(frozen=True)
class Arrival:
    """A request at a time in seconds, for the replica of this number, that runs for some seconds."""

    at: float
    member: int
    runs_s: float


@dataclass(frozen=True)
class Death:
    """The replica of this number dies, and its successor is there at once with nothing loaded."""

    at: float
    member: int


@dataclass
class _Replica:
    member: Member
    waiting: list[tuple[float, float]] = field(default_factory=list)  # when it began to wait, and how long it runs
    running: dict[int, float] = field(default_factory=dict)  # the time at which each request ends
    life: int = 0  # the times that it has changed its state, so that what was planned for an earlier one is ignored
    parks: bool = False


class Simulation:
    """Runs until all requests have ended. It raises AssertionError if a law is broken."""

    def __init__(self, terms: Sequence[Terms], budget: Bytes, host_budget: int):
        self.now, self.swaps, self.longest_wait_s, self.ended = 0.0, 0, 0.0, 0
        self.evicted_after: list[tuple[Member, float]] = []
        self._budget, self._host = budget, host_budget
        self._replicas = [_Replica(Member(item)) for item in terms]
        self._by_name = {item.replica: number for number, item in enumerate(terms)}
        self._events: list[tuple[float, int, object]] = []
        self._number, self._looks = 0, False
        self._bound = longest_wait_s(replica.member for replica in self._replicas)

    def run(self, events: Sequence[Arrival | Death]) -> None:
        """Runs these events and all that follows from them."""
        for event in events:
            self._later(event.at, event)
        deaths = sum(isinstance(event, Death) for event in events)
        most_s = max((event.at for event in events), default=0.0) + (len(events) + 2) * (self._bound + 60)
        while self._events:
            self.now, _, happens = heapq.heappop(self._events)
            assert self.now < most_s, "requests wait for ever"
            self._happen(happens)
            self._apply(decide(self.pool, self.now))
            self._check(deaths)
        assert not any(replica.waiting or replica.running for replica in self._replicas)

    @property
    def pool(self) -> Pool:
        """Returns what the keeper would know."""
        members = []
        for replica in self._replicas:
            oldest = min((begun for begun, _ in replica.waiting), default=0.0)
            last = self.now if replica.running else replica.member.demand.last_used
            demand = Demand(len(replica.waiting), oldest, len(replica.running), last)
            replica.member = replace(replica.member, demand=demand)
            members.append(replica.member)
        return Pool(self._budget, self._host, tuple(members))

    def _later(self, at: float, event: object) -> None:
        self._number += 1
        heapq.heappush(self._events, (at, self._number, event))

    def _happen(self, event: object) -> None:
        match event:
            case Arrival(_, number, runs_s):
                replica = self._replicas[number]
                if replica.member.state == "resident":
                    self._begin(number, runs_s)
                else:
                    replica.waiting.append((self.now, runs_s))
                    self._look_later()
            case Death(_, number):
                self._die(number)
            case "look":
                self._looks = False
                if any(replica.waiting for replica in self._replicas):
                    self._look_later()
            case ("end", int(number), int(request), int(life)):
                if (
                    self._replicas[number].life == life
                    and self._replicas[number].running.pop(request, None) is not None
                ):
                    self.ended += 1
                    self._left_if_idle(number)
            case (str(what), int(number), int(life)):
                if self._replicas[number].life == life:
                    {"awake": self._awake, "drained": self._drained, "left": self._left}[what](number)
            case _:
                raise AssertionError(event)

    def _look_later(self) -> None:
        if not self._looks:
            self._looks = True
            self._later(self.now + LOOK_EVERY_S, "look")

    def _change(self, number: int, **changes: object) -> None:
        replica = self._replicas[number]
        replica.life += 1
        replica.member = replace(replica.member, since=self.now, **changes)  # type: ignore[arg-type]

    def _begin(self, number: int, runs_s: float) -> None:
        replica = self._replicas[number]
        self._number += 1
        replica.running[self._number] = self.now + runs_s
        self._later(self.now + runs_s, ("end", number, self._number, replica.life))

    def _awake(self, number: int) -> None:
        replica = self._replicas[number]
        self._change(number, state="resident")
        waiting, replica.waiting = replica.waiting, []
        for begun, runs_s in waiting:
            self.longest_wait_s = max(self.longest_wait_s, self.now - begun)
            self._begin(number, runs_s)

    def _left_if_idle(self, number: int) -> None:
        replica = self._replicas[number]
        replica.member = replace(replica.member, demand=replace(replica.member.demand, last_used=self.now))
        if replica.member.state == "draining" and not replica.running:
            self._drained(number)

    def _drained(self, number: int) -> None:
        """Its requests have ended, or go on when it comes back."""
        replica = self._replicas[number]
        replica.life += 1
        replica.waiting += [(self.now, ends - self.now) for ends in replica.running.values()]
        if replica.running:
            self._look_later()
        replica.running = {}
        self._later(self.now + replica.member.terms.leave_s, ("left", number, replica.life))

    def _left(self, number: int) -> None:
        replica = self._replicas[number]
        self._change(number, state="parked" if replica.member.has_copy and replica.parks else "stopped", lease={})

    def _die(self, number: int) -> None:
        replica = self._replicas[number]
        replica.waiting += [(self.now, ends - self.now) for ends in replica.running.values()]
        replica.running = {}
        self._change(number, state="stopped", lease={}, has_copy=False)
        if replica.waiting:
            self._look_later()

    def _apply(self, orders: Sequence[Order]) -> None:
        for order in orders:
            number = self._by_name[order.replica]
            replica = self._replicas[number]
            member = replica.member
            match order:
                case Wake(_, lease):
                    assert member.state in ("stopped", "parked")
                    assert lease in member.terms.options
                    self._change(number, state="waking", lease=lease)
                    self._later(self.now + member.ready_in_s, ("awake", number, replica.life))
                case Leave(_, parks, _):
                    assert member.state == "resident"
                    assert self.now - member.since >= stay_s(member, self.now)
                    assert self.now - member.since >= member.terms.min_resident_s
                    self.swaps += 1
                    replica.parks = parks
                    self._change(number, state="draining", has_copy=member.has_copy or parks)
                    for request, ends in replica.running.items():  # The change has made their ends void.
                        self._later(ends, ("end", number, request, replica.life))
                    if replica.running:
                        self._later(self.now + member.terms.drain_s, ("drained", number, replica.life))
                    else:
                        self._drained(number)
                case Forget():
                    assert member.has_copy
                    if member.state == "parked":
                        self._change(number, state="stopped", has_copy=False)
                    else:
                        replica.member = replace(member, has_copy=False)

    def _check(self, deaths: int) -> None:
        pool = self.pool
        for device, size in pool.budget.items():
            assert pool.leased(device) <= size, device
        assert pool.copied_bytes <= pool.host_budget
        for member in pool.members:
            assert bool(member.lease) == (member.state in HOLDS_A_LEASE), member
        oldest = min((begun for replica in self._replicas for begun, _ in replica.waiting), default=self.now)
        # A death makes the pool load once more what it had loaded, so each allows the wait of one more turn.
        assert self.now - oldest <= (1 + deaths) * self._bound + 2 * LOOK_EVERY_S, (self.now - oldest, self._bound)
