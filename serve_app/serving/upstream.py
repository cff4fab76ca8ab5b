"""The way from the router to a model's replicas: one request there, one answer as pieces of bytes back."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from serve_app.errors import Overloaded
from serve_app.serving.asgi import Headers, HttpRequest, decode_head
from serve_app.serving.directory import ModelDirectory

# Seconds that a client is told to wait when Serve's own queue is full.
FULL_RETRY_S = 1.0


class ReplicaLost(Exception):
    """The replica died, or its connection broke, before the answer was complete. The message says how."""


class NotOpen(ReplicaLost):
    """The model has stopped being ready since it was looked at, and nothing was sent. It will be ready again."""


async def require_open(directory: ModelDirectory, name: str) -> None:
    """Raises NotOpen for a model that loads, ModelUnavailable for one that has failed, ModelNotFound."""
    model = await directory.find(name)
    if not model.is_open:
        directory.require_hope(model)
        raise NotOpen(f"'{name}' is {model.state}")


class Answer(Protocol):
    """A response on its way. `pieces` raises ReplicaLost where it breaks; `close` ends the work for it."""

    status: int
    headers: Headers

    def pieces(self) -> AsyncIterator[bytes]:
        """The body, as it comes."""
        ...

    async def close(self, is_lost: bool = False) -> None:
        """The reader is done, or has left. `is_lost`: its replica is no good, whatever else it answers."""
        ...


class Upstream(Protocol):
    """Sends requests to models by name."""

    async def start(self) -> None:
        """Called once, in the event loop that sends."""
        ...

    async def send(self, name: str, request: HttpRequest) -> Answer:
        """Waits for the head. Raises ReplicaLost (NotOpen), Overloaded, ModelNotFound or ModelUnavailable."""
        ...

    async def close(self) -> None:
        """The router ends."""
        ...


class HandleUpstream:
    """Over Ray's handles: Ray chooses the replica, and waits for one where there is none."""

    def __init__(self, directory: ModelDirectory, look_again_s: float):
        self._directory = directory
        self._look_again_s = look_again_s

    async def start(self) -> None:
        """Handles are made when they are needed."""

    async def send(self, name: str, request: HttpRequest) -> "HandleAnswer":
        """As in `Upstream`. A handle waits for a replica for ever, so the model is looked at meanwhile."""
        await require_open(self._directory, name)
        handle = await self._directory.handle(name)
        items = handle.remote(request)
        try:
            status, headers = decode_head(await self._first(items, name))
        except BackPressureError:
            raise Overloaded("The model's queue is full. Try again later.", retry_after_s=FULL_RETRY_S) from None
        except (RayError, RayServeException, StopAsyncIteration) as error:
            raise ReplicaLost(_last_line(error)) from error
        except BaseException:  # The client or the model has left before the first byte.
            items.cancel()
            raise
        return HandleAnswer(status, headers, items)

    async def close(self) -> None:
        """Handles hold nothing open."""

    async def _first(self, items: Any, name: str) -> bytes:
        first = asyncio.ensure_future(anext(items))
        try:
            while not (await asyncio.wait({first}, timeout=self._look_again_s))[0]:
                self._directory.require_hope(await self._directory.find(name))
            item: bytes = await first
            return item
        finally:
            first.cancel()


class HandleAnswer:
    """An answer over a handle."""

    def __init__(self, status: int, headers: Headers, items: Any):
        self.status = status
        self.headers = headers
        self._items = items

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, as it comes."""
        try:
            async for piece in self._items:
                yield piece
        except (RayError, RayServeException) as error:
            raise ReplicaLost(_last_line(error)) from error

    async def close(self, is_lost: bool = False) -> None:
        """Cancels the call, which cancels the engine's work."""
        self._items.cancel()


class BegunAnswer:
    """An answer whose first piece was read already."""

    def __init__(self, answer: Answer, first: bytes | None, rest: AsyncIterator[bytes]):
        self.status = answer.status
        self.headers = answer.headers
        self._answer = answer
        self._first = first
        self._rest = rest

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, the first piece too."""
        if self._first is not None:
            yield self._first
            async for piece in self._rest:
                yield piece

    async def close(self, is_lost: bool = False) -> None:
        """As of the answer."""
        await self._answer.close(is_lost)


async def first_piece(answer: Answer) -> Answer:
    """Waits for the first piece: engines send the head of a stream before they have begun. Raises ReplicaLost."""
    pieces = answer.pieces()
    try:
        return BegunAnswer(answer, await anext(pieces, None), pieces)
    except BaseException:
        await answer.close()
        raise


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
