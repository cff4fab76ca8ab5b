"""Defines an engine: an ASGI application that can be started, asked for its health, and stopped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from starlette.types import ASGIApp

from serve_app.config import ModelConfig
from serve_app.engines.draft_counts import DraftCounts
from serve_app.engines.lost_adapter import LostAdapter
from serve_app.engines.prompt_cache_counts import PromptCacheCounts
from serve_app.engines.rank_memory import RankMemory
from serve_app.facts.checkpoint import read_own_pooling
from serve_app.planning.plan import ModelPlan


class Parking(Protocol):
    """Is what an engine that can park does: it leaves its devices for a while and keeps its process and its requests.

    The weights go to a copy on the host. pt makes it when it parks for the first time and keeps it, because weights do
    not change. vLLM frees it at each wake. All of it runs on the replica's event loop, after `start`.
    """

    async def park(self, still_bytes: int | None = None) -> None:
        """Frees the weights and the KV cache of the devices. Sequences that run stand still between two of their
        tokens and go on after `wake`, and new ones wait. pt has kept their keys and values, and vLLM computes them
        again. Health stays good.

        Raises EngineError if the engine is not awake, or if the host has no room for the copies. In the second case pt
        is as before, and vLLM is dead, as its health says. Raises StillTooLarge if the copy of keys and values would
        take more than `still_bytes`.
        """
        ...

    async def wake(self) -> None:
        """Brings weights and KV cache back. Raises EngineError if the engine is not parked, or if the devices have no
        room any more. In the second case the engine is dead, as its health says."""
        ...

    def copy_bytes(self) -> int:
        """Returns the bytes that the copies take on the host now: of memory for GPUs, and of a temporary file for the
        CPU, which the kernel may keep in memory. It is 0 after a `wake` that has freed them."""
        ...

    async def forget_copy(self) -> None:
        """Frees the copy of the weights. The next `park` makes it again. Raises EngineError while it is parked."""
        ...


class Engine(Protocol):
    """This is one loaded model behind an ASGI application with OpenAI's endpoints.

    First `start` is called once (it returns the application when requests can be answered), then `check_health` every
    few seconds, and then `stop` once. All three run on the replica's event loop.
    """

    async def start(self) -> ASGIApp:
        """Loads the model and returns the application. Raises EngineError or ConfigError if it cannot."""
        ...

    async def check_health(self) -> None:
        """Raises EngineError if the engine cannot serve any more, so that the replica must be replaced."""
        ...

    def load(self) -> float:
        """Returns what runs and waits as a share of what the engine can hold. 1 is a full batch or a full KV cache."""
        ...

    def cache_blocks(self) -> int | None:
        """Returns how many blocks of KV cache the engine has made, or None if it has no blocks."""
        ...

    def draft_counts(self) -> DraftCounts | None:
        """Returns what the engine has counted of its speculation, or None if it has none or exports them itself."""
        ...

    def prompt_cache_counts(self) -> PromptCacheCounts | None:
        """Returns what the engine has counted of the texts that it keeps for later prompts, or None if it keeps none or
        exports that itself."""
        ...

    def parking(self) -> Parking | None:
        """Returns how it parks, or None if it cannot, and is stopped and started again instead."""
        ...

    async def memory(self) -> Sequence[RankMemory]:
        """Returns what each rank is measured to hold of each device now. Raises EngineError if it cannot be read."""
        ...

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Makes a LoRA adapter available, for which requests ask by its name in the body's field `model`. The folder is
        PEFT's, has been checked (`planning/adapters.py`), and has its weights in adapter_model.safetensors.

        If there is one of this name, new requests get the new one, and the requests that run end with the old one. The
        call returns as soon as new requests get the new one. The old one's folder is not needed after that. Calls come
        one at a time for each name, but a load may come while a removal waits for requests. They may come in any state
        between `start` and `stop`, also while the engine is parked. Raises AdapterError with the reason if it cannot be
        served; then the old one stays.
        """
        ...

    def watch_adapters(self, lost: LostAdapter) -> None:
        """Has `lost` called on the event loop with each adapter that `load_adapter` took while the engine was away, and
        that could not be loaded since. Only the last `lost` counts."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Removes an adapter. Nobody asks for it any more. Returns when its running requests have ended and its memory
        is free. Does nothing if there is none of this name. Raises AdapterError if that failed."""
        ...

    async def stop(self) -> None:
        """Ends the engine's threads and processes and frees its memory."""
        ...


def create_engine(config: ModelConfig, name: str, planned: ModelPlan | None = None) -> Engine:
    """Returns the engine that the config names, before its start. `name` is the model's name for clients.

    `planned` is the plan of this replica, whose devices have the numbers of this process. On GPUs pt places layers and
    bounds its KV cache by it, unless the checkpoint is quantised or `device_map` says how. vLLM's part of it is in the
    config (`with_planned_memory`). If the config `has_adapters`, its `max_loras` and `max_lora_rank` are set. What the
    model is for is read of its files. Raises ConfigError for files of an embedding model or a cross-encoder that pt
    cannot serve.
    """
    if config.infer_backend == "vllm":
        from serve_app.engines.vllm.engine import VllmEngine

        return VllmEngine(config, name)
    pooling = read_own_pooling(config.model, config.revision)
    if pooling is not None:
        from serve_app.engines.pt.pooling.engine import PoolingEngine

        return PoolingEngine(config, name, pooling, planned)
    from serve_app.engines.pt.engine import PtEngine

    return PtEngine(config, name, planned)
