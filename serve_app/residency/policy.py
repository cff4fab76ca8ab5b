"""Decides which replicas leave a pool's memory, so that those for which requests wait can have it.

The laws, which hold whatever requests come and whichever replicas die:

1. Leases never exceed the budget on any device.
2. A replica stays for at least its `min_resident_s`. If it was used during the last `return_s` seconds, it stays for
   `WORTH_OF_A_SWAP` times as long as it would take to bring it back. So swaps cost at most a fixed share of the time.
3. Whoever waits longest comes first. Others get only what it does not need, so none can overtake it for ever.
   `longest_wait_s` is the bound that follows.
4. Among the replicas that may leave, those of the least value leave. The value is the seconds of bringing it back,
   times the number of its requests and one, times 2 to the power of its priority, divided by the seconds since its last
   use and one.

Everything here is a function of values, and times are seconds of one clock.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from serve_app.residency.member import Bytes, Member, Pool

# A replica in use stays for this many times the seconds that it takes to bring it back.
WORTH_OF_A_SWAP = 3.0


@dataclass(frozen=True)
class Wake:
    """The replica may become resident with this lease, which it holds from now on."""

    replica: str
    lease: Bytes


@dataclass(frozen=True)
class Leave:
    """The replica must free its memory once its requests have ended, and keep a copy in the host's memory if it parks.
    `instead` is the replica for which it leaves."""

    replica: str
    parks: bool
    instead: str


@dataclass(frozen=True)
class Forget:
    """The replica must free its copy in the host's memory, because another one that parks is worth more."""

    replica: str
    instead: str


Order = Wake | Leave | Forget


def decide(pool: Pool, now: float) -> list[Order]:
    """Returns what must happen now. It is empty if all that wait have to wait on."""
    orders: list[Order] = []
    free = pool.free
    # This is what will be free, less what is promised to those that wait.
    promised = dict(free)
    for member in pool.members:
        if member.state == "draining":
            _add(promised, member.lease)
    staying = [member for member in pool.members if member.state in ("resident", "waking")]
    copies = _Copies(pool, now)
    for waiter in waiters(pool):
        chosen = _choose(waiter, staying, promised, now)
        if chosen is None:
            continue
        lease, victims = chosen
        staying = [member for member in staying if member not in victims]
        if all(may_leave(victim, now) for victim in victims):  # None leaves early, since its bytes would be idle.
            orders += [order for victim in victims for order in copies.leave(victim, waiter)]
        if not victims and _fits(lease, free):
            orders.append(Wake(waiter.name, lease))
            _take(free, lease)
        for victim in victims:
            _add(promised, victim.lease)
        _take(promised, lease)
    return orders


def waiters(pool: Pool) -> list[Member]:
    """Returns the replicas for which requests wait and that hold no memory, the one that waits longest first."""
    found = [member for member in pool.members if member.state in ("stopped", "parked") and member.demand.waiting]
    return sorted(found, key=lambda member: (member.demand.oldest, member.name))


def may_leave(member: Member, now: float) -> bool:
    """Returns whether a replica has been resident for long enough."""
    return member.state == "resident" and now - member.since >= stay_s(member, now)


def stay_s(member: Member, now: float) -> float:
    """Returns the seconds for which a replica stays resident, which are more if it is in use."""
    idle_s = now - member.demand.last_used
    in_use = member.demand.running or member.demand.waiting or idle_s < member.return_s
    return _longest_stay_s(member) if in_use else member.terms.min_resident_s


def _longest_stay_s(member: Member) -> float:
    return max(member.terms.min_resident_s, WORTH_OF_A_SWAP * member.return_s)


def value(member: Member, now: float) -> float:
    """Returns what it costs to send a replica away, in the unit of the fourth law."""
    idle_s = 0.0 if member.demand.running else max(0.0, now - member.demand.last_used)
    requests = 1 + member.demand.waiting + member.demand.running
    return float(member.return_s * requests * 2.0**member.terms.priority / (1 + idle_s))


