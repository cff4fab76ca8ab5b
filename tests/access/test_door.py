"""What no request passes: the door before Serve, tried with an application that does to a body what Serve does."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware

from serve_app.access import door as outer_door
from serve_app.access.body_budget import FREE_BYTES, BodyBudget
from serve_app.access.door import Inside, OuterDoor, require_door
from serve_app.access.gate import Gate
from serve_app.config import ModelConfig, RouterConfig
from serve_app.deploy.options import OUTER_DOOR
from serve_app.errors import ConfigError, Overloaded
from tests.fakes import AUTH, OUTSIDE, make_gate, open_gate

USES_VIRTUAL_CLOCK = True

MB = 2**20


class Serve:
    """Reads the whole body, as Serve does while a request waits, and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[dict[bytes, bytes]] = []
        self.bodies: list[bytes] = []
        self.arrived = asyncio.Semaphore(0)
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """An ASGI application."""
        self.seen.append(dict(scope["headers"]))
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        self.arrived.release()
        await self.go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def client(serve: Serve, gate: Gate, limits: RouterConfig | ModelConfig | None = None, **of: Any) -> httpx.AsyncClient:
    """Of `serve` behind the door."""
    door = OuterDoor(serve, Inside(gate, lambda: limits or RouterConfig(), **of))
    return httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://here")


async def endless() -> AsyncIterator[bytes]:
    """A body that must not be read."""
    raise AssertionError("the body was read")
    yield b""


async def test_no_byte_of_a_body_is_read_before_the_key(tmp_path: Path) -> None:
    """Nor does Serve see the request. What Serve asks itself, and health, needs no key."""
    serve, refused = Serve(), list[int]()
    async with client(serve, make_gate(tmp_path)[0], model="m", refused=refused.append) as http:
        nobody = await http.post("/v1/completions", content=endless(), headers={"x-request-id": "mine"})
        other = await http.post("/v1/completions", content=endless(), headers=OUTSIDE)
        assert (serve.seen, refused) == ([], [401, 403])
        assert (nobody.status_code, nobody.headers["x-request-id"]) == (401, "mine")
        assert (other.status_code, len(other.headers["x-request-id"])) == (403, 32)
        assert nobody.json()["error"]["code"] == "invalid_api_key"
        for path in ("/-/healthz", "/-/routes", "/models/m/health"):
            assert (await http.get(path)).status_code == 200
        assert (await http.post("/v1/completions", content=b"{}", headers=AUTH)).status_code == 200
    assert serve.bodies[-1] == b"{}"


@pytest.mark.parametrize("path", ["/-/healthz", "/-/routes", "/health", "/models/m/health"])
async def test_what_needs_no_key_brings_no_body(tmp_path: Path, path: str) -> None:
    """A declared one is not read, and another one is refused at its first byte: it would take the room of bodies that
    have a key. With a key it is the same."""
    read: list[int] = []

    async def trickle() -> AsyncIterator[bytes]:
        for size in (0, 1, MB):
            read.append(size)
            yield b"x" * size

    serve, refused = Serve(), list[int]()
    async with client(serve, make_gate(tmp_path)[0], model="m", refused=refused.append) as http:
        declared = await http.request("GET", path, content=endless(), headers={"content-length": "1"})
        trickled = await http.request("GET", path, content=trickle(), headers=AUTH)
        assert (refused, serve.seen, read[:2]) == ([413, 413], [], [0, 1])
        assert MB not in read
        assert declared.json() == trickled.json()
        assert "takes no body" in declared.json()["error"]["message"]
        assert (await http.request("GET", path, headers={"content-length": "0"})).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "model", "status"),
    [
        ("GET", "/ui", None, 200),
        ("GET", "/ui/", None, 200),
        ("HEAD", "/ui/", None, 200),
        ("GET", "/ui/assets/app.js", None, 200),
        ("GET", "/ui/api/state", None, 401),
        ("GET", "/ui/api/stream", None, 401),
        ("POST", "/ui/", None, 401),
        ("GET", "/ui/assetsx", None, 401),
        ("GET", "/uix", None, 401),
        ("GET", "/ui/", "m", 401),
        ("GET", "/models/m/ui/", None, 401),
    ],
)
@pytest.mark.parametrize("wakes", [False, True])
async def test_the_page_of_the_console_needs_no_key(
    tmp_path: Path, method: str, path: str, model: str | None, status: int, wakes: bool
) -> None:
    """Its files have no data in them, and a browser sends no key for them. Its data needs one, and so does a path of
    that name at a model's own address."""
    serve = Serve()
    async with client(serve, make_gate(tmp_path)[0], model=model, wakes=wakes) as http:
        assert (await http.request(method, path)).status_code == status
    assert len(serve.seen) == (status == 200)


