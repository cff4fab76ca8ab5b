"""Has an HTTP request as plain values, and calls an ASGI application with it.

This is how a request travels through a Ray handle: the router sends a `HttpRequest`, the replica yields bytes.
The first item is the head (`encode_head`), every other item is a piece of the body.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope

from serve_app.errors import ClientGone, RequestError
from serve_app.wire.arrival import with_body
from serve_app.wire.body import RequestBody
from serve_app.wire.headers import Headers
from serve_app.wire.openai_errors import error_object

logger = logging.getLogger("ray.serve")

Messages = asyncio.Queue[Message | None]

# This header has the name of the request's key for engines, which share their capacity between keys. The gates set it
# and drop a client's own. If no key is needed, there is none.
KEY_NAME_HEADER = b"x-serve-app-key-name"

# An application may be this many messages ahead of its reader before `send` waits.
SEND_AHEAD = 64


@dataclass(frozen=True)
class HttpRequest:
    """This is a request with its whole body. Header names are lower-case. `path` is decoded, and `query` is not."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes


def encode_head(status: int, headers: Headers) -> bytes:
    """Returns the first item of a response, which has the status and headers as JSON, in latin-1 as in HTTP."""
    pairs = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in headers]
    return json.dumps([status, pairs]).encode()


def decode_head(item: bytes) -> tuple[int, Headers]:
    """Returns the status and headers from the first item of a response."""
    status, pairs = json.loads(item)
    return status, [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]


async def call_asgi(app: ASGIApp, request: HttpRequest) -> AsyncIterator[bytes]:
    """Runs the application on one request, and yields the head and the body.

    Pieces that are already waiting are joined into one item, and nothing waits for a timer. If the reader leaves, the
    application sees `http.disconnect` and is cancelled. If an application raises before its head, this is a 500. One
    that raises later raises here, so that the reader sees a broken response and not a short one.
    """
    messages: Messages = asyncio.Queue(SEND_AHEAD)
    gone = asyncio.Event()
    task = asyncio.create_task(_run(app, request, messages, gone))
    try:
        head = await messages.get()
        if head is None:
            await task
            raise RuntimeError("the application ended without a response")
        yield encode_head(head["status"], head.get("headers", []))
        while (message := await messages.get()) is not None:
            pieces = [message.get("body", b"")]
            ended = False
            while not messages.empty() and not ended:
                following = messages.get_nowait()
                ended = following is None
                pieces.append(b"" if following is None else following.get("body", b""))
            if piece := b"".join(pieces):
                yield piece
            if ended:
                break
        await task
    finally:
        gone.set()
        await _end(task)


async def _run(app: ASGIApp, request: HttpRequest, messages: Messages, gone: asyncio.Event) -> None:
    """Runs the application, and puts what it sends into `messages`, with None at the end."""
    started = False

    async def disconnected() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal started
        started = started or message["type"] == "http.response.start"
        await messages.put(message)

    try:
        await app(*with_body(_scope(request), disconnected, RequestBody(request.body)), send)
    except Exception as error:
        if started:
            raise
        body = json.dumps(error_object(RequestError(f"{type(error).__name__}: {error}"))).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await messages.put({"type": "http.response.start", "status": 500, "headers": headers})
        await messages.put({"type": "http.response.body", "body": body})
        logger.exception("The application failed before its answer.")
    finally:
        if not gone.is_set():  # If nothing reads, a full queue would block this for ever.
            await messages.put(None)


def endpoint(scope: Scope) -> str:
    """Returns the path below the prefix of the route, or of Serve itself (`root_path` of its `http_options`)."""
    return str(scope["path"]).removeprefix(str(scope.get("root_path", "")))


def show_routes(wrapper: ASGIApp, app: ASGIApp) -> None:
    """Gives the wrapper the application's routes, if it has any, by which Serve names requests in its metrics."""
    for name in ("routes", "router"):
        if hasattr(app, name):
            setattr(wrapper, name, getattr(app, name))


async def unless_gone(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Does the work, which is cancelled if the client leaves first. Raises ClientGone, and what the work raises.

    The request's body must have been read, since anything else from `receive` is dropped.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("The client left.")
        await task
    finally:
        gone.cancel()
        await _end(task)


async def _end(task: asyncio.Future[None]) -> None:
    """Cancels a task and waits until it has ended. What it raised has been reported already."""
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _scope(request: HttpRequest) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": request.headers,
        "client": None,
        "server": None,
        "state": {},
    }
