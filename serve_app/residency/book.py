"""Keeps the leases of one pool: what its replicas tell, what was decided, and what each has to be told.

It does no I/O and has no clock, so `keeper.py` gives it the time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from serve_app.planning.sizes import gib
from serve_app.residency.life_lock import Holding
from serve_app.residency.member import Bytes, Demand, Member, Pool, State, Terms
from serve_app.residency.policy import (
    Forget,
    Leave,
    Order,
    Wake,
    decide,
    fits_alone,
    longest_wait_s,
    sent_away,
)


@dataclass(frozen=True)
class Report:
    """This is what a replica tells about itself. Ages are in seconds, because its clock is not the keeper's.

    `orders_seen` counts the orders that it has got from this keeper since it joined. An older report than the last
    order says nothing about its state, which the order has changed.
    """

    terms: Terms
    state: State
    lease: Bytes = field(default_factory=dict)
    has_copy: bool = False
    waiting: int = 0
    oldest_age_s: float = 0.0
    running: int = 0
    idle_s: float = 0.0
    orders_seen: int = 0


@dataclass(frozen=True)
class Decision:
    """This is an order with its reason in words and the time, in seconds since 1970."""

    order: Order
    reason: str
    at: float


@dataclass
class _Entry:
    member: Member
    undelivered: list[Order] = field(default_factory=list)
    ordered: int = 0
    is_known: bool = True  # False for a replica that an earlier keeper knew and that has told nothing to this one
    wanted_at: float | None = None  # when an operator asked for it to be resident, until it wakes
    is_unwanted: bool = False  # an operator has asked for its memory, which it gives back once it has no requests

    @property
    def asked(self) -> Member:
        """Returns the replica with the wish of an operator as a request that waits for it."""
        if self.wanted_at is None or self.member.state not in ("stopped", "parked"):
            return self.member
        demand = self.member.demand
        oldest = min(demand.oldest, self.wanted_at) if demand.waiting else self.wanted_at
        return replace(self.member, demand=replace(demand, waiting=demand.waiting + 1, oldest=oldest))


class Book:
    """Holds the replicas of one pool. All times are seconds of one clock."""

    def __init__(self, budget: Bytes, host_budget: int):
        self.budget, self.host_budget = dict(budget), host_budget
        self._entries: dict[str, _Entry] = {}

    @property
    def pool(self) -> Pool:
        """Returns the pool with all replicas, also those of which only the lease is known."""
        return Pool(self.budget, self.host_budget, tuple(entry.asked for entry in self._entries.values()))

    @property
    def longest_wait_s(self) -> float:
        """Returns the bound of the policy for these replicas."""
        return longest_wait_s(entry.member for entry in self._entries.values())

    def member(self, replica: str) -> Member:
        """Returns a replica of the pool, as it will be once it has its orders."""
        return self._entries[replica].member

    def knows(self, replica: str) -> bool:
        """Returns whether the replica has joined this keeper."""
        entry = self._entries.get(replica)
        return entry is not None and entry.is_known

    def problem(self, terms: Terms) -> str | None:
        """Returns why a replica cannot be in this pool, or None. What the processes of others keep for ever is not
        there for it."""
        room = dict(self.budget)
        others = [entry.member.terms for name, entry in self._entries.items() if name != terms.replica]
        for device, size in ((d, s) for other in others if other.keeps_residue for d, s in other.residue.items()):
            room[device] = room.get(device, 0) - size
        if fits_alone(terms.options, room):
            return None
        needs = " or ".join(_amounts(option) for option in terms.options)
        kept = "" if room == self.budget else f", of which the processes of others leave {_amounts(room)}"
        return f"'{terms.model}' needs {needs}, and the whole pool has {_amounts(self.budget)}{kept}."

    def restore(self, record: Mapping[str, Any], now: float) -> None:
        """Takes over what an earlier keeper wrote of a replica (`record`). Its lease counts until it joins or dies."""
        told = record["terms"]
        terms = Terms(**{**told, "options": tuple(told["options"]), "process": tuple(told["process"])})
        demand = Demand(last_used=now)
        member = Member(terms, record["state"], now, record["lease"], record["has_copy"], demand)
        self._entries[terms.replica] = _Entry(member, is_known=False)

    def add_left_behind(self, holding: Holding, now: float) -> None:
        """Counts what a replica of a dead node of Ray still holds on this machine, until it has ended."""
        terms = Terms(
            holding.replica, holding.model, (holding.lease,), 0, 0.0, 0.0, 0.0, 0.0, 0.0, process=holding.process
        )
        member = Member(terms, "draining", now, dict(holding.lease), demand=Demand(last_used=now))
        self._entries.setdefault(holding.replica, _Entry(member, is_known=False))

    def records(self) -> list[dict[str, Any]]:
        """Returns what another keeper must know of each replica if this one dies, as JSON has it."""
        members = (entry.member for entry in self._entries.values())
        return [
            {"terms": asdict(each.terms), "state": each.state, "lease": dict(each.lease), "has_copy": each.has_copy}
            for each in members
        ]

    def join(self, report: Report, now: float) -> None:
        """Adds a replica, or takes what it says for true if it is known: it has got no order that it does not know of,
        or has died and forgotten it."""
        old = self._entries.get(report.terms.replica)
        entry = _Entry(_member(report, now, since=now))
        if old is not None:
            entry.wanted_at, entry.is_unwanted = old.wanted_at, old.is_unwanted
        self._entries[report.terms.replica] = entry

    def update(self, report: Report, now: float) -> None:
        """Takes over what a replica tells. It must have joined."""
        entry = self._entries[report.terms.replica]
        old = entry.member
        told = _member(report, now, since=old.since if report.state == old.state else now)
        if told.state == "draining":  # It has a copy only later, but the room for it is taken already.
            told = replace(told, has_copy=old.has_copy)
        if report.orders_seen < entry.ordered:
            told = replace(old, terms=told.terms, demand=told.demand)
        entry.member = told

    def remove(self, replica: str) -> None:
        """Forgets a replica that has ended, with its lease."""
        self._entries.pop(replica, None)

    def wake(self, model: str, now: float) -> State | None:
        """Makes one replica of a model resident as if a request waited for it, unless one is or will be. Returns the
        state of that replica before, or None if no replica of the model has joined. It is a wish of this keeper alone,
        so another keeper does not know it."""
        entries = self._entries_of(model)
        if not entries:
            return None
        for entry in entries:
            entry.is_unwanted = False
        held = [entry.member.state for entry in entries if entry.member.state in ("resident", "waking")]
        if not held and all(entry.wanted_at is None for entry in entries):
            # One that leaves has to leave first, and is asked for only if there is no other one.
            nearest = min(entries, key=lambda entry: (entry.member.state == "draining", entry.member.ready_in_s))
            nearest.wanted_at = now
            return nearest.member.state
        return "resident" if "resident" in held else "waking"

    def park(self, model: str) -> list[State] | None:
        """Makes each replica of a model leave at the first moment at which it has no requests, though nobody waits for
        its memory. Returns their states before, or None if no replica of the model has joined."""
        entries = self._entries_of(model)
        for entry in entries:
            entry.wanted_at, entry.is_unwanted = None, entry.member.state in ("resident", "waking")
        return [entry.member.state for entry in entries] or None

    def _entries_of(self, model: str) -> list[_Entry]:
        return [entry for entry in self._entries.values() if entry.member.terms.model == model and entry.is_known]

    def decide(self, now: float, at: float) -> list[Decision]:
        """Decides by the policy and by what operators want, and writes down the consequences. `at` is the time in
        seconds since 1970."""
        decisions = self._ordered(decide(self.pool, now), now, at)
        for entry in list(self._entries.values()):
            member = entry.member
            is_idle = not (member.demand.running or member.demand.waiting)
            if entry.is_unwanted and member.state == "resident" and is_idle:
                decisions += self._ordered(sent_away(self.pool, member, now), now, at)
        return decisions

    def _ordered(self, orders: Sequence[Order], now: float, at: float) -> list[Decision]:
        """Returns these orders with their reasons, and gives them out."""
        decisions = [Decision(order, self._reason(order, now), at) for order in orders]
        for order in orders:
            entry = self._entries[order.replica]
            entry.member = _after(entry.member, order, now)
            entry.undelivered.append(order)
            entry.ordered += 1
            match order:
                case Wake():
                    entry.wanted_at = None
                case Leave():
                    entry.is_unwanted = False
        return decisions

    def take(self, replica: str) -> list[Order]:
        """Returns the orders that the replica has not got yet, once."""
        entry = self._entries[replica]
        orders, entry.undelivered = entry.undelivered, []
        return orders

    def has_orders(self, replica: str) -> bool:
        """Returns whether there are orders that the replica has not got yet."""
        return bool(self._entries[replica].undelivered)

    def _reason(self, order: Order, now: float) -> str:
        entry = self._entries[order.replica]
        member = entry.member
        model = member.terms.model
        match order:
            case Wake(_, lease) if entry.wanted_at is not None and not member.demand.waiting:
                return f"'{model}' gets {_amounts(lease)}, because an operator wants it to be resident."
            case Leave(replica, parks, instead) if replica == instead:
                return (
                    f"'{model}' is {'parked' if parks else 'stopped'} and gives back {_amounts(member.lease)}, because "
                    "an operator wants it to leave."
                )
            case Wake(_, lease):
                waited = now - member.demand.oldest
                return (
                    f"'{model}' gets {_amounts(lease)}: {_requests(member.demand.waiting)} waiting, the oldest for "
                    f"{waited:.1f} s. It takes about {member.ready_in_s:.1f} s from {member.state}."
                )
            case Leave(_, parks, instead):
                idle = "in use" if member.demand.running else f"idle for {now - member.demand.last_used:.0f} s"
                return (
                    f"'{model}' ({idle}, {_requests(member.demand.running)} running) is "
                    f"{'parked' if parks else 'stopped'} and gives back {_amounts(member.lease)} for "
                    f"'{self._model(instead)}'."
                )
            case Forget(_, instead):
                return (
                    f"'{model}' gives back its copy of {gib(member.terms.host_bytes)} for the one of "
                    f"'{self._model(instead)}'."
                )

    def _model(self, replica: str) -> str:
        return self._entries[replica].member.terms.model


def _member(report: Report, now: float, since: float) -> Member:
    oldest = now - report.oldest_age_s
    demand = Demand(report.waiting, oldest, report.running, now if report.running else now - report.idle_s)
    return Member(report.terms, report.state, since, dict(report.lease), report.has_copy, demand)


def _after(member: Member, order: Order, now: float) -> Member:
    match order:
        case Wake(_, lease):
            return replace(member, state="waking", since=now, lease=dict(lease))
        case Leave(_, parks, _):
            return replace(member, state="draining", since=now, has_copy=parks)
        case Forget():
            if member.state != "parked":
                return replace(member, has_copy=False)
            return replace(member, state="draining", since=now, has_copy=False)


def _amounts(sizes: Bytes) -> str:
    return ", ".join(f"{gib(size)} of {device}" for device, size in sorted(sizes.items()))


def _requests(count: int) -> str:
    return f"{count} request{'' if count == 1 else 's'}"
