"""Reports of replicas in Ray's key-value store: read by any version, and removed only when they are old."""

import json
import time
from dataclasses import asdict, replace
from typing import Any

import pytest

from serve_app.facts.device_memory import DeviceMemory
from serve_app.replica import report as report_module
from serve_app.replica.report import (
    FORGOTTEN_S,
    PREFIX,
    WATCHED_FOR_S,
    WATCHED_UNTIL,
    DeviceReport,
    PartReport,
    ReplicaReport,
    is_watched,
    parsed_report,
    read_reports,
    tell_watched,
    watchers,
)


def report(written_at: float, **more: Any) -> bytes:
    """One as it is stored, with fields of another version."""
    item = ReplicaReport("a", "1", "n", 1, "m", "pt", 0.0, 1.0, written_at, ())
    return json.dumps(asdict(item) | more).encode()


def test_only_old_reports_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two versions serve side by side during an upgrade, and one must not remove what the other reads."""
    now = time.time()
    kept = {
        "ours": report(now),
        "newer": report(now, tokens=1),
        "no-time": b'{"application": "a"}',
        "words": b"not JSON",
        "list": b"[1]",
    }
    old = {"ours-old": report(now - FORGOTTEN_S - 1), "newer-old": report(now - FORGOTTEN_S - 1, tokens=1)}
    stored = {PREFIX + name.encode(): text for name, text in {**kept, **old}.items()}
    monkeypatch.setattr(report_module, "stored_keys", lambda _: sorted(stored))
    monkeypatch.setattr(report_module, "stored", stored.get)
    monkeypatch.setattr(report_module, "delete_stored", stored.pop)
    assert [item.written_at for item in read_reports()] == [now]
    assert set(stored) == {PREFIX + name.encode() for name in kept}


def test_a_report_of_an_earlier_version_is_read_without_what_it_lacks() -> None:
    """And one of this version comes back whole."""
    part = PartReport("weights", 5, 4, "exact")
    device = DeviceReport("cpu", None, 5, "exact", 4, 4, 4, 0, parts=(part,))
    seen = DeviceMemory("cpu", None, "memory", 100, 60, 1.0)
    ours = ReplicaReport("a", "1", "n", 1, "m", "pt", 0.0, 1.0, 2.0, (device,), node_id="abc", node_devices=(seen,))
    item = asdict(ours)
    assert parsed_report(json.dumps(item).encode()) == ours
    for name in ("node_id", "node_devices"):
        del item[name]
    for name in ("parts", "total", "used"):
        del item["devices"][0][name]
    earlier = parsed_report(json.dumps(item).encode())
    assert earlier == replace(ours, devices=(replace(device, parts=()),), node_id="", node_devices=())


def test_nobody_watches_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither after the last word nor by a clock that is far ahead, nor after nonsense."""
    stored: dict[bytes, bytes] = {}
    monkeypatch.setattr(report_module, "stored", stored.get)
    monkeypatch.setattr(report_module, "store", stored.__setitem__)
    assert watchers(1000.0) == "never"
    assert not is_watched(1000.0)
    tell_watched(1000.0)
    assert is_watched(1000.0 + WATCHED_FOR_S - 1)
    assert not is_watched(1000.0 + WATCHED_FOR_S)
    assert watchers(1000.0 + WATCHED_FOR_S) == "earlier"
    assert not is_watched(900.0)
    stored[WATCHED_UNTIL] = b"nonsense"
    assert not is_watched(1000.0)
