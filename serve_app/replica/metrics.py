"""Exports a model replica's metrics through Ray's own exporter, which adds the application and the replica."""

from collections.abc import Sequence

from ray.serve import metrics

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
