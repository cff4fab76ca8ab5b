"""The way from the router to a model's replicas: one request there, one answer as pieces of bytes back."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from serve_app.errors import Overloaded
from serve_app.router.directory import Directory, ModelDirectory
from serve_app.router.engine_loss import is_lost_event
from serve_app.router.suspicion import Death
from serve_app.wire.asgi import HttpRequest, decode_head
from serve_app.wire.headers import Headers

# Seconds that a client is told to wait when Serve's own queue is full.
FULL_RETRY_S = 1.0
# Seconds for which a request waits for Serve to replace replicas whose engines are gone. Three health checks, 2 s apart
# and each late on a busy machine, are what Serve needs to see it; the model then counts as loading.
REPLACED_WITHIN_S = 60.0


class ReplicaLost(Exception):
    """The replica died, or its connection broke, before the answer was complete. The message says how.

    `death` tells which requests were lost together; None where that is not known.
    """

    def __init__(self, message: object, death: Death | None = None):
        super().__init__(message)
        self.death = death


class NotOpen(ReplicaLost):
    """The model has stopped being ready since it was looked at, and nothing was sent. It will be ready again."""


class EngineGone(NotOpen):
    """Replicas have said that their engines are lost, are not replaced yet, and no other one takes a connection."""


class Patience:
    """Bounds how long a request waits, on the whole, for engines that are gone to be replaced."""

    def __init__(self) -> None:
        self._until: float | None = None

    def has_ended(self) -> bool:
        """Asked each time that it has to wait. The first time begins it."""
        now = asyncio.get_running_loop().time()
        self._until = self._until or now + REPLACED_WITHIN_S
        return now > self._until


async def require_open(directory: Directory, name: str) -> None:
    """Raises NotOpen for a model that loads, ModelUnavailable for one that has failed, ModelNotFound."""
    model = await directory.find(name)
    if not model.is_open:
        directory.require_hope(model)
        raise NotOpen(f"'{name}' is {model.state}")


class Answer(Protocol):
    """This is a response on its way. `pieces` raises ReplicaLost where it breaks; `close` ends the work for it."""

    status: int
    headers: Headers

    def pieces(self) -> AsyncIterator[bytes]:
        """Yields the body, as it comes."""
        ...

    def lost(self, message: str) -> ReplicaLost:
        """The error to raise where the answer itself says that its engine is lost. Others are sent elsewhere then."""
        ...

    async def close(self) -> None:
        """Ends the work for the answer: its reader is done, or has left."""
        ...


class Upstream(Protocol):
    """Sends requests to models by name."""

    async def start(self) -> None:
        """Gets ready. This is called once, in the event loop that sends."""
        ...

    async def send(self, name: str, request: HttpRequest) -> Answer:
        """Sends the request and waits for the head of its answer.

        Raises ReplicaLost (NotOpen, EngineGone), UnreadableAnswer, Overloaded, ModelNotFound or ModelUnavailable.
        """
        ...

    async def close(self) -> None:
        """Closes what is open when the router ends."""
        ...


class HandleUpstream:
    """Over Ray's handles: Ray chooses the replica, and waits for one where there is none."""

    def __init__(self, directory: ModelDirectory, look_again_s: float):
        self._directory = directory
        self._look_again_s = look_again_s

    async def start(self) -> None:
        """Does nothing: handles are made when they are needed."""

    async def send(self, name: str, request: HttpRequest) -> "HandleAnswer":
        """Does what `Upstream` says. A handle waits for a replica for ever, so the model is looked at meanwhile."""
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
        """Does nothing: handles hold nothing open."""

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
    """This is an answer that comes over a handle."""

    def __init__(self, status: int, headers: Headers, items: Any):
        self.status = status
        self.headers = headers
        self._items = items

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yields the body, as it comes."""
        try:
            async for piece in self._items:
                yield piece
        except (RayError, RayServeException) as error:
            raise ReplicaLost(_last_line(error)) from error

    def lost(self, message: str) -> ReplicaLost:
        """Returns the error to raise. Ray has chosen the replica, so nobody knows who else was there."""
        return ReplicaLost(message)

    async def close(self) -> None:
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
        """Yields the body, the first piece too."""
        if self._first is not None:
            yield self._first
            async for piece in self._rest:
                yield piece

    def lost(self, message: str) -> ReplicaLost:
        """Does what the answer itself does."""
        return self._answer.lost(message)

    async def close(self) -> None:
        """Does what the answer itself does."""
        await self._answer.close()


async def first_piece(answer: Answer) -> Answer:
    """Waits for the first piece: engines send the head of a stream before they have begun.

    Raises ReplicaLost, also where that piece says that the engine is lost.
    """
    pieces = answer.pieces()
    try:
        first = await anext(pieces, None)
        if first is not None and is_stream(answer) and is_lost_event(first):
            raise answer.lost("its engine died")
        return BegunAnswer(answer, first, pieces)
    except BaseException:
        await answer.close()
        raise


def is_stream(answer: Answer) -> bool:
    """Whether it is one of server-sent events."""
    return dict(answer.headers).get(b"content-type", b"").startswith(b"text/event-stream")


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
