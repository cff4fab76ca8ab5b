"""The counters of a replica."""

from typing import Any

import pytest

from serve_app.engines.draft_counts import DraftCounts
from serve_app.engines.prompt_cache_counts import PromptCacheCounts
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

    def set(self, value: float) -> None:
        """A gauge has the last value."""
        self.value = value


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


def test_the_prompt_cache_is_counted_also_through_a_new_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters are raised by what has come since the last report. An engine that was stopped and started counts from
    zero, and so do the counters of speculation."""
    monkeypatch.setattr(metrics.metrics, "Counter", Kept)
    monkeypatch.setattr(metrics.metrics, "Gauge", Kept)
    replica = ReplicaMetrics()
    counts = PromptCacheCounts(queries=4, hits=1, query_tokens=500, hit_tokens=64, texts=2, bytes=4096)
    replica.prompted(counts)
    counts.queries, counts.query_tokens, counts.evictions = 5, 600, 1
    replica.prompted(counts)
    replica.prompted(PromptCacheCounts(queries=2, query_tokens=30))
    raised = {name: [by for by, _ in kept.raised] for name, kept in MADE.items() if "prompt_cache" in name}
    assert raised == {
        "serve_app_prompt_cache_queries": [4, 1, 2],
        "serve_app_prompt_cache_hits": [1],
        "serve_app_prompt_cache_query_tokens": [500, 100, 30],
        "serve_app_prompt_cache_hit_tokens": [64],
        "serve_app_prompt_cache_evictions": [1],
        "serve_app_prompt_cache_texts": [],
        "serve_app_prompt_cache_bytes": [],
    }
    assert MADE["serve_app_prompt_cache_bytes"].value == 0
    replica.drafted(DraftCounts(5, 20, 9, [5, 4]))
    replica.drafted(DraftCounts(1, 4, 1, [1, 0]))
    assert MADE["vllm_spec_decode_num_drafts"].raised == [(5, None), (1, None)]
