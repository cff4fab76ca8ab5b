"""What vLLM's worker processes are given of ours: a method that says what they hold.

vLLM makes this class a base of its worker (`worker_extension_cls`), and the engine calls the method in every rank.
"""

from dataclasses import asdict
from typing import Any

from serve_app.engines.measure import rank_memory, tensor_bytes
from serve_app.facts.process_memory import resident_bytes

# vLLM imports this file before it loads the model.
LIBRARIES = resident_bytes()


class MemoryReport:
    """Its one name must be none of the worker's own."""

    model_runner: Any
    device: Any
    _tensors: tuple[int, int] | None = None

    def serve_app_memory(self) -> dict[str, Any]:
        """A `RankMemory` of this rank, as plain values. It runs between two steps, so it is short."""
        if self._tensors is None:  # Neither changes after the start.
            weights = sum(tensor_bytes(self.model_runner.model.parameters()).values())
            caches = getattr(self.model_runner, "kv_caches", ())
            cache = sum(tensor_bytes(item for item in caches if hasattr(item, "untyped_storage")).values())
            self._tensors = weights, cache
        return asdict(rank_memory(self.device, *self._tensors, LIBRARIES))
