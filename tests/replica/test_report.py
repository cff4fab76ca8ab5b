"""Reports of replicas in Ray's key-value store: read by any version, and removed only when they are old."""

import json
import time
from dataclasses import asdict
from typing import Any

import pytest

from serve_app.replica import report as report_module
from serve_app.replica.report import FORGOTTEN_S, PREFIX, ReplicaReport, read_reports


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
