"""A model replica's metrics, through Ray's own exporter, which adds the application and the replica."""

from collections.abc import Sequence

from ray.serve import metrics

from serve_app.replica.report import DeviceReport


class ReplicaMetrics:
    """One set for each replica. Bytes by device: a GPU's UUID, or "cpu"."""

    def __init__(self) -> None:
        device = ("device",)
        self._planned = metrics.Gauge("serve_app_memory_planned_bytes", "What the plan gives this replica.", device)
        self._held = metrics.Gauge("serve_app_memory_held_bytes", "What this replica is measured to hold.", device)
        self._peak = metrics.Gauge("serve_app_memory_peak_bytes", "The most that it was measured to hold.", device)
        self._load = metrics.Gauge("serve_app_engine_load", "1 is a full batch, or a full KV cache; above 1 some wait.")

    def told(self, devices: Sequence[DeviceReport], load: float) -> None:
        """What was measured last. What nobody knows is no zero, and is left out."""
        self._load.set(load)
        for device in devices:
            tags = {"device": device.device}
            for gauge, size in ((self._planned, device.planned), (self._held, device.held), (self._peak, device.peak)):
                if size is not None:
                    gauge.set(size, tags=tags)
