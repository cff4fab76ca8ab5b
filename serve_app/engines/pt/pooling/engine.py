"""Is the pt engine of a model that makes vectors or scores, as the replica sees it."""

import asyncio
import gc
import logging
from functools import partial
from pathlib import Path
from typing import Self

import torch
from starlette.types import ASGIApp

from serve_app.config import ModelConfig
from serve_app.engines.lost_adapter import LostAdapter
from serve_app.engines.measure import rank_memory, tensor_peak
from serve_app.engines.pt.core.heap import free_everything
from serve_app.engines.pt.core.memory_part import Part
from serve_app.engines.pt.core.parked_memory import ParkedMemory
from serve_app.engines.pt.core.step_timeout import step_timeout_s
from serve_app.engines.pt.load.weight_parts import copy_on_host, weight_bytes, weight_parts, why_not_movable
from serve_app.engines.pt.pooling.loader import LoadedPooler, load_pooler, weights_of_head
from serve_app.engines.pt.pooling.pooler import Pooler
from serve_app.engines.pt.pooling.pooling_api import build_app
from serve_app.engines.rank_memory import RankMemory
from serve_app.engines.workers import in_thread_of_its_own
from serve_app.errors import AdapterError, EngineError
from serve_app.facts.pooling import Pooling
from serve_app.facts.process_memory import resident_bytes
from serve_app.planning.plan import ModelPlan
from serve_app.planning.pooling import POOLED_SEQS, step_tokens

logger = logging.getLogger("ray.serve")

# So many inputs may wait, unless `max_queued_requests` says otherwise. They are small beside those of a chat.
MOST_QUEUED = 4096
STOP_TIMEOUT_S = 10.0


class PoolingEngine:
    """Runs one embedding model or cross-encoder with transformers and accelerate in this process."""

    def __init__(self, config: ModelConfig, name: str, pooling: Pooling, planned: ModelPlan | None = None):
        self.name = name
        self._config, self._pooling, self._planned = config, pooling, planned
        self._pooler: Pooler | None = None
        self._libraries = 0
        self._weights: dict[torch.device, int] = {}
        self._memory_to_park: ParkedMemory | None = None

    async def start(self) -> ASGIApp:
        """Loads the model in a thread, starts the engine's thread, and returns the application."""
        config = self._config
        torch.set_num_threads(max(1, int(config.num_cpus)))
        self._libraries = resident_bytes()
        loaded = await in_thread_of_its_own(partial(load_pooler, config, self._pooling, self._planned))
        self._pooler = Pooler(
            self.name, loaded, step_tokens(config, loaded.max_model_len), config.max_num_seqs or POOLED_SEQS,
            config.max_queued_requests or MOST_QUEUED, step_timeout_s(config),
        )  # fmt: skip
        self._weights = weight_bytes(loaded.model)  # They do not change, and a parked engine cannot be asked.
        for device, size in weights_of_head(loaded).items():
            self._weights[device] = self._weights.get(device, 0) + size
        self._memory_to_park = self._movable(loaded)
        app = build_app(self._pooler)
        gc.collect()
        gc.freeze()
        return app

    async def check_health(self) -> None:
        """Raises EngineError if the engine's thread has ended or hangs."""
        self.pooler.require_alive()

    def load(self) -> float:
        """Returns the inputs that are computed or wait as a share of those of a step."""
        return self.pooler.in_flight / self.pooler.rows

    def cache_blocks(self) -> None:
        """Returns None, because there is no KV cache."""

    def draft_counts(self) -> None:
        """Returns None, because nothing is drafted."""

    def prompt_cache_counts(self) -> None:
        """Returns None, because no text is kept."""

    async def memory(self) -> list[RankMemory]:
        """Returns what this process holds of each device that holds a part of the model."""
        return await asyncio.to_thread(self._memory)

    def parking(self) -> Self | None:
        """Returns this engine, or None if its weights cannot be moved, for a reason that was logged at the start."""
        return None if self._memory_to_park is None else self

    async def park(self, still_bytes: int | None = None) -> None:
        """Does what `Parking` says. There is no KV cache, so what stands still takes nothing."""
        self._parked_memory.most_cache_bytes = still_bytes
        await asyncio.wrap_future(self.pooler.park(self._parked_memory))

    async def wake(self) -> None:
        """Does what `Parking` says."""
        await asyncio.wrap_future(self.pooler.wake())

    def copy_bytes(self) -> int:
        """Does what `Parking` says. It is 0 before `start` and after `stop`."""
        return 0 if self._memory_to_park is None else self._memory_to_park.copy_bytes

    async def forget_copy(self) -> None:
        """Does what `Parking` says."""
        await asyncio.to_thread(self._parked_memory.forget_copy)

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Raises AdapterError, because the plan refuses adapters of such a model (`pooling_problem`)."""
        raise AdapterError("pt serves adapters of models that generate text only.")

    def watch_adapters(self, lost: LostAdapter) -> None:
        """Does nothing, because there is none."""

    async def unload_adapter(self, name: str) -> None:
        """Does nothing, because there is none."""

    async def stop(self) -> None:
        """Ends the thread, removes the offloaded weights, and frees the memory of the model. All that takes time
        happens in threads. A thread that hangs keeps its memory."""
        if self._pooler is None:
            return
        offload = self._pooler.loaded.offload
        gc.unfreeze()
        await asyncio.to_thread(self._pooler.stop, STOP_TIMEOUT_S)
        if self._memory_to_park is not None and self._pooler.has_ended:
            await asyncio.to_thread(self._memory_to_park.close)
        if offload is not None:
            await asyncio.to_thread(offload.cleanup)
        self._pooler = self._memory_to_park = None
        await in_thread_of_its_own(free_everything)

    @property
    def pooler(self) -> Pooler:
        """Returns the running model. Raises EngineError before `start` and after `stop`."""
        if self._pooler is None:
            raise EngineError("the pt engine does not run")
        return self._pooler

    @property
    def _parked_memory(self) -> ParkedMemory:
        if self._memory_to_park is None:
            raise EngineError("This engine cannot park.")
        return self._memory_to_park

    def _movable(self, loaded: LoadedPooler) -> ParkedMemory | None:
        """Returns what parks the weights, or None if that cannot be done, which it logs. The layers behind the pooling
        are moved with those that belong to no layer of the model."""
        if reason := why_not_movable(loaded.model, self._config.device):
            logger.warning("This model cannot park: %s.", reason)
            return None
        parts = weight_parts(loaded.model)
        if loaded.runner.head is not None:
            parts = [Part([*parts[0].tensors, *loaded.runner.head.layers.parameters()]), *parts[1:]]
        return ParkedMemory(parts, list, copy_on_host(self._config.device))

    def _memory(self) -> list[RankMemory]:
        kind, is_parked = "cpu" if self._config.device == "cpu" else "cuda", self.pooler.is_parked
        return [
            rank_memory(
                device, 0 if is_parked else size, 0, self._libraries, tensor_peak=tensor_peak(device, is_parked)
            )
            for device, size in self._weights.items()
            if device.type == kind
        ]
