"""The way to replicas over plain HTTP: which of them is asked, and what is done where one does not answer."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port
from ray.serve._private.common import RequestProtocol
from ray.serve.schema import Target, TargetGroup

from serve_app.access.door import Inside, OuterDoor
from serve_app.access.gate import Gate, KeyedApp
from serve_app.access.keys import KeySource
from serve_app.access.limiter import ActorLimiter
from serve_app.config import RouterConfig
from serve_app.errors import Overloaded, UnreadableAnswer
from serve_app.router.model_status import ModelStatus
from serve_app.router.suspicion import TOGETHER_S
from serve_app.router.upstream import http as http_upstream
from serve_app.router.upstream.addresses import REFUSED_S, ReplicaAddress, ReplicaAddresses
from serve_app.router.upstream.http import SOCKET_OPTIONS, HttpUpstream
from serve_app.router.upstream.protocol import EngineGone, ReplicaLost
from serve_app.wire.asgi import HttpRequest

CHAT = HttpRequest("POST", "/v1/chat/completions", b"", [(b"content-type", b"application/json")], b"{}")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the router shows to replicas, which is in Ray's store otherwise."""
    monkeypatch.setattr(http_upstream, "router_token", lambda: b"token")


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
async def upstream_of(
    *ports: int, keys: dict[str, str] | None = None
) -> AsyncIterator[tuple[Any, ReplicaAddresses, Handles]]:
    """An upstream to these ports, without a controller that would tell of them."""
    addresses, handles = ReplicaAddresses(), Handles()
    addresses.watch = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
    addresses.update([group(*ports)])
    gate = Gate(KeySource(None, keys or {}), ActorLimiter())
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


def says(text: str, status: int = 200) -> Handler:
    """The path that was asked for, and the text, as an engine does."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response({"path": request.path, "said": text}, status=status)

    return handler


def plain(text: str, status: int) -> Handler:
    """As Serve says it."""

    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=text)

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
        one_by_one = [await body_of(await up.send("qwen", CHAT)) for _ in range(30)]
    assert 3 < sum(b"one" in body for body in one_by_one) < 27  # Equals in any order: other routers send there too.


async def test_a_replica_that_takes_no_connection_is_passed_over_for_a_while() -> None:
    """Nothing was sent to it, so the request goes to another and is no retry; later one request tries it again."""
    dead = unused_port()
    async with replica(says("alive")) as alive, upstream_of(dead, alive.port) as (up, at, handles):
        refusing = next(address for address in at._of_models["qwen"] if str(dead) in address.url)
        while not refusing.refusals:
            assert b"alive" in await body_of(await up.send("qwen", CHAT))
        assert refusing not in at.by_preference("qwen")
        refusing.refused()
        assert refusing.refusals == 1  # Of two requests that tried it together.
        refusing.out_until, refusing.refused_at = 0.0, refusing.refused_at - 2 * REFUSED_S
        assert refusing in at.by_preference("qwen")
        refusing.begin()
        assert refusing not in at.by_preference("qwen")
        refusing.refused()
        assert REFUSED_S < refusing.out_until - time.monotonic() <= 2 * REFUSED_S
        refusing.answered()
        assert refusing in at.by_preference("qwen")
    assert handles.sent == []


async def test_a_node_that_is_silent_costs_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one for each of its replicas, nor for each of its models."""
    tried: list[str] = []

    async def silent(_: HttpUpstream, address: ReplicaAddress, __: HttpRequest) -> None:
        tried.append(address.url)
        raise aiohttp.ConnectionTimeoutError

    monkeypatch.setattr(HttpUpstream, "_send_to", silent)
    async with upstream_of(1, 2, 3) as (up, at, handles):
        at.update([group(1, 2, 3), group(4, name="other")])
        await up.send("qwen", CHAT)
        await up.send("other", CHAT)
    assert (len(tried), handles.sent) == (1, ["qwen", "other"])


async def test_where_no_replica_takes_a_connection_a_handle_is_the_way(caplog: pytest.LogCaptureFixture) -> None:
    """Serve starts a replica for what waits there, and Ray's own connections may reach one that HTTP does not."""
    async with upstream_of(unused_port()) as (up, _, handles):
        assert await up.send("asleep", CHAT) == "over a handle"
        assert not caplog.records
        assert await up.send("qwen", CHAT) == "over a handle"
    assert handles.sent == ["asleep", "qwen"]
    assert "takes a connection" in caplog.text


