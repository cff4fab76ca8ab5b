"""Counts what the models answered in the last ten minutes, in intervals of `INTERVAL_S`. Times are passed in.

Each model has a ring of `INTERVALS` entries of a few numbers, so the memory is bounded by the models that are known.
Times to the first piece are counted in bins whose width is a twelfth of their value, so entries of several routers can
be added up, and a percentile is right to within that width.
"""

import math
from collections.abc import Collection, Iterable, Mapping

import msgspec

INTERVAL_S = 5
INTERVALS = 120
# Changes of intervals that have ended are known for so many seconds, in which pages and other routers are told them.
LATE_S = 15.0
# A doubling of the time has this many bins.
BINS = 8
# Times outside of these many seconds are counted as the nearest of them.
LEAST_S, MOST_S = 0.001, 3600.0
SERIES = ("requests", "errors", "tokens_per_s", "ttft_p50_s", "ttft_p95_s", "waiting", "active")

Series = Mapping[str, float | None]


class Entry(msgspec.Struct, array_like=True):
    """This is what happened in one interval: requests that ended, those of them that failed or found no room, tokens of
    answers, and times to the first piece by their bin. `waiting` and `active` are the most requests that were seen
    waiting and running."""

    requests: int = 0
    errors: int = 0
    tokens: int = 0
    firsts: dict[int, int] = {}
    waiting: int = 0
    active: int = 0

    def plus(self, other: "Entry") -> "Entry":
        """Returns what both routers counted."""
        firsts = {key: self.firsts.get(key, 0) + other.firsts.get(key, 0) for key in {*self.firsts, *other.firsts}}
        return Entry(
            self.requests + other.requests, self.errors + other.errors, self.tokens + other.tokens, firsts,
            self.waiting + other.waiting, self.active + other.active,
        )  # fmt: skip


# The entries of each model, by their interval's number.
Rings = dict[str, dict[int, Entry]]


