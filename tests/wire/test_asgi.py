"""One request through an ASGI application as bytes."""

import asyncio
import json
from contextlib import aclosing

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.wire.asgi import HttpRequest, call_asgi, decode_head


def post(path: str = "/", body: bytes = b"{}") -> HttpRequest:
    """A POST with one header."""
    return HttpRequest("POST", path, b"a=1", [(b"content-type", b"application/json")], body)


async def collect(app: ASGIApp, request: HttpRequest) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and whole body."""
    items = [item async for item in call_asgi(app, request)]
    status, headers = decode_head(items[0])
    return status, dict(headers), b"".join(items[1:])


async def test_a_request_reaches_the_application_whole() -> None:
    """Method, path, query, headers and body arrive, and the response comes back with its status and headers."""

    async def echo(request: Request) -> Response:
        seen = [request.method, request.url.path, request.url.query, request.headers["content-type"]]
        return JSONResponse([*seen, (await request.body()).decode()], status_code=201, headers={"x-a": "é"})

    app = Starlette(routes=[Route("/{path:path}", echo, methods=["POST"])])
    status, headers, body = await collect(app, post("/v1/ü", b"hello"))
    assert status == 201
    assert headers[b"x-a"] == "é".encode("latin-1")
    assert json.loads(body) == ["POST", "/v1/ü", "a=1", "application/json", "hello"]


async def test_waiting_pieces_are_joined_and_a_slow_one_is_not_waited_for() -> None:
    """Two pieces at once come as one item; a piece that comes later comes alone."""
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b", "more_body": True})
        await gate.wait()
        await send({"type": "http.response.body", "body": b"c"})

    items = call_asgi(app, post())
    await anext(items)
    assert await anext(items) == b"ab"
    gate.set()
    assert [item async for item in items] == [b"c"]


async def test_a_reader_that_leaves_cancels_the_application() -> None:
    """The application is told and ended, before the reader's own close returns."""
    ended = asyncio.Event()

    async def forever(_: Request) -> Response:
        async def pieces() -> object:
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(0)
            finally:
                ended.set()

        return StreamingResponse(pieces())  # type: ignore[arg-type]

    app = Starlette(routes=[Route("/", forever, methods=["POST"])])
    async with aclosing(call_asgi(app, post())) as items:  # type: ignore[type-var]
        await anext(items)
        await anext(items)
    assert ended.is_set()


async def test_an_application_that_never_stops_sending_is_held_back_by_a_slow_reader() -> None:
    """At most `SEND_AHEAD` messages wait in memory."""
    sent = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            sent += 1

    async with aclosing(call_asgi(app, post())) as items:  # type: ignore[type-var]
        await anext(items)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert sent <= 65


async def test_an_error_before_the_head_is_a_500_with_openais_object() -> None:
    """The reader gets an answer first, then the error for the log."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("broken")

    items = call_asgi(app, post())
    status, headers = decode_head(await anext(items))
    assert (status, dict(headers)[b"content-type"]) == (500, b"application/json")
    assert json.loads(await anext(items))["error"]["message"] == "ValueError: broken"


async def test_an_error_after_the_head_breaks_the_stream() -> None:
    """A short body must not look complete."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        raise ValueError("broken")

    items = call_asgi(app, post())
    await anext(items)
    assert await anext(items) == b"a"
    with pytest.raises(ValueError, match="broken"):
        await anext(items)
