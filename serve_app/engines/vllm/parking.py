"""Parks vLLM's engine by its sleep mode, which needs GPUs."""

import logging
from collections.abc import Callable
from typing import Any

from serve_app.config import ModelConfig
from serve_app.engines.vllm import vllm_internals
from serve_app.engines.vllm.adapters import VllmAdapters
from serve_app.errors import EngineError
from serve_app.planning.vllm_arguments import sleep_is_off

logger = logging.getLogger("ray.serve")


class VllmParking:
    """Is the `Parking` of a running engine. `lost` is called if the engine cannot be used any more. `adapters` wait
    while it is parked.

    vLLM keeps no KV cache while it sleeps, so sequences that stood still are computed again from their tokens. It
    frees its copy of the weights when it wakes, and makes another one each time that it sleeps.
    """

    def __init__(self, client: Any, lost: Callable[[], None], adapters: VllmAdapters | None = None):
        self._client, self._lost, self._adapters = client, lost, adapters
        self._is_parked, self._copy_bytes = False, 0

    async def park(self, still_bytes: int | None = None) -> None:
        """Does what `Parking` says. Nothing of the KV cache is copied."""
        if self._is_parked:
            raise EngineError("vLLM is parked already.")
        if self._adapters is not None:
            await self._adapters.hold()
        try:
            before = await self._host_bytes()
            await vllm_internals.sleep(self._client)
            self._is_parked = True
            self._copy_bytes = max(0, await self._host_bytes() - before)
        except Exception as error:
            self._lost()  # Some of its memory may be gone.
            raise EngineError(f"vLLM could not sleep: {type(error).__name__}: {error}") from error

    async def wake(self) -> None:
        """Does what `Parking` says."""
        if not self._is_parked:
            raise EngineError("vLLM is not parked.")
        try:
            if not await vllm_internals.wake(self._client):
                raise EngineError("a part of its memory is still away")
            await vllm_internals.ask_ranks(self._client, "serve_app_free_host_cache")
        except Exception as error:
            self._lost()
            raise EngineError(f"vLLM could not wake: {type(error).__name__}: {error}") from error
        self._is_parked, self._copy_bytes = False, 0
        if self._adapters is not None:
            await self._adapters.resume()

    def copy_bytes(self) -> int:
        """Does what `Parking` says. The bytes are those of the pinned memory of all ranks."""
        return self._copy_bytes

    async def forget_copy(self) -> None:
        """Does what `Parking` says. An engine that is awake has no copy."""
        if self._is_parked:
            raise EngineError("vLLM is parked, and its only weights are in the copy.")

    async def _host_bytes(self) -> int:
        return sum(await vllm_internals.ask_ranks(self._client, "serve_app_host_bytes"))


def can_park(config: ModelConfig) -> bool:
    """Returns whether vLLM is to be started so that it can sleep. If a model that swaps on GPUs cannot, the reason is
    logged. It imports vLLM, which takes seconds."""
    if config.swaps is None or config.device == "cpu":
        return False
    if sleep_is_off(config.engine_args):
        reason = "engine_args has enable_sleep_mode: false"
    elif not vllm_internals.can_sleep():
        reason = "this vLLM has no allocator (cumem) for its sleep mode"
    else:
        return True
    logger.warning("vLLM cannot sleep, and is stopped instead when it must leave its pool's memory: %s.", reason)
    return False
