"""What several routers tell each other."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from serve_app.console import shared as shared_module
from serve_app.console.events import Event
from serve_app.console.ledger import Ledger
from serve_app.console.requests import Row
from serve_app.console.shared import (
    FORGOTTEN_S,
    RECENT_SLOTS,
    STALE_S,
    OtherRouter,
    Record,
    SharedRouters,
    queued_of_all,
    rings_of_all,
)
from serve_app.console.snapshot import Queued
from serve_app.console.traffic import INTERVAL_S, Traffic, slot_of

ROW = Row(64, "id", 1.0, "m", "/v1/x", 200, "ok", None, "k", False, 0, 0, 1.0, 1.0, 1.0, 1, 1)


class Store(dict[bytes, bytes]):
    """Ray's store, and the routers that use it at one time."""

    now = 1000.0

    def router(self, name: str) -> SharedRouters:
        """A router of this name."""
        return SharedRouters(
            name, self.__setitem__, self.get, lambda prefix: sorted(key for key in self if key.startswith(prefix)),
            lambda key: self.pop(key, None), lambda: self.now,
        )  # fmt: skip

    def record(self, traffic: Traffic, recent: bool, **more: Any) -> Record:
        """What a router with this traffic tells."""
        since = slot_of(self.now) - RECENT_SLOTS if recent else 0
        return Record(self.now, traffic.first_slot, traffic.rings(since), **more)

    def tell(self, router: SharedRouters, traffic: Traffic, **more: Any) -> None:
        """It tells it."""
        whole = self.record(traffic, False) if router.needs_whole() else None
        router.tell(self.record(traffic, True, **more), whole)


def test_routers_add_up_what_they_tell() -> None:
    """With what was counted before anybody watched."""
    store, traffic, own = Store(), Traffic(0.0), Traffic(0.0)
    one, other = store.router("one"), store.router("other")
    traffic.ended(500.0, "m", is_error=False, first_s=0.1)
    traffic.ended(999.0, "m", is_error=True, first_s=0.1)
    own.ended(999.0, "m", is_error=False, first_s=0.1)
    event = Event(1, 2.0, "lost", "m", "A replica was lost.", frozenset({"n"}))
    store.tell(other, traffic, queued={"m": Queued(1, 0, 2)}, rows=[ROW], events=[event])
    one.hear()
    (heard,) = one.others.values()
    assert heard.record.rows == [ROW]
    assert heard.record.events == [event]
    rings = rings_of_all(own.rings(), list(one.others.values()))
    assert {slot: (entry.requests, entry.errors) for slot, entry in rings["m"].items()} == {100: (1, 0), 199: (2, 1)}
    assert queued_of_all({"m": Queued(1, 1, 1)}, list(one.others.values())) == {"m": Queued(2, 1, 3)}
    other.hear()
    assert other.others == {}


def test_later_records_go_on_from_the_whole_one() -> None:
    """Though each has only the last intervals, and the whole is written seldom."""
    store, traffic = Store(), Traffic(0.0)
    one, other = store.router("one"), store.router("other")
    for _ in range(200):
        traffic.ended(store.now, "m", is_error=False, first_s=None)
        store.tell(other, traffic)
        one.hear()
        store.now += INTERVAL_S
    (heard,) = one.others.values()
    assert len(heard.rings["m"]) == 120
    assert all(entry.requests == 1 for entry in heard.rings["m"].values())


def test_a_router_that_is_gone_is_not_counted_and_then_forgotten() -> None:
    """Its records would stay for ever."""
    store, traffic = Store(), Traffic(0.0)
    one, other = store.router("one"), store.router("other")
    store.tell(other, traffic)
    store.now += STALE_S + 1
    one.hear()
    assert one.others == {}
    assert len(store) == 2
    store.now += FORGOTTEN_S
    one.hear()
    assert store == {}
    store.tell(other, traffic)
    other.forget()
    assert store == {}


def test_what_dead_routers_left_is_swept() -> None:
    """Also if there is one router now, which hears nobody. A router that runs keeps its records."""
    store, traffic = Store(), Traffic(0.0)
    one, dead, other = store.router("one"), store.router("dead"), store.router("other")
    store.tell(dead, traffic)
    store[shared_module.PREFIX + b"half/whole"] = store[shared_module.PREFIX + b"dead/whole"]
    store[shared_module.PREFIX + b"old/recent"] = b'{"nonsense": 1}'
    store.now += FORGOTTEN_S + 1
    store.tell(one, traffic)
    store.tell(other, traffic)
    one.sweep()
    assert sorted(store) == sorted(
        shared_module.PREFIX + name for name in (b"one/recent", b"one/whole", b"other/recent", b"other/whole")
    )


def test_a_record_of_another_version_is_skipped() -> None:
    """And one that is too large is not written."""
    store = Store()
    one = store.router("one")
    store[shared_module.PREFIX + b"other/recent"] = b'{"nonsense": 1}'
    one.hear()
    assert one.others == {}


def test_a_record_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's store is no place for more."""
    monkeypatch.setattr(shared_module, "MOST_BYTES", 100)
    store = Store()
    store.tell(store.router("one"), Traffic(0.0), rows=[ROW] * 10)
    assert not any(key.endswith(b"/recent") for key in store)


def test_the_requests_of_other_routers_are_told_once() -> None:
    """And again if they have changed."""
    parts: Any = SimpleNamespace(replica="abc")
    ledger = Ledger(parts, lambda: 1000.0)
    first = msgspec.structs.replace(ROW, outcome="running")
    events = [Event(1, 999.0, "retried", "m", "A replica was lost.")]
    ledger.heard({b"other": OtherRouter(Record(1000.0, 0, {}, rows=[first], events=events))})
    assert ledger.rows_since() == [first]
    mark = ledger.mark
    ledger.heard({b"other": OtherRouter(Record(1001.0, 0, {}, rows=[first], events=events))})
    assert ledger.rows_since(mark) == []
    assert [event.text for event in ledger.events.since()] == ["A replica was lost."]
    ledger.heard({b"other": OtherRouter(Record(1002.0, 0, {}, rows=[ROW], events=events))})
    assert ledger.rows_since(mark) == [ROW]
    ledger.heard({})
    assert ledger.rows_since() == []


def test_old_events_of_other_routers_are_not_told_again() -> None:
    """When a router is known anew, or was away for a while, because its record has its last events for long."""
    now = 1000.0
    parts: Any = SimpleNamespace(replica="abc")
    ledger = Ledger(parts, lambda: now)

    def heard(*names: str) -> list[str]:
        events = [Event(1, at, "retried", "m", f"At {at:g}.") for at in (100.0, 995.0)]
        before = ledger.events.last_id
        ledger.heard({name.encode(): OtherRouter(Record(now, 0, {}, events=events)) for name in names})
        return [event.text for event in ledger.events.since(before)]

    assert heard("other") == ["At 995."]
    assert heard() == []
    now += 5
    assert heard("other") == []
    now += 600
    assert heard("other", "third") == []
    now += 7200
    heard()
    assert ledger._heard == {}
