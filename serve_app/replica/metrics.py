"""Exports a model replica's metrics through Ray's own exporter, which adds the application and the replica."""

from collections.abc import Sequence
from dataclasses import replace

from ray.serve import metrics

from serve_app.engines.draft_counts import DraftCounts
from serve_app.engines.prompt_cache_counts import PromptCacheCounts
from serve_app.replica.report import BlocksReport, DeviceReport


class ReplicaMetrics:
    """These are the gauges of one replica. Bytes are by device, which is a GPU's UUID or "cpu", and by the number of
    the engine's process."""

    def __init__(self) -> None:
        place = ("device", "rank")
        self._planned = metrics.Gauge("serve_app_memory_planned_bytes", "The plan gives this to the rank.", place)
        self._held = metrics.Gauge("serve_app_memory_held_bytes", "The rank is measured to hold this.", place)
        self._peak = metrics.Gauge("serve_app_memory_peak_bytes", "It was measured to hold this at most.", place)
        self._load = metrics.Gauge("serve_app_engine_load", "1 is a full batch or KV cache. Above 1, requests wait.")

        blocks = "Blocks of vLLM's KV cache, as planned and as made. They should be equal."
        self._blocks = metrics.Gauge("serve_app_kv_cache_blocks", blocks, ("kind",))
        # These names are vLLM's, whose colon Ray does not take. vLLM writes an underscore there under Ray.
        self._drafts = metrics.Counter("vllm_spec_decode_num_drafts", "Drafts of speculation.")
        self._draft_tokens = metrics.Counter("vllm_spec_decode_num_draft_tokens", "Drafted tokens.")
        self._accepted = metrics.Counter("vllm_spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.")
        by_place = "Drafted tokens that were accepted, by their place in the draft."
        self._by_place = metrics.Counter("vllm_spec_decode_num_accepted_tokens_per_pos", by_place, ("position",))
        self._told = DraftCounts()
        self._prompts = _PromptCacheMetrics()

    def drafted(self, counts: DraftCounts) -> None:
        """Raises the counters of speculation to what the engine has counted since its start."""
        told = self._told
        if counts.drafts < told.drafts:  # The engine was stopped and started.
            told = DraftCounts()
        told.accepted_per_pos += [0] * (len(counts.accepted_per_pos) - len(told.accepted_per_pos))
        now = DraftCounts(
            counts.drafts, counts.draft_tokens, counts.accepted_tokens, list(counts.accepted_per_pos)
        )  # The engine's thread counts on.
        _raise(self._drafts, now.drafts - told.drafts)
        _raise(self._draft_tokens, now.draft_tokens - told.draft_tokens)
        _raise(self._accepted, now.accepted_tokens - told.accepted_tokens)
        for place, (count, before) in enumerate(zip(now.accepted_per_pos, told.accepted_per_pos, strict=True)):
            _raise(self._by_place, count - before, {"position": str(place)})
        self._told = now

    def prompted(self, counts: PromptCacheCounts) -> None:
        """Takes over what the prompt cache has counted since the engine's start, and what it holds."""
        self._prompts.told(counts)

    def told(self, devices: Sequence[DeviceReport], load: float, blocks: BlocksReport) -> None:
        """Sets the gauges to what was measured last. It leaves out what is unknown, because that is not zero."""
        self._load.set(load)
        for kind, count in (("planned", blocks.planned), ("made", blocks.made)):
            if count is not None:
                self._blocks.set(count, tags={"kind": kind})
        for device in devices:
            tags = {"device": device.device, "rank": str(device.rank)}
            for gauge, size in ((self._planned, device.planned), (self._held, device.held), (self._peak, device.peak)):
                if size is not None:
                    gauge.set(size, tags=tags)


class _PromptCacheMetrics:
    """These are of the texts that pt keeps for later prompts, of one replica."""

    def __init__(self) -> None:
        self._queries = metrics.Counter("serve_app_prompt_cache_queries", "Prompts that were looked up.")
        self._hits = metrics.Counter("serve_app_prompt_cache_hits", "Prompts that began with a kept text.")
        self._query_tokens = metrics.Counter("serve_app_prompt_cache_query_tokens", "Tokens of the prompts.")
        self._hit_tokens = metrics.Counter("serve_app_prompt_cache_hit_tokens", "Tokens that were not computed again.")
        self._evictions = metrics.Counter("serve_app_prompt_cache_evictions", "Texts that others needed the room of.")
        self._texts = metrics.Gauge("serve_app_prompt_cache_texts", "Texts that are kept.")
        self._bytes = metrics.Gauge("serve_app_prompt_cache_bytes", "Bytes of the host's memory that they take.")
        self._counters = {
            "queries": self._queries, "hits": self._hits, "query_tokens": self._query_tokens,
            "hit_tokens": self._hit_tokens, "evictions": self._evictions,
        }  # fmt: skip
        self._told = PromptCacheCounts()

    def told(self, counts: PromptCacheCounts) -> None:
        """Raises the counters, and sets the gauges."""
        now = replace(counts)  # The engine's thread counts on.
        before = PromptCacheCounts() if now.queries < self._told.queries else self._told  # It was started again.
        for name, counter in self._counters.items():
            _raise(counter, getattr(now, name) - getattr(before, name))
        self._texts.set(now.texts)
        self._bytes.set(now.bytes)
        self._told = now


class SwapMetrics:
    """These count the swaps of one replica: how often it came or went, the seconds that took, and the bytes that it
    took or gave back. The kind is the state from which it came or into which it went."""

    def __init__(self) -> None:
        kind = ("direction", "kind")
        self._swaps = metrics.Counter("serve_app_swaps", "The replica took its memory or gave it back.", kind)
        self._seconds = metrics.Counter("serve_app_swap_seconds", "Seconds that swaps took.", kind)
        self._bytes = metrics.Counter("serve_app_swap_bytes", "Bytes that were taken or given back.", kind)

    def swapped(self, before: str, after: str, seconds: float, size: int) -> None:
        """Counts one swap from a state to another one."""
        tags = {"direction": "in", "kind": before} if after == "resident" else {"direction": "out", "kind": after}
        self._swaps.inc(tags=tags)
        for counter, amount in ((self._seconds, seconds), (self._bytes, size)):
            if amount > 0:
                counter.inc(amount, tags=tags)


def _raise(counter: metrics.Counter, by: int, tags: dict[str, str] | None = None) -> None:
    """Raises a counter, which Ray does not raise by 0."""
    if by:
        counter.inc(by, tags=tags)
