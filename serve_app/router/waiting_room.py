"""Lets requests wait for a model that is loading or asleep, up to a limit and a deadline."""

import asyncio
import logging
from contextlib import suppress
from functools import partial

from serve_app.config import RouterConfig
from serve_app.errors import ModelUnavailable
from serve_app.router.comments import commented
from serve_app.router.directory import ControllerSilent, Directory
from serve_app.router.downstream import Downstream
from serve_app.router.model_status import ModelStatus
from serve_app.router.queues import Queues
from serve_app.router.upstream.protocol import ReplicaLost, Upstream
from serve_app.wire.asgi import HttpRequest

logger = logging.getLogger("ray.serve")

# A model that is loading is checked at this interval in seconds.
LOOK_AGAIN_S = 0.25
# This request is sent to a sleeping model. It waits where Serve counts waiting requests, so a replica is started.
WAKE_CALL = HttpRequest("GET", "/health", b"", [(b"accept", b"*/*")], b"")


class WaitingRoom:
    """Holds the requests of one router replica that wait for any model."""

    def __init__(self, directory: Directory, upstream: Upstream, queues: Queues):
        self._directory = directory
        self._queues = queues
        self._upstream = upstream
        self._calls: dict[str, asyncio.Task[bool]] = {}

    async def pass_through(
        self, model: ModelStatus, downstream: Downstream, config: RouterConfig, patient: bool = True
    ) -> None:
        """Returns when the model is ready. An impatient request waits for a model that sleeps, not for one that loads.

        Raises ModelNotFound, ModelUnavailable with the measured load time, or Overloaded when too many wait.
        """
        name = model.name
        if model.state == "ready":
            return
        self._directory.require_hope(model)
        if model.state == "asleep" and not config.max_held_requests:
            self.wake(name, config.hold_timeout_s)
        if not config.max_held_requests or not (patient or model.is_open):
            raise self._directory.unavailable(model)
        with self._queues[name].hold(config, self._directory.load_time_s(name)):
            try:
                async with asyncio.timeout(config.hold_timeout_s), commented(downstream, partial(self._loading, name)):
                    await self._until_ready(name)
            except TimeoutError:
                raise self._directory.unavailable(await self._directory.find(name)) from None

    async def _until_ready(self, name: str) -> None:
        call: asyncio.Task[bool] | None = None
        try:
            while True:
                with suppress(ControllerSilent):  # The controller may be restarting, and the request waits on.
                    model = await self._directory.find(name)
                    if model.state == "ready":
                        return
                    self._directory.require_hope(model)
                    if model.state == "asleep" and call is None:
                        call = asyncio.create_task(self._wakes(name))
                # The call may wait for ever, because Serve does not tell it that the model has failed.
                if call is not None and (await asyncio.wait({call}, timeout=LOOK_AGAIN_S))[0]:
                    if call.result():
                        return
                    call = None
                if call is None:
                    await asyncio.sleep(LOOK_AGAIN_S)
        finally:
            if call is not None:
                call.cancel()

    async def _wakes(self, name: str) -> bool:
        """Returns whether the model answered a call. Each waiting request makes one, because Serve scales by calls."""
        self._directory.waking(name)
        with suppress(ReplicaLost, ModelUnavailable):  # This includes NotOpen, since the model loads by now.
            answer = await self._upstream.send(name, WAKE_CALL)
            await answer.close()
            if answer.status == 200:
                self._directory.woke(name)
                return True
        return False

    def wake(self, name: str, timeout_s: float) -> None:
        """Starts a replica of a model that sleeps, for whoever does not wait for it. It returns at once, and tries for
        so many seconds."""
        if name not in self._calls:
            self._calls[name] = asyncio.create_task(asyncio.wait_for(self._wakes(name), timeout_s))
            self._calls[name].add_done_callback(self._called)

    def _called(self, call: "asyncio.Task[bool]") -> None:
        self._calls = {name: other for name, other in self._calls.items() if other is not call}
        if not call.cancelled() and (error := call.exception()) is not None:
            logger.warning("A model could not be woken: %s: %s", type(error).__name__, error)

    def _loading(self, name: str) -> str:
        return f"loading '{name}', about {self._directory.load_time_s(name):.0f} s left"
