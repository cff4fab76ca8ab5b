"""Defines the way from the router to a model's replicas: a request goes there, and an answer comes back in pieces."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from serve_app.errors import ModelNotFound, Overloaded
from serve_app.router.directory import Directory, ModelDirectory
from serve_app.router.engine_loss import is_away, is_lost_event, is_lost_status, is_unknown_model
from serve_app.router.model_status import ModelStatus
from serve_app.router.suspicion import Death
from serve_app.wire.asgi import HttpRequest, decode_head
from serve_app.wire.headers import Headers

# A client is told to wait this many seconds if Serve's own queue is full.
FULL_RETRY_S = 1.0
# A request waits this many seconds for Serve to replace replicas whose engines are gone. To see it, Serve needs three
# health checks, which are 2 s apart and late on a busy machine. The model then counts as loading.
REPLACED_WITHIN_S = 60.0


class ReplicaLost(Exception):
    """The replica died, or its connection broke, before the answer was complete. The message says how.

    `death` says which requests were lost together. It is None if that is not known.
    """

    def __init__(self, message: object, death: Death | None = None):
        super().__init__(message)
        self.death = death


class NotOpen(ReplicaLost):
    """The model has stopped being ready since it was checked, and nothing was sent. It will be ready again."""


class EngineGone(NotOpen):
    """Replicas have said that their engines are lost and are not replaced yet, and no other one takes a connection."""


class Patience:
    """Bounds how long a request waits in total for lost engines to be replaced."""

    def __init__(self) -> None:
        self._until: float | None = None

    def has_ended(self) -> bool:
        """Returns whether the request has waited long enough. The first call starts the time."""
        now = asyncio.get_running_loop().time()
        self._until = self._until or now + REPLACED_WITHIN_S
        return now > self._until


async def require_open(directory: Directory, name: str) -> ModelStatus:
    """Returns a model that takes requests. Raises NotOpen for a model that loads, ModelUnavailable if it has failed,
    and ModelNotFound if it is unknown."""
    model = await directory.find(name)
    if not model.is_open:
        directory.require_hope(model)
        raise NotOpen(f"'{name}' is {model.state}")
    return model


class Answer(Protocol):
    """This is a response on its way. `pieces` raises ReplicaLost if it breaks, and `close` ends the work for it."""

    status: int
    headers: Headers

    def pieces(self) -> AsyncIterator[bytes]:
        """Yields the body as it comes."""
        ...

    def lost(self, message: str) -> ReplicaLost:
        """Returns the error to raise if the answer says that its engine is lost. Other requests then go elsewhere."""
        ...

    async def close(self) -> None:
        """Ends the work for the answer, because its reader is done or has left."""
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
    """Sends over Ray's handles. Ray chooses the replica, and waits for one if there is none."""

    def __init__(self, directory: ModelDirectory, look_again_s: float):
        self._directory = directory
        self._look_again_s = look_again_s

    async def start(self) -> None:
        """Does nothing, because handles are made when they are needed."""

    async def send(self, name: str, request: HttpRequest) -> "HandleAnswer":
        """Does what `Upstream` says. A handle waits for a replica for ever, so the model is checked meanwhile.

        Ray may choose a replica that does not have an adapter which others have. Its 404 is no answer for the client,
        so it counts as a lost replica, of which another one may be asked.
        """
        model = await require_open(self._directory, name)
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
        answer = HandleAnswer(status, headers, items)
        if status == ModelNotFound.status and model.having:
            return await _unless_lacking(answer, name)
        return answer

    async def close(self) -> None:
        """Does nothing, because handles hold nothing open."""

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
        """Yields the body as it comes."""
        try:
            async for piece in self._items:
                yield piece
        except (RayError, RayServeException) as error:
            raise ReplicaLost(_last_line(error)) from error

    def lost(self, message: str) -> ReplicaLost:
        """Returns the error to raise. Ray chose the replica, so it is not known which other requests were there."""
        return ReplicaLost(message)

    async def close(self) -> None:
        """Cancels the call, which cancels the engine's work."""
        self._items.cancel()


async def _unless_lacking(answer: HandleAnswer, name: str) -> HandleAnswer:
    """Returns a 404 again, whose body has been read. Raises ReplicaLost if it says that the replica does not have the
    adapter."""
    pieces = [piece async for piece in answer.pieces()]
    if is_unknown_model(b"".join(pieces)):
        raise ReplicaLost(f"the replica that Ray chose does not have the adapter '{name}'")
    return ReadAnswer(answer.status, answer.headers, pieces)


class ReadAnswer(HandleAnswer):
    """This is an answer that came over a handle and whose body has been read."""

    def __init__(self, status: int, headers: Headers, read: list[bytes]):
        super().__init__(status, headers, None)
        self._read = read

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yields the body."""
        for piece in self._read:
            yield piece

    async def close(self) -> None:
        """Does nothing, because the answer is whole."""


class BegunAnswer:
    """This is an answer whose first piece has been read already."""

    def __init__(self, answer: Answer, first: bytes | None, rest: AsyncIterator[bytes]):
        self.status = answer.status
        self.headers = answer.headers
        self._answer = answer
        self._first = first
        self._rest = rest

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yields the body with its first piece."""
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
    """Returns the answer after its first piece has come, because engines send the head of a stream before they begin.

    Raises ReplicaLost, also if that piece says that the engine is lost, and NotOpen if it says that it is away.
    """
    pieces = answer.pieces()
    try:
        first = await anext(pieces, None)
        if first is not None and (is_stream(answer) or is_lost_status(answer.status)) and is_away(first):
            raise NotOpen("its engine gave its memory to another model")
        if first is not None and is_stream(answer) and is_lost_event(first):
            raise answer.lost("its engine died")
        return BegunAnswer(answer, first, pieces)
    except BaseException:
        await answer.close()
        raise


def is_stream(answer: Answer) -> bool:
    """Returns whether the answer is a stream of server-sent events."""
    return dict(answer.headers).get(b"content-type", b"").startswith(b"text/event-stream")


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
