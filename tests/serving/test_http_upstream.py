"""The way to replicas over plain HTTP: which of them is asked, and what is done where one does not answer."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port
from ray.serve._private.common import RequestProtocol
from ray.serve.schema import Target, TargetGroup

from serve_app.serving.asgi import HttpRequest
from serve_app.serving.directory import ModelStatus
from serve_app.serving.gate import Gate
from serve_app.serving.http_upstream import HttpUpstream
from serve_app.serving.keys import KeySource
from serve_app.serving.limiter_actor import ActorLimiter
from serve_app.serving.replica_addresses import REFUSED_S, ReplicaAddresses
from serve_app.serving.upstream import ReplicaLost

CHAT = HttpRequest("POST", "/v1/chat/completions", b"", [(b"content-type", b"application/json")], b"{}")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Ready:
    """A directory whose models all serve."""

    async def find(self, name: str) -> ModelStatus:
        """As in the real directory."""
        return ModelStatus(name, "ready", 1)


class Handles:
    """A way over handles that remembers what came to it."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def send(self, name: str, _: HttpRequest) -> str:
        """As in the real upstream."""
        self.sent.append(name)
        return "over a handle"


def group(*ports: int, name: str = "qwen", protocol: RequestProtocol = RequestProtocol.HTTP) -> TargetGroup:
    """What the controller says of one model."""
    targets = [Target(ip="127.0.0.1", port=port, instance_id="", name=f"replica-{port}") for port in ports]
    return TargetGroup(targets=targets, route_prefix=f"/models/{name}", protocol=protocol, app_name=name)


@asynccontextmanager
async def upstream_of(*ports: int) -> AsyncIterator[tuple[Any, ReplicaAddresses, Handles]]:
    """An upstream to these ports, without a controller that would tell of them."""
    addresses, handles = ReplicaAddresses(), Handles()
    addresses.watch = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
    addresses.update([group(*ports)])
    gate = Gate(KeySource(None, {}), ActorLimiter())
    upstream = HttpUpstream(Ready(), handles, gate, addresses)  # type: ignore[arg-type]
    await upstream.start()
    try:
        yield upstream, addresses, handles
    finally:
        await upstream.close()


@asynccontextmanager
async def replica(handler: Handler) -> AsyncIterator[TestServer]:
    """A server that answers everything with the handler."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    async with TestServer(app, host="127.0.0.1") as server:
        yield server


def says(text: str) -> Handler:
    """The path that was asked for, and the text."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response({"path": request.path, "said": text})

    return handler


async def body_of(answer: Any) -> bytes:
    """All of it, to its end."""
    try:
        return b"".join([piece async for piece in answer.pieces()])
    finally:
        await answer.close()


async def test_requests_spread_over_replicas_by_what_runs_there() -> None:
    """Four that are open at once are two at each of two replicas; when they end, nothing is counted any more."""
    async with replica(says("one")) as one, replica(says("two")) as two, upstream_of(one.port, two.port) as (up, at, _):
        answers = [await up.send("qwen", CHAT) for _ in range(4)]
        assert [address.running for address in at.by_preference("qwen")] == [2, 2]
        bodies = [await body_of(answer) for answer in answers]
        assert [address.running for address in at.by_preference("qwen")] == [0, 0]
    assert sum(b"one" in body for body in bodies) == 2
    assert all(b'"/models/qwen/v1/chat/completions"' in body for body in bodies)


async def test_a_replica_that_takes_no_connection_is_passed_over_for_a_while() -> None:
    """Nothing was sent to it, so the request goes to another and is no retry; later it is tried again."""
    dead = unused_port()
    async with replica(says("alive")) as alive, upstream_of(dead, alive.port) as (up, at, handles):
        assert b"alive" in await body_of(await up.send("qwen", CHAT))
        assert [address.url.split(":")[2].split("/")[0] for address in at.by_preference("qwen")] == [str(alive.port)]
        for address in at._of_models["qwen"]:
            address.refused_at -= REFUSED_S
        assert len(at.by_preference("qwen")) == 2
    assert handles.sent == []


async def test_where_no_replica_takes_a_connection_a_handle_is_the_way() -> None:
    """Serve starts a replica for what waits there, and Ray's own connections may reach one that HTTP does not."""
    async with upstream_of(unused_port()) as (up, _, handles):
        assert await up.send("qwen", CHAT) == "over a handle"
        assert await up.send("asleep", CHAT) == "over a handle"
    assert handles.sent == ["qwen", "asleep"]


async def test_a_replica_that_breaks_off_is_lost() -> None:
    """Before its head, and in its body."""

    async def breaks(request: web.Request) -> web.StreamResponse:
        if "late" in request.path:
            reply = web.StreamResponse()
            await reply.prepare(request)
            await reply.write(b"data: 1\n\n")
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with replica(breaks) as server, upstream_of(server.port) as (up, at, _):
        with pytest.raises(ReplicaLost):
            await up.send("qwen", CHAT)
        answer = await up.send("qwen", HttpRequest("POST", "/late", b"", [], b"{}"))
        with pytest.raises(ReplicaLost):
            await body_of(answer)
        assert [address.running for address in at.by_preference("qwen")] == [0]


@pytest.mark.parametrize("status", [404, 500, 503])
async def test_what_serve_says_in_a_replicas_place_is_no_answer(status: int) -> None:
    """It is plain text: a full or ending replica, or another model's on a port that was this one's."""

    async def plain(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text="Request dropped due to backpressure")

    async def refuses(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no such thing"}}, status=status)

    async with replica(plain) as serve, upstream_of(serve.port) as (up, _, _handles):
        with pytest.raises(ReplicaLost, match="backpressure"):
            await up.send("qwen", CHAT)
    async with replica(refuses) as engine, upstream_of(engine.port) as (up, _, _handles):
        answer = await up.send("qwen", CHAT)
        assert answer.status == status
        assert b"no such thing" in await body_of(answer)


def test_the_controllers_word_replaces_what_was_known() -> None:
    """What runs at an address that stays is still counted; other protocols and models that are gone are not there."""
    addresses = ReplicaAddresses()
    addresses.update([group(1, 2), group(3, name="other"), group(4, protocol=RequestProtocol.GRPC, name="grpc")])
    addresses.by_preference("qwen")[0].running = 5
    addresses.update([group(1, 5)])
    assert [(a.url, a.running) for a in addresses.by_preference("qwen")] == [
        ("http://127.0.0.1:5/models/qwen", 0),
        ("http://127.0.0.1:1/models/qwen", 5),
    ]
    assert addresses.by_preference("other") == addresses.by_preference("grpc") == []