async def test_a_replica_that_breaks_off_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    """Before its head, and in its body. What aiohttp says of it is in the log, and clients read a sentence."""

    async def breaks(request: web.Request) -> web.StreamResponse:
        if "late" in request.path:
            reply = web.StreamResponse()
            await reply.prepare(request)
            await reply.write(b"data: 1\n\n")
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    caplog.set_level(logging.INFO)
    async with replica(breaks) as server, upstream_of(server.port) as (up, at, _):
        with pytest.raises(ReplicaLost) as early:
            await up.send("qwen", CHAT)
        answer = await up.send("qwen", HttpRequest("POST", "/late", b"", [], b"{}"))
        with pytest.raises(ReplicaLost) as late:
            await body_of(answer)
        assert str(early.value) == str(late.value) == "the connection to the replica broke"
        assert caplog.text.count(f":{server.port}/models/qwen broke: ") == 2
        assert "ClientPayloadError" in caplog.text
        assert [address.running for address in at.by_preference("qwen")] == [0]


@pytest.mark.parametrize("status", [404, 500, 503])
async def test_what_serve_says_in_a_replicas_place_is_no_answer(status: int) -> None:
    """It is plain text: an ending replica, or another model's on a port that was this one's."""
    async with replica(plain("no such replica", status)) as serve, upstream_of(serve.port) as (up, at, _handles):
        with pytest.raises(ReplicaLost, match="no such replica"):
            await up.send("qwen", CHAT)
        assert at.by_preference("qwen")[0].running == 0
    async with replica(says("no such thing", status)) as engine, upstream_of(engine.port) as (up, _, _handles):
        answer = await up.send("qwen", CHAT)
        assert answer.status == status
        assert b"no such thing" in await body_of(answer)


async def test_a_replica_whose_engine_has_died_comes_last() -> None:
    """It has no requests any more, and would get them all. Serve needs seconds to see that it is no good."""
    dead, alive = replica(says("dead", 503)), replica(says("alive"))
    async with dead as one, alive as two, upstream_of(one.port, two.port) as (up, at, _):
        next(address for address in at._of_models["qwen"] if str(two.port) in address.url).running = 5
        assert (await up.send("qwen", CHAT)).status == 503
        assert [(await up.send("qwen", CHAT)).status for _ in range(5)] == [200] * 5


async def test_a_full_replica_passes_a_request_on_to_one_other() -> None:
    """By route it may have been filled without this router's knowing. Two that are full are an answer."""
    async with replica(says("full", 429)) as full, replica(says("room")) as room, replica(says("full", 429)) as third:
        async with upstream_of(full.port, room.port) as (up, at, _):
            next(address for address in at._of_models["qwen"] if str(room.port) in address.url).running = 5
            answer = await up.send("qwen", CHAT)
            assert answer.status == 200
            await answer.close()
        async with upstream_of(full.port, third.port) as (up, at, _):
            answer = await up.send("qwen", CHAT)
            assert answer.status == 429
            assert b"full" in await body_of(answer)
            assert [address.running for address in at.by_preference("qwen")] == [0, 0]


async def test_a_replica_whose_engine_is_lost_is_asked_for_its_health_first() -> None:
    """It is sent no request meanwhile, nor is a handle, behind which Ray would choose the very same replica."""
    asked: list[str] = []
    status = [503]

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        return web.json_response({}, status=status[0])

    async with replica(handler) as server, upstream_of(server.port) as (up, at, handles):
        answer = await up.send("qwen", CHAT)
        assert answer.status == 503
        lost = answer.lost("it said so")
        await answer.close()
        for _ in range(3):
            with pytest.raises(EngineGone):
                await up.send("qwen", CHAT)
        (address,) = at._of_models["qwen"]
        assert lost.death is address.death is not None
        address.out_until = 0.0
        with pytest.raises(EngineGone):
            await up.send("qwen", CHAT)
        assert asked == ["/models/qwen/v1/chat/completions", *["/models/qwen/health"] * 2]
        address.out_until, status[0] = 0.0, 200
        assert (await up.send("qwen", CHAT)).status == 200
    assert (lost.death.is_explained, handles.sent) == (True, [])