def slot_of(now: float) -> int:
    """Returns the number of the interval of a time, in seconds since 1970."""
    return int(now // INTERVAL_S)


class Traffic:
    """Counts for one router replica, from the time `began`."""

    def __init__(self, began: float):
        self.first_slot = slot_of(began)
        self._rings: Rings = {}
        # When an interval was counted in that had ended, for those of the last `LATE_S`.
        self._late: dict[int, float] = {}

    def ended(self, now: float, model: str, is_error: bool, first_s: float | None) -> None:
        """Counts a request that is over. `first_s` is the time to the first piece of its answer, if there was one."""
        entry = self._entry(now, model)
        entry.requests += 1
        entry.errors += is_error
        if first_s is not None:
            key = _bin(first_s)
            entry.firsts[key] = entry.firsts.get(key, 0) + 1

    def made(self, now: float, model: str, tokens: int) -> None:
        """Counts tokens of answers."""
        if tokens > 0:
            self._entry(now, model).tokens += tokens

    def made_since(self, began: float, now: float, model: str, tokens: int) -> None:
        """Counts tokens of an answer that came whole, as if they had been made evenly from `began` until now."""
        last = slot_of(now)
        first = min(last, max(slot_of(began), self.first_slot, last - INTERVALS + 1))
        begins = min(now, max(began, float(first * INTERVAL_S)))
        told = 0
        for slot in range(first, last + 1):
            ends = min(now, float((slot + 1) * INTERVAL_S))
            due = tokens if slot == last else int(tokens * (ends - begins) / (now - begins))
            self.made(ends if slot == last else float(slot * INTERVAL_S), model, due - told)
            told = due
            if slot < last:
                self._late[slot] = now

    def late(self, since: float) -> list[int]:
        """Returns the intervals that had ended when they were counted in after the time `since`, which is at most
        `LATE_S` ago."""
        newest = max(self._late.values(), default=0.0)
        self._late = {slot: at for slot, at in self._late.items() if newest - at < LATE_S}
        return sorted(slot for slot, at in self._late.items() if at > since)

    def seen(self, now: float, model: str, waiting: int, active: int) -> None:
        """Notes how many requests wait and run now."""
        if waiting or active:
            entry = self._entry(now, model)
            entry.waiting, entry.active = max(entry.waiting, waiting), max(entry.active, active)

    def forget_all_but(self, models: Collection[str]) -> None:
        """Forgets models that exist no more."""
        for name in self._rings.keys() - set(models):
            del self._rings[name]

    def rings(self, since: int = 0) -> Rings:
        """Returns the entries from the interval `since` on. They are not copied."""
        if not since:
            return self._rings
        found = {}
        for name, ring in self._rings.items():
            if kept := {slot: entry for slot, entry in ring.items() if slot >= since}:
                found[name] = kept
        return found

    def _entry(self, now: float, model: str) -> Entry:
        slot = slot_of(now)
        ring = self._rings.setdefault(model, {})
        entry = ring.get(slot)
        if entry is None:
            entry = ring[slot] = Entry(firsts={})
            for old in [key for key in ring if key <= slot - INTERVALS]:
                del ring[old]
        return entry


def added(all_rings: Iterable[Rings]) -> Rings:
    """Returns the entries of several routers added up."""
    total: Rings = {}
    for rings in all_rings:
        for name, ring in rings.items():
            mine = total.setdefault(name, {})
            for slot, entry in ring.items():
                mine[slot] = mine[slot].plus(entry) if slot in mine else entry
    return total


def fixed(rings: Rings, now: float) -> Rings:
    """Returns the entries as they are now, which do not change when more is counted. Those of intervals that have ended
    are not copied."""
    last = slot_of(now) - 1
    return {
        name: {slot: entry if slot < last else entry.plus(Entry()) for slot, entry in ring.items()}
        for name, ring in rings.items()
    }


def whole_series(rings: Rings, now: float, first_slot: int) -> dict[str, dict[str, list[float | None]]]:
    """Returns the series of each model that has an entry in the last ten minutes: the interval of `now` is the last
    one, and there are as many before it as were counted, up to `INTERVALS` together."""
    last = slot_of(now)
    slots = range(max(first_slot, last - INTERVALS + 1), last + 1)
    found = {}
    for name, ring in rings.items():
        if any(slot in ring for slot in slots):
            values = [values_of(ring.get(slot), slot, now) for slot in slots]
            found[name] = {series: [value[series] for value in values] for series in SERIES}
    return found


def last_values(rings: Rings, slot: int, now: float) -> dict[str, Series]:
    """Returns the values of one interval for each model that has an entry in the ten minutes before it."""
    oldest = slot - INTERVALS
    return {
        name: values_of(ring.get(slot), slot, now)
        for name, ring in rings.items()
        if slot in ring or any(oldest < key <= slot for key in ring)
    }


def values_of(entry: Entry | None, slot: int, now: float) -> Series:
    """Returns the values of an entry. Tokens per second of an interval that has not ended are those of its seconds so
    far."""
    if entry is None:
        return dict.fromkeys(SERIES, 0) | {"ttft_p50_s": None, "ttft_p95_s": None}
    seconds = min(float(INTERVAL_S), max(1.0, now - slot * INTERVAL_S))
    return {
        "requests": entry.requests,
        "errors": entry.errors,
        "tokens_per_s": round(entry.tokens / seconds, 2),
        "ttft_p50_s": _percentile(entry.firsts, 0.50),
        "ttft_p95_s": _percentile(entry.firsts, 0.95),
        "waiting": entry.waiting,
        "active": entry.active,
    }


def _bin(seconds: float) -> int:
    return round(BINS * math.log2(min(max(seconds, LEAST_S), MOST_S) / LEAST_S))


def _percentile(firsts: Mapping[int, int], share: float) -> float | None:
    """Returns the time that this share of the requests did not exceed (nearest rank), or None without any."""
    if not firsts:
        return None
    rank = math.ceil(share * sum(firsts.values()))
    for key in sorted(firsts):
        rank -= firsts[key]
        if rank <= 0:
            return float(f"{LEAST_S * 2 ** (key / BINS):.3g}")
    raise AssertionError("the ranks end within the counts")
