"""The counters of a replica."""

from typing import Any

import pytest

from serve_app.engines.draft_counts import DraftCounts
from serve_app.replica import metrics
from serve_app.replica.metrics import ReplicaMetrics


class Kept:
    """One of Ray's metrics, which keeps what it is raised by."""

    def __init__(self, name: str, *_: object):
        self.name = name
        self.raised: list[tuple[int, Any]] = []
        MADE[name] = self

    def inc(self, by: int, tags: Any) -> None:
        """Ray refuses to raise a counter by 0."""
        assert by > 0
        self.raised.append((by, tags))


MADE: dict[str, Kept] = {}


def test_speculation_is_counted_under_vllms_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counters are raised by what was counted since the last report, and never by nothing."""
    monkeypatch.setattr(metrics.metrics, "Counter", Kept)
    monkeypatch.setattr(metrics.metrics, "Gauge", Kept)
    replica = ReplicaMetrics()
    counts = DraftCounts(2, 8, 5, [2, 2, 1, 0])
    replica.drafted(counts)
    replica.drafted(counts)
    counts.drafts, counts.draft_tokens = 3, 12
    replica.drafted(counts)
    assert MADE["vllm_spec_decode_num_drafts"].raised == [(2, None), (1, None)]
    assert MADE["vllm_spec_decode_num_draft_tokens"].raised == [(8, None), (4, None)]
    assert MADE["vllm_spec_decode_num_accepted_tokens"].raised == [(5, None)]
    places = [({"position": str(place)}) for place in range(3)]
    expected = list(zip((2, 2, 1), places, strict=True))
    assert MADE["vllm_spec_decode_num_accepted_tokens_per_pos"].raised == expected
