"""The limits of a model's own route."""

import asyncio
from collections.abc import AsyncIterator

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve_app.config import ModelConfig
from serve_app.replica.whole_body import WholeBody


async def _length(request: Request) -> Response:
    return JSONResponse(len(await request.body()))


def client(**config: float) -> httpx.AsyncClient:
    """Of an application that tells the length of a body."""
    args = {"model": "serve-app/demo", "infer_backend": "pt", "device": "cpu", **config}
    app = WholeBody(Starlette(routes=[Route("/", _length, methods=["GET", "POST"])]), ModelConfig.from_args(args))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://model")


async def pieces(count: int, size: int, pause_s: float = 0.0) -> AsyncIterator[bytes]:
    """A body without a declared length."""
    for _ in range(count):
        await asyncio.sleep(pause_s)
        yield b"x" * size


async def test_a_body_within_the_limits_arrives_whole() -> None:
    """In however many pieces; a request without one too."""
    async with client(max_body_bytes=1000) as session:
        assert (await session.post("/", content=pieces(10, 100))).json() == 1000
        assert (await session.get("/")).json() == 0


async def test_a_body_that_is_too_large_or_too_slow_is_refused_with_the_setting() -> None:
    """Declared or not."""
    async with client(max_body_bytes=1000, body_timeout_s=0.5) as session:
        declared = await session.post("/", content=b"x" * 1001)
        undeclared = await session.post("/", content=pieces(11, 100))
        slow = await session.post("/", content=pieces(100, 1, pause_s=0.05))
    assert [reply.status_code for reply in (declared, undeclared, slow)] == [413, 413, 408]
    assert "The model's max_body_bytes" in undeclared.json()["error"]["message"]
    assert "The model's body_timeout_s" in slow.json()["error"]["message"]
