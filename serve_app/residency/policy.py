"""Decides which replicas leave a pool's memory, so that those for which requests wait can have it.

The laws, which hold whatever requests come and whichever replicas die:

1. Leases never exceed the budget on any device.
2. A replica stays for at least its `min_resident_s`. If it was used during the last `return_s` seconds, it stays for
   `WORTH_OF_A_SWAP` times as long as it would take to bring it back. So swaps cost at most a fixed share of the time.
   An operator may send away one without requests at any time (`sent_away`).
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
    `instead` is the replica for which it leaves, or itself if an operator wants it to leave."""

    replica: str
    parks: bool
    instead: str


@dataclass(frozen=True)
class Forget:
    """The replica must free its copy in the host's memory, because another one that parks is worth more, or because
    what it keeps of a device while it is parked is needed. One that is parked is stopped by this."""

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
            _add(promised, member.gives)
    staying = [member for member in pool.members if member.state in ("resident", "waking", "parked")]
    copies = _Copies(pool, now)
    leaving: list[Member] = []
    for waiter in waiters(pool):
        if waiter in leaving:  # What it keeps while it is parked goes to one that waits longer.
            continue
        others = [member for member in staying if member.name != waiter.name]
        chosen = _choose(waiter, others, _sum(promised, waiter.lease), now)
        if chosen is None:  # It has to wait for one that leaves already, and nobody may take its place meanwhile.
            if fits_alone(waiter.terms.options, pool.budget):
                for device in (device for option in waiter.terms.options for device in option):
                    promised[device] = min(0, promised.get(device, 0))
            continue
        staying = [member for member in others if member not in chosen.victims]
        leaving += chosen.victims
        if all(may_leave(victim, now) for victim in chosen.victims):  # None leaves early, its bytes would lie idle.
            orders += [order for victim in chosen.victims for order in copies.leave(victim, waiter, chosen.parks)]
        if not chosen.victims and _fits(chosen.lease, _sum(free, waiter.lease)):
            orders.append(Wake(waiter.name, chosen.lease))
            _add(free, waiter.lease)
            _take(free, chosen.lease)
        for victim in chosen.victims:
            _add(promised, _gives(victim, chosen.parks))
        _add(promised, waiter.lease)
        _take(promised, chosen.lease)
    return orders


def sent_away(pool: Pool, member: Member, now: float) -> list[Order]:
    """Returns the orders by which a resident replica leaves for nobody, because an operator wants its memory to be
    free. The second law does not hold for it. It parks if the host has room for its copy, or if others have copies of
    less value, which then go."""
    return _Copies(pool, now).leave(member, member, parks=True)


def waiters(pool: Pool) -> list[Member]:
    """Returns the replicas for which requests wait and that hold no memory, the one that waits longest first."""
    found = [member for member in pool.members if member.state in ("stopped", "parked") and member.demand.waiting]
    return sorted(found, key=lambda member: (member.demand.oldest, member.name))