async def test_a_503_of_an_engine_that_lives_is_no_death() -> None:
    """vLLM answers so when its queue is full. Another replica may have the request; this one may have the next."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response({}, status=200 if request.path.endswith("/health") else 503)

    async with replica(handler) as server, upstream_of(server.port) as (up, at, _):
        for _ in range(2):
            answer = await up.send("qwen", CHAT)
            assert (answer.status, answer.lost("it said so").death) == (503, None)
            await answer.close()
        assert at._of_models["qwen"][0].running == 0


async def test_an_engine_that_says_so_has_died_whoever_goes_on_there() -> None:
    """Streams that are taken up again are tokenized in the process that lives on: that vouches for no engine."""
    begun, ends = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        if not request.path.endswith("/tokenize"):
            return web.json_response({}, status=503)
        begun.set()
        await ends.wait()
        return web.json_response({"tokens": []})

    async with replica(handler) as server, upstream_of(server.port) as (up, _, _handles):
        other = asyncio.create_task(up.send("qwen", HttpRequest("POST", "/tokenize", b"", [], b"{}")))
        await begun.wait()
        answer = await up.send("qwen", CHAT)
        death = answer.lost("it said so").death
        assert death is not None
        assert (death.present, death.counts) == (2, True)
        ends.set()
        for one in (answer, await other):
            await one.close()


async def test_silence_tells_of_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy replica may be late with its health, and the others go on there."""
    monkeypatch.setattr(http_upstream, "HEALTH_TIMEOUT_S", 0.1)

    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60 if request.path.endswith("/health") else 0)
        return web.json_response({}, status=503)

    async with replica(handler) as server, upstream_of(server.port) as (up, at, _):
        at._of_models["qwen"][0].running = 3
        answer = await up.send("qwen", CHAT)
        death = answer.lost("it said so").death
        assert death is not None
        assert not death.counts
        await answer.close()


async def test_what_is_lost_together_is_lost_in_one_death() -> None:
    """As far as this router knows; the next one, later, is another."""
    address = ReplicaAddress("127.0.0.1", "http://127.0.0.1:1/models/qwen")
    leases = [address.begin() for _ in range(3)]
    deaths = {id(address.lost()) for _ in leases}
    assert (len(deaths), address.death and address.death.present) == (1, 3)
    assert address.death is not None
    address.death.at -= 2 * TOGETHER_S
    assert id(address.lost()) not in deaths


async def test_an_engine_that_is_gone_dies_once() -> None:
    """Whoever notices it late, after the replica was asked for its health, was lost in the same death."""
    address = ReplicaAddress("127.0.0.1", "http://127.0.0.1:1/models/qwen")
    death = address.gone(is_told=True)
    death.at -= 2 * TOGETHER_S
    assert address.gone(is_told=False) is death
    assert address.lost() is death
    address.well()
    assert address.lost() is not death


@pytest.mark.parametrize("size", [9_000, 60_000])
async def test_long_headers_of_an_answer_pass(size: int) -> None:
    """As they do through HAProxy: a redirect of a long path has a `location` that is longer."""

    async def redirects(request: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"location": f"http://{request.host}/{'x' * size}"})

    async with replica(redirects) as server, upstream_of(server.port) as (up, _, _handles):
        answer = await up.send("qwen", CHAT)
        assert len(dict(answer.headers)[b"location"]) >= size
        await answer.close()