def longest_wait_s(members: Iterable[Member]) -> float:
    """Returns the most seconds for which a request waits until its replica is resident, in a pool of these replicas.

    The one that waits longest needs that all residents may leave, which each does at the latest after it has woken, has
    stayed for its time and has drained. Then it wakes. Before that, every other replica may have had its turn once.
    """
    every = list(members)
    if not every:
        return 0.0
    stay = max(_longest_stay_s(member) + member.terms.drain_s + member.terms.leave_s for member in every)
    come = max(max(member.terms.start_s, member.terms.wake_s) for member in every)
    return len(every) * (stay + 2 * come)


def fits_alone(options: Sequence[Bytes], budget: Bytes) -> bool:
    """Returns whether a replica could run if it had the whole pool."""
    return any(_fits(option, budget) for option in options)


def _choose(
    waiter: Member, staying: Sequence[Member], free: Mapping[str, int], now: float
) -> tuple[Bytes, list[Member]] | None:
    """Returns the lease for which the least value has to leave, and who leaves. A choice that has to wait until a
    replica may leave is taken only if no other one is possible, and then the one that is possible first."""
    found = []
    for number, lease in enumerate(waiter.terms.options):
        victims = _victims(lease, staying, free, now)
        if victims is not None:
            waits_s = max((_leaves_in_s(victim, now) for victim in victims), default=0.0)
            found.append((waits_s, sum(value(victim, now) for victim in victims), number, lease, victims))
    if not found:
        return None
    _, _, _, lease, victims = min(found, key=lambda item: item[:3])
    return lease, victims


def _victims(lease: Bytes, staying: Sequence[Member], free: Mapping[str, int], now: float) -> list[Member] | None:
    """Returns the replicas that leave so that the lease fits, or None if it would not fit without all of them. Those
    that may leave first come first, and of these those of the least value."""
    room = dict(free)
    victims: list[Member] = []
    for member in sorted(staying, key=lambda member: (_leaves_in_s(member, now), value(member, now), member.name)):
        if _fits(lease, room):
            break
        if any(room.get(device, 0) < size and member.lease.get(device) for device, size in lease.items()):
            victims.append(member)
            _add(room, member.lease)
    if not _fits(lease, room):
        return None
    for member in sorted(victims, key=lambda member: -value(member, now)):  # The last one may have been enough.
        without = dict(room)
        _take(without, member.lease)
        if _fits(lease, without):
            victims.remove(member)
            room = without
    return victims


def _leaves_in_s(member: Member, now: float) -> float:
    """Returns the seconds until a replica may leave, as far as they are known."""
    if member.state == "waking":
        return member.ready_in_s + _longest_stay_s(member)
    return max(0.0, member.since + stay_s(member, now) - now)


class _Copies:
    """Says who keeps a copy in the host's memory, while several replicas leave at one time."""

    def __init__(self, pool: Pool, now: float):
        self._now = now
        self._room = pool.host_budget - pool.copied_bytes
        self._held = [member for member in pool.members if member.has_copy]

    def leave(self, victim: Member, waiter: Member) -> list[Order]:
        """Returns the order to leave, after those that make room for its copy. A copy goes only for one of greater
        value, and never that of the replica that is about to wake."""
        if not victim.terms.host_bytes or victim in self._held:
            return [Leave(victim.name, victim in self._held, waiter.name)]
        room, worth, gone = self._room, value(victim, self._now), list[Member]()
        others = [member for member in self._held if member != waiter and member.state in ("parked", "resident")]
        for member in sorted(others, key=lambda member: (value(member, self._now), member.name)):
            if room >= victim.terms.host_bytes or value(member, self._now) >= worth:
                break
            room += member.terms.host_bytes
            gone.append(member)
        if room < victim.terms.host_bytes:
            return [Leave(victim.name, False, waiter.name)]
        self._room = room - victim.terms.host_bytes
        self._held = [*(member for member in self._held if member not in gone), victim]
        return [*(Forget(member.name, victim.name) for member in gone), Leave(victim.name, True, waiter.name)]


def _fits(lease: Bytes, room: Mapping[str, int]) -> bool:
    return all(size <= room.get(device, 0) for device, size in lease.items())


def _add(room: dict[str, int], lease: Bytes) -> None:
    for device, size in lease.items():
        room[device] = room.get(device, 0) + size


def _take(room: dict[str, int], lease: Bytes) -> None:
    for device, size in lease.items():
        room[device] = room.get(device, 0) - size
