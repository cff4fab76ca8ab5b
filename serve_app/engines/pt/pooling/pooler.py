"""Computes vectors and scores for the HTTP application: inputs go in and vectors come out on the event loop."""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from serve_app.engines.pt.core.places import Places, Reservation
from serve_app.engines.pt.core.standstill import Movable
from serve_app.engines.pt.core.thread_watch import ThreadWatch
from serve_app.engines.pt.pooling.inputs import Input
from serve_app.engines.pt.pooling.loader import LoadedPooler
from serve_app.engines.pt.pooling.loop import Pooled, PoolingLoop, Vector
from serve_app.errors import EngineError, Overloaded

logger = logging.getLogger("ray.serve")

# All inputs that wait have at most this many tokens together, at 8 bytes each with their types.
MOST_WAITING_TOKENS = 2**22


@dataclass(eq=False)
class _Request:
    """These are the inputs of one request. `vectors` has what came of them so far."""

    done: "asyncio.Future[None]"
    left: set[Input]
    vectors: dict[Input, Vector] = field(default_factory=dict)


class Pooler:
    """This is one loaded model and the thread that runs it. It is made and used on one event loop.

    A step has at most `tokens` tokens and `rows` inputs, and `most_waiting` more inputs may wait. A thread that has
    work but ends no pass for `step_timeout_s` seconds counts as dead, and what waits for it ends with an EngineError.
    """

    def __init__(
        self, name: str, loaded: LoadedPooler, tokens: int, rows: int, most_waiting: int, step_timeout_s: float
    ):
        self.name, self.loaded, self.rows, self.step_tokens = name, loaded, rows, tokens
        self._places = Places(name, rows + most_waiting)
        self._waiting_tokens = 0
        self._requests: dict[Input, _Request] = {}
        self._asyncio_loop = asyncio.get_running_loop()
        self._loop = PoolingLoop(loaded.runner, tokens, rows, self._deliver, alone=bool(loaded.alone))
        self._loop.start()
        self._watch = ThreadWatch(self._loop, step_timeout_s, self._end_all)

    @property
    def in_flight(self) -> int:
        """Returns how many inputs are computed, wait, or are being prepared."""
        return self._places.taken

    @property
    def has_ended(self) -> bool:
        """Returns whether the thread has ended."""
        return self._loop.has_ended

    @property
    def is_parked(self) -> bool:
        """Returns whether the memory is elsewhere or on its way back."""
        return self._loop.is_parked

    def reserve(self, count: int) -> Reservation:
        """Takes places for `count` inputs, of those that may be computed or wait. See `Places.reserve`."""
        return self._places.reserve(count)

    def require_alive(self) -> None:
        """Raises EngineError if the thread has ended or hangs."""
        self._watch.require_alive()

    async def compute(self, inputs: Sequence[Input]) -> list[Vector]:
        """Returns what comes of the inputs, in their order. Raises the first error of one of them, or Overloaded if too
        many tokens wait. An error, or a client that leaves, frees the others."""
        self.require_alive()
        tokens = sum(map(len, inputs))
        if self._waiting_tokens and self._waiting_tokens + tokens > MOST_WAITING_TOKENS:
            raise Overloaded(
                f"The model '{self.name}' has inputs of {self._waiting_tokens} tokens already and takes at most "
                f"{MOST_WAITING_TOKENS}.",
                retry_after_s=1.0,
            )
        request = _Request(self._asyncio_loop.create_future(), set(inputs))
        self._waiting_tokens += tokens
        self._requests |= dict.fromkeys(inputs, request)
        try:
            self._loop.submit(inputs)
            await request.done
        finally:
            self._waiting_tokens -= tokens
            for item in inputs:
                del self._requests[item]
            if request.left:
                self._loop.cancel(request.left)
        return [request.vectors[item] for item in inputs]

    def park(self, memory: Movable) -> "Future[None]":
        """Frees the memory between two steps. Inputs wait until `wake`."""
        return self._loop.park(memory)

    def wake(self) -> "Future[None]":
        """Brings the memory back."""
        return self._loop.wake()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread, and blocks for at most `timeout_s` seconds. The event loop's thread must not call it. It
        lets go of the model then, unless the thread has not ended."""
        self._watch.stop()
        self._loop.stop(timeout_s)
        if not self._loop.is_alive():
            self._loop.release()
            del self.loaded

    def _end_all(self, error: EngineError) -> None:
        self._dispatch([Pooled(item, error=error) for item in self._requests])

    def _deliver(self, found: list[Pooled]) -> None:
        """Passes what a pass made to the event loop. The engine's thread calls it."""
        self._asyncio_loop.call_soon_threadsafe(self._dispatch, found)

    def _dispatch(self, found: list[Pooled]) -> None:
        for pooled in found:
            request = self._requests.get(pooled.item)
            if request is None or request.done.done():  # Its reader has left, or it has an error already.
                continue
            request.left.discard(pooled.item)
            if pooled.error is not None:
                request.done.set_exception(pooled.error)
            elif pooled.vector is not None:
                request.vectors[pooled.item] = pooled.vector
                if not request.left:
                    request.done.set_result(None)