async def raw(said: bytes) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that answers every request with these bytes; and the requests."""
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(said)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], asked


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\nlocation: " + 70_000 * b"x" + b"\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nbad header\r\ncontent-length: 2\r\n\r\n{}",
        b"\x00\x01 no HTTP at all\r\n\r\n",
    ],
)
async def test_an_answer_that_cannot_be_read_is_no_loss(said: bytes) -> None:
    """Another replica would say the same, so it is told once, and nobody is doubted."""
    async with asynccontextmanager(raw)(said) as (port, asked), upstream_of(port) as (up, at, _):
        with pytest.raises(UnreadableAnswer, match="not readable HTTP"):
            await up.send("qwen", CHAT)
        (address,) = at._of_models["qwen"]
        assert (len(asked), address.running, address.death) == (1, 0, None)


async def test_serves_own_queue_is_full() -> None:
    """A limit that the user has set; nothing is lost."""
    text = "Request dropped due to backpressure (num_ongoing_requests=1)"
    async with replica(plain(text, 503)) as serve, upstream_of(serve.port) as (up, at, _):
        with pytest.raises(Overloaded):
            await up.send("qwen", CHAT)
        assert at.by_preference("qwen")[0].doubted_until < 0


async def test_a_redirect_leads_to_the_path_that_the_client_knows() -> None:
    """A replica names its own address, which clients need not reach; a slash too many is enough."""

    async def redirects(request: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"location": f"http://{request.host}{request.path.rstrip('/')}"})

    async with replica(redirects) as server, upstream_of(server.port) as (up, _, _handles):
        answer = await up.send("qwen", HttpRequest("POST", "/v1/chat/completions/", b"", [], b"{}"))
        assert dict(answer.headers)[b"location"] == b"/v1/chat/completions"
        await answer.close()


async def test_a_cancelled_request_runs_no_more() -> None:
    """While its head is waited for, and while an error's text is."""

    async def slow(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(status=503, headers={"content-type": "text/plain"})
        if "head" in request.path:
            await reply.prepare(request)
        await asyncio.sleep(60)
        return reply

    async with replica(slow) as server, upstream_of(server.port) as (up, at, _):
        for path in ("/v1/x", "/head"):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await up.send("qwen", HttpRequest("POST", path, b"", [], b"{}"))
        assert at.by_preference("qwen")[0].running == 0


async def test_a_connection_notices_that_a_node_has_vanished() -> None:
    """A machine without power closes nothing, and a stream would stand until its idle time is over."""

    async def streams(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse()
        await reply.prepare(request)
        await asyncio.sleep(60)
        return reply

    async with replica(streams) as server, upstream_of(server.port) as (up, _, _handles):
        answer = await up.send("qwen", CHAT)
        made = answer._reply.connection.transport.get_extra_info("socket")
        assert [made.getsockopt(level, option) for level, option, _ in SOCKET_OPTIONS] == [
            value for *_, value in SOCKET_OPTIONS
        ]
        await answer.close()


async def test_headers_arrive_as_they_were_and_keys_stay_here() -> None:
    """The router's token opens the replica, so the client's key is not needed there. Without keys it is not ours."""

    async def tell(request: web.Request) -> web.StreamResponse:
        return web.json_response({name.lower(): value for name, value in request.headers.items()})

    given = [(b"x-request-id", "café".encode()), (b"authorization", b"Bearer sk-x"), (b"x-api-key", b"sk-x")]
    request = HttpRequest("POST", "/v1/x", b"", given, b"{}")
    async with replica(tell) as server:
        async with upstream_of(server.port) as (up, _, _handles):
            seen = json.loads(await body_of(await up.send("qwen", request)))
            assert (seen["x-request-id"], seen["authorization"]) == ("café", "Bearer sk-x")
        async with upstream_of(server.port, keys={"SERVE_APP_API_KEYS": "sk-x-of-the-upstream"}) as (up, _, _handles):
            seen = json.loads(await body_of(await up.send("qwen", request)))
            assert seen.keys() & {"authorization", "x-api-key", "x-serve-app-router"} == {"x-serve-app-router"}


@pytest.mark.parametrize("host", ["10.0.0.5:8000", "127.0.0.1:8000"])
async def test_a_page_that_the_router_has_let_in_is_let_in_by_the_replica(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """A page of the router's own address asks a replica whose address is another one. Without the router, the replica
    refuses that page."""
    monkeypatch.setattr("serve_app.access.gate.router_token", lambda: b"token")
    gate, seen = Gate(KeySource(None, {}), ActorLimiter()), list[Mapping[bytes, bytes]]()

    async def engine(scope: Any, _receive: Any, send: Any) -> None:
        seen.append(dict(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    door = OuterDoor(KeyedApp(engine, gate, "qwen"), Inside(gate, RouterConfig, "qwen"))

    async def behind_the_door(request: web.Request) -> web.StreamResponse:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url=f"http://{request.host}") as http:
            reply = await http.post(request.path, content=await request.read(), headers=list(request.headers.items()))
        return web.Response(status=reply.status_code, body=reply.content)

    page = HttpRequest("POST", "/v1/chat/completions", b"", [(b"origin", f"http://{host}".encode())], b"{}")
    async with replica(behind_the_door) as server, upstream_of(server.port) as (up, _, _handles):
        answer = await up.send("qwen", page)
        assert (answer.status, await body_of(answer)) == (200, b"{}")
        assert seen[0][b"origin"] == f"http://{host}".encode()
        if host.startswith("10."):
            async with httpx.AsyncClient() as browser:
                direct = await browser.post(str(server.make_url("/v1/x")), headers={"origin": f"http://{host}"})
            assert direct.status_code == 403


def test_the_controllers_word_replaces_what_was_known() -> None:
    """What runs at an address that stays is still counted; other protocols and models that are gone are not there."""
    addresses = ReplicaAddresses()
    addresses.update([group(1, 2), group(3, name="other"), group(4, protocol=RequestProtocol.GRPC, name="grpc")])
    next(address for address in addresses.by_preference("qwen") if ":1/" in address.url).running = 5
    addresses.update([group(1, 5)])
    assert [(a.url, a.running) for a in addresses.by_preference("qwen")] == [
        ("http://127.0.0.1:5/models/qwen", 0),
        ("http://127.0.0.1:1/models/qwen", 5),
    ]
    assert addresses.by_preference("other") == addresses.by_preference("grpc") == []


def test_a_word_that_cannot_be_read_changes_nothing() -> None:
    """An exception in its callback would end Serve's long poll for ever."""
    addresses = ReplicaAddresses()
    addresses.update([group(1)])
    addresses._told([group(2), None])  # type: ignore[list-item]
    assert [address.url for address in addresses.by_preference("qwen")] == ["http://127.0.0.1:1/models/qwen"]