async def test_a_page_that_asks_whether_it_needs_a_key_is_no_refusal(tmp_path: Path) -> None:
    """A wrong key is one, and so is any other request without a key, or one to a model's own address."""
    refused = list[int]()
    async with client(Serve(), make_gate(tmp_path)[0], refused=refused.append) as http:
        assert (await http.get("/ui/api/stream")).status_code == 401
        assert refused == []
        for path, headers in (
            ("/ui/api/stream", {"authorization": "Bearer sk-wrong"}),
            ("/ui/api/stream", {"x-api-key": "sk-wrong"}),
            ("/v1/models", {}),
        ):
            assert (await http.get(path, headers=headers)).status_code == 401
    assert refused == [401] * 3
    async with client(Serve(), make_gate(tmp_path)[0], model="m", refused=refused.append) as http:
        assert (await http.get("/ui/api/stream")).status_code == 401
    assert refused == [401] * 4


async def test_an_id_that_is_too_long_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It would stand in the answer and in the log. Serve, behind the door, does not see it either."""
    serve = Serve()
    async with client(serve, make_gate(tmp_path)[0]) as http:
        for size, is_kept in ((128, True), (129, False), (60_000, False)):
            given = {"x-request-id": "i" * size}
            told = (await http.post("/", headers=given)).headers["x-request-id"]
            assert (told == "i" * size, len(told)) == (is_kept, 128 if is_kept else 32)
            assert told in caplog.records[-1].getMessage()
            await http.post("/", headers={**given, **AUTH})
            assert (b"x-request-id" in serve.seen[-1]) == is_kept


async def test_nothing_without_a_key_wakes_a_model(tmp_path: Path) -> None:
    """Serve's own proxy starts a replica for all that it passes on, so there a model's health needs a key too."""
    serve = Serve()
    async with client(serve, make_gate(tmp_path)[0], wakes=True) as http:
        assert (await http.get("/models/m/health")).status_code == 401
        assert (await http.get("/models/m/health/")).status_code == 401
        assert serve.seen == []
        assert (await http.get("/models/m/health", headers=AUTH)).status_code == 200
        assert (await http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    ("is_open", "origin", "comes_in"), [(False, None, False), (True, None, True), (True, "http://evil.example", False)]
)
async def test_websockets_stop_at_the_door(tmp_path: Path, is_open: bool, origin: str | None, comes_in: bool) -> None:
    """They take no key, and Serve's own proxy would wake a model for one before any gate sees it."""
    seen, sent, refused = list[str](), list[Any](), list[int]()

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        seen.append(scope["type"])

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    gate = open_gate() if is_open else make_gate(tmp_path)[0]
    headers = [(b"host", b"here"), *([(b"origin", origin.encode())] if origin else [])]
    door = OuterDoor(app, Inside(gate, RouterConfig, refused=refused.append, wakes=True))
    await door({"type": "websocket", "path": "/models/m/health", "headers": headers}, receive, send)
    assert (seen, sent, refused) == ((["websocket"], [], []) if comes_in else ([], ["websocket.close"], [403]))


async def test_a_body_over_the_limit_is_refused_before_serve(tmp_path: Path) -> None:
    """A declared one unread."""
    serve, limits = Serve(), RouterConfig(max_body_bytes=1000, body_timeout_s=0.5)

    async def pieces(count: int, pause_s: float = 0) -> AsyncIterator[bytes]:
        for _ in range(count):
            await asyncio.sleep(pause_s)
            yield b"x" * 100

    async with client(serve, open_gate(), limits) as http:
        declared = await http.post("/", content=endless(), headers={"content-length": "1001"})
        counted = await http.post("/", content=pieces(11))
        slow = await http.post("/", content=pieces(10, 0.1))
        assert [reply.status_code for reply in (declared, counted, slow)] == [413, 413, 408]
        assert serve.seen == []
        assert (await http.post("/", content=pieces(10))).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["x-request-disconnect-disabled", "x-request-timeout-seconds", "serve_multiplexed_model_id",
     "serve-multiplexed-model-id", "X-Request_Disconnect-Disabled"],
)  # fmt: skip
async def test_clients_do_not_steer_serve(name: str) -> None:
    """Its own headers do not come in; others do."""
    serve = Serve()
    async with client(serve, open_gate()) as http:
        await http.post("/", content=b"", headers={name: "?1", "x-request-id": "mine", "x-other": "1"})
    assert name.lower().encode() not in serve.seen[0]
    assert (serve.seen[0][b"x-request-id"], serve.seen[0][b"x-other"]) == (b"mine", b"1")


@pytest.mark.parametrize("name", ["x-request-id", "x-session-id", "traceparent"])
async def test_a_header_that_serve_cannot_read_is_told(name: str) -> None:
    """It would answer 500 without a word. UTF-8 is fine."""
    serve = Serve()
    async with client(serve, open_gate()) as http:
        wrong = await http.post("/", headers=[(name.encode(), b"caf\xe9")])
        right = await http.post("/", headers=[(name.encode(), "café".encode())])
    assert (wrong.status_code, right.status_code) == (400, 200)
    assert f"The header '{name}' is not text in UTF-8" in wrong.json()["error"]["message"]
    assert wrong.headers["x-request-id"]