def may_leave(member: Member, now: float) -> bool:
    """Returns whether a replica has been resident for long enough. One that is parked may always be stopped."""
    return member.state == "parked" or (member.state == "resident" and now - member.since >= stay_s(member, now))


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
    stayed for its time, has drained, and has parked and then been stopped. Then it wakes. Before that, every other
    replica may have had its turn once.
    """
    every = list(members)
    if not every:
        return 0.0
    stay = max(_longest_stay_s(member) + member.terms.drain_s + 2 * member.terms.leave_s for member in every)
    come = max(max(member.terms.start_s, member.terms.wake_s) for member in every)
    return len(every) * (stay + 2 * come)


def fits_alone(options: Sequence[Bytes], budget: Bytes) -> bool:
    """Returns whether a replica could run if it had the whole pool."""
    return any(_fits(option, budget) for option in options)


@dataclass(frozen=True)
class _Choice:
    """This is the lease that a replica will have, and those that leave for it. They may not park if what they would
    keep of a device is needed too."""

    lease: Bytes
    victims: list[Member]
    parks: bool


def _choose(waiter: Member, staying: Sequence[Member], free: Mapping[str, int], now: float) -> _Choice | None:
    """Returns the choice for which the least value has to leave. One that has to wait until a replica may leave is
    taken only if no other one is possible, and then the one that is possible first."""
    found: list[tuple[tuple[float, bool, float, int], _Choice]] = []
    for number, lease in enumerate(waiter.terms.options):
        for parks in (True, False):
            victims = _victims(lease, staying, free, now, parks)
            if victims is not None:
                waits_s = max((_leaves_in_s(victim, now) for victim in victims), default=0.0)
                worth = sum(value(victim, now) for victim in victims)
                found.append(((waits_s, not parks, worth, number), _Choice(lease, victims, parks)))
                break
    return min(found, key=lambda item: item[0])[1] if found else None


def _victims(
    lease: Bytes, staying: Sequence[Member], free: Mapping[str, int], now: float, parks: bool
) -> list[Member] | None:
    """Returns the replicas that leave so that the lease fits, or None if it would not fit without all of them. Those
    that may leave first come first, and of these those of the least value."""
    room = dict(free)
    victims: list[Member] = []
    for member in sorted(staying, key=lambda member: (_leaves_in_s(member, now), value(member, now), member.name)):
        if _fits(lease, room):
            break
        gives = _gives(member, parks)
        if any(room.get(device, 0) < size and gives.get(device) for device, size in lease.items()):
            victims.append(member)
            _add(room, gives)
    if not _fits(lease, room):
        return None
    for member in sorted(victims, key=lambda member: -value(member, now)):  # The last one may have been enough.
        without = dict(room)
        _take(without, _gives(member, parks))
        if _fits(lease, without):
            victims.remove(member)
            room = without
    return victims


def _gives(member: Member, parks: bool) -> Bytes:
    return member.gives if parks else member.all_gives


def _leaves_in_s(member: Member, now: float) -> float:
    """Returns the seconds until a replica may leave, as far as they are known."""
    if member.state == "waking":
        return member.ready_in_s + _longest_stay_s(member)
    if member.state == "parked":
        return 0.0
    return max(0.0, member.since + stay_s(member, now) - now)


class _Copies:
    """Says who keeps a copy in the host's memory, while several replicas leave at one time."""

    def __init__(self, pool: Pool, now: float):
        self._now = now
        self._room = pool.host_budget - pool.copied_bytes
        self._held = [member for member in pool.members if member.has_copy]
        self._leaving: list[Member] = []

    def leave(self, victim: Member, waiter: Member, parks: bool) -> list[Order]:
        """Returns the order to leave, after those that make room for its copy if it `parks`. A copy goes only for one
        of greater value, and never that of the replica that is about to wake."""
        self._leaving.append(victim)
        if victim.state == "parked" or not parks:
            self._held = [member for member in self._held if member != victim]
            is_parked = victim.state == "parked"
            return [Forget(victim.name, waiter.name) if is_parked else Leave(victim.name, False, waiter.name)]
        if not victim.terms.host_bytes or victim in self._held:
            return [Leave(victim.name, victim in self._held, waiter.name)]
        room, worth, gone = self._room, value(victim, self._now), list[Member]()
        others = [
            member
            for member in self._held
            if member != waiter and member not in self._leaving and member.state in ("parked", "resident")
        ]
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


def _sum(room: Mapping[str, int], more: Bytes) -> dict[str, int]:
    both = dict(room)
    _add(both, more)
    return both


def _add(room: dict[str, int], lease: Bytes) -> None:
    for device, size in lease.items():
        room[device] = room.get(device, 0) + size


def _take(room: dict[str, int], lease: Bytes) -> None:
    for device, size in lease.items():
        room[device] = room.get(device, 0) - size