async def test_large_bodies_share_a_budget_and_small_ones_need_none() -> None:
    """Held until the answer ends, as the router keeps a body to send it again. Then there is room."""
    serve = Serve()
    limits = RouterConfig(max_bodies_bytes=4 * MB)
    async with client(serve, open_gate(), limits) as http:
        serve.go_on.clear()
        held = [asyncio.create_task(http.post("/", content=b"x" * MB)) for _ in range(4)]
        for _ in held:
            await serve.arrived.acquire()
        refused = await http.post("/", content=b"x" * MB)
        small = asyncio.create_task(http.post("/", content=b"x" * FREE_BYTES))
        await serve.arrived.acquire()
        serve.go_on.set()
        assert [reply.status_code for reply in await asyncio.gather(*held, small)] == [200] * 5
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "4194304 bytes together" in refused.json()["error"]["message"]
        assert (await http.post("/", content=b"x" * MB)).status_code == 200


def test_one_key_has_half_of_the_budget() -> None:
    """So no client with large bodies shuts out those of another. What is given back is free again."""
    budget = BodyBudget(lambda: 10 * MB)
    first, second = budget.hold("a"), budget.hold("a")
    first.grow(5 * MB)
    with pytest.raises(Overloaded, match="of this API key may have 5242880 bytes"):
        second.grow(MB)
    budget.hold("b").grow(5 * MB)
    with pytest.raises(Overloaded, match="The request bodies here"):
        budget.hold("c").grow(MB)
    first.release()
    first.release()
    second.release()
    assert budget.held == 5 * MB - FREE_BYTES


def test_a_replica_without_the_door_does_not_start() -> None:
    """On a node whose Ray was started otherwise, Serve would read bodies without a bound and before any key."""
    require_door({"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.access.door:middlewares"})
    with pytest.raises(ConfigError, match="serve-app node-env"):
        require_door({})


def test_serve_finds_the_door_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contract with Ray: the variable, its form, and that the door stands before Serve's own middleware."""
    from ray.serve._private import http_util
    from ray.serve.config import HTTPOptions

    (name,) = OUTER_DOOR
    assert http_util.__dict__[name] is None
    monkeypatch.setattr(http_util, name, OUTER_DOOR[name])
    inside = Inside(open_gate(), RouterConfig)
    monkeypatch.setattr(outer_door, "_of_this_process", inside)
    made = http_util.configure_http_middlewares(http_util.configure_http_options_with_defaults(HTTPOptions()))
    assert [type(item) for item in made.middlewares] == [Middleware]
    app = http_util._apply_middlewares(Serve(), made.middlewares)
    assert isinstance(app, OuterDoor)
    assert isinstance(app._app, http_util.RequestIdMiddleware)
    assert app._inside is inside


def test_serves_proxy_without_readable_keys_lets_nobody_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A proxy that failed to start would take the whole of Serve along, with less of a reason."""
    monkeypatch.setenv("SERVE_APP_API_KEYS_FILE", str(tmp_path / "missing.yaml"))
    monkeypatch.setattr(outer_door, "_of_this_process", None)
    (made,) = outer_door.middlewares()
    inside = made.kwargs["inside"]
    assert inside.wakes
    assert not inside.gate.source.is_open


@pytest.mark.parametrize("path", ["/v1/messages", "/models/m/v1/messages/count_tokens"])
async def test_errors_of_anthropics_paths_have_its_form(tmp_path: Path, path: str) -> None:
    """Those of the door, and those of Serve and all others behind it, with their headers."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        status, kind, body = answers.pop(0)
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *EXTRA]})
        await send({"type": "http.response.body", "body": body[:3], "more_body": True})
        await send({"type": "http.response.body", "body": body[3:]})

    answers = [
        (
            429,
            b"application/json",
            b'{"error": {"message": "too many", "type": "requests", "param": null, "code": "x"}}',
        ),
        (500, b"text/plain", b"Internal Server Error"),
        (200, b"text/event-stream", b"event: ping\n\n"),
    ]
    door = OuterDoor(serve, Inside(make_gate(tmp_path)[0], lambda: RouterConfig(max_body_bytes=10), model="m"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://here") as http:
        nobody = await http.post(path, json={})
        other = await http.post(path, json={}, headers=OUTSIDE)
        long = await http.post(path, content=b"x" * 11, headers=AUTH)
        by_anthropics_header = {"x-api-key": AUTH["authorization"].removeprefix("Bearer ")}
        limited, broken, stream = [await http.post(path, json={}, headers=by_anthropics_header) for _ in range(3)]
    said = [(reply.status_code, reply.json()["error"]["type"]) for reply in (nobody, other, long, limited, broken)]
    assert said == [
        (401, "authentication_error"), (403, "permission_error"), (413, "request_too_large"),
        (429, "rate_limit_error"), (500, "api_error"),
    ]  # fmt: skip
    assert {reply.json()["type"] for reply in (nobody, other, long, limited, broken)} == {"error"}
    assert nobody.json()["error"]["code"] == "invalid_api_key"
    assert limited.json()["error"] == {"type": "rate_limit_error", "message": "too many", "code": "x"}
    assert (limited.headers["retry-after"], broken.json()["error"]["message"]) == ("3", "Internal Server Error")
    assert stream.content == b"event: ping\n\n"


EXTRA = [(b"retry-after", b"3")]
