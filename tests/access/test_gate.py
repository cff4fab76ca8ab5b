"""The gate, and an application behind it, with a limiter in this process."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers as SentHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from serve_app.access.gate import Admission, Gate, KeyedApp, KeyedRouter, refusal
from serve_app.access.keys import KeySource
from serve_app.access.origin import require_own_page
from serve_app.errors import Forbidden, ForeignPage, InvalidRequest, RateLimited, TokensLimited, Unauthorized
from serve_app.wire.asked_model import Asked
from serve_app.wire.body import RequestBody
from serve_app.wire.headers import Headers
from serve_app.wire.usage import estimate_tokens
from tests.fakes import AUTH, KEY, OUTSIDE, LocalLimiter, make_gate


async def answer(_: Request) -> Response:
    """An answer with its usage."""
    return JSONResponse({"choices": [], "usage": {"prompt_tokens": 3, "total_tokens": 7}}, headers={"x-own": "1"})


async def stream(request: Request) -> Response:
    """Events, the last one with the usage where that is asked for."""

    async def pieces() -> AsyncIterator[str]:
        yield 'data: {"choices": [{"delta": {"content": "\\"total_tokens\\": 1"}}]}\n\n'
        if request.query_params:
            yield 'data: {"choices": [], "usage": {"prompt_tokens": 1, "total_'
            yield 'tokens": 21, "prompt_tokens_details": {"cached_tokens": 0}}}\n\n'
        yield "data: [DONE]\n\n"

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def wrong(_: Request) -> Response:
    """A refusal of the engine."""
    return JSONResponse({"error": {}}, status_code=400)


async def plain(_: Request) -> Response:
    """Health or metrics."""
    return PlainTextResponse("fine")


ENGINE = Starlette(
    routes=[
        Route("/v1/chat/completions", answer, methods=["POST"]),
        Route("/stream", stream, methods=["POST"]),
        Route("/wrong", wrong, methods=["POST"]),
        Route("/health", plain, methods=["GET", "POST"]),
        Route("/metrics", plain),
    ]
)


def client(app: Any) -> httpx.AsyncClient:
    """A client of an application in this process."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, root_path="/models/m"), base_url="http://here/models/m")


async def admit(gate: Gate, headers: Headers, model: str | None, estimate: int) -> Admission:
    """As the router does."""
    return await gate.admit(gate.identify(headers, Asked(model) if model else None), estimate)


async def test_an_open_gate_asks_for_nothing() -> None:
    """No key, no name, no header, and the limiter is never asked."""
    limiter = LocalLimiter()
    admission = await admit(Gate(KeySource(None, {}), limiter), [], "m", 5)
    await admission.release(5)
    assert (admission.key_name, admission.headers, limiter.takes) == (None, [], 0)


async def test_keys_without_limits_cost_the_limiter_nothing(tmp_path: Path) -> None:
    """The name is told all the same."""
    gate, limiter = make_gate(tmp_path)
    admission = await admit(gate, KEY, "m", 5)
    await admission.release(5)
    assert (admission.key_name, admission.headers, limiter.takes, limiter.settled) == ("a", [], 0, [])


@pytest.mark.parametrize(("limits", "warm"), [("", False), ("requests_per_minute: 1", True)])
async def test_the_limiter_is_made_ready_only_where_a_key_has_limits(tmp_path: Path, limits: str, warm: bool) -> None:
    """No actor is started for keys that need none."""
    gate, limiter = make_gate(tmp_path, limits)
    await gate.start()
    assert limiter.is_warm == warm


async def test_wrong_keys_and_models_are_refused_before_the_limiter(tmp_path: Path) -> None:
    """They cost a key nothing; without a model only the key counts."""
    gate, limiter = make_gate(tmp_path, "requests_per_minute: 1")
    with pytest.raises(Unauthorized):
        await admit(gate, [(b"authorization", b"Bearer sk-b")], "m", 0)
    with pytest.raises(Forbidden):
        await admit(gate, KEY, "other", 0)
    assert limiter.takes == 0
    assert (await admit(gate, KEY, None, 0)).key_name == "a"


@pytest.mark.parametrize(
    ("limits", "kind", "type_", "words"),
    [
        ("requests_per_minute: 1", RateLimited, "requests", "the API key 'a' has 1 requests a minute. Try again in 1m"),
        ("tokens_per_minute: 10", TokensLimited, "tokens", "has 10 tokens a minute. Try again in 1m0s"),
        ("max_concurrent_requests: 1", RateLimited, "requests", "has 1 requests at once. Try again in 1s"),
    ],
)
async def test_a_used_up_key_gets_openais_429(
    tmp_path: Path, limits: str, kind: type[RateLimited], type_: str, words: str
) -> None:
    """With the code that clients know, the time to wait, and what is left."""
    gate, _ = make_gate(tmp_path, limits)
    await admit(gate, KEY, "m", 10)
    with pytest.raises(RateLimited, match=words) as caught:
        await admit(gate, KEY, "m", 10)
    assert type(caught.value) is kind
    response = refusal(caught.value)
    error = json.loads(bytes(response.body))["error"]
    assert (response.status_code, error["type"], error["code"]) == (429, type_, "rate_limit_exceeded")
    assert int(response.headers["retry-after"]) in (1, 60)
    assert ("x-ratelimit-remaining-" + type_ in response.headers) == ("minute" in limits)


async def test_a_release_counts_once(tmp_path: Path) -> None:
    """A second one would free another request's place."""
    gate, limiter = make_gate(tmp_path, "tokens_per_minute: 10")
    admission = await admit(gate, KEY, "m", 4)
    await admission.release(2)
    await admission.release(None)
    assert limiter.settled == [2]
    assert (b"x-ratelimit-remaining-tokens", b"6") in admission.headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/none/such"),
        ("POST", "/health"),
        ("HEAD", "/health"),
        ("OPTIONS", "/v1/chat/completions"),
        ("GET", "/health/"),
        ("GET", "/x/health"),
        ("GET", "/models/m/health"),
    ],
)
async def test_everything_but_health_needs_a_key(tmp_path: Path, method: str, path: str) -> None:
    """401 without one and 403 with one of another model, in OpenAI's envelope; with the right one it is reached."""
    app = KeyedApp(ENGINE, make_gate(tmp_path)[0], "m")
    async with client(app) as http:
        nobody = await http.request(method, path)
        other = await http.request(method, path, headers=OUTSIDE)
        right = await http.request(method, path, headers=AUTH)
    assert (nobody.status_code, nobody.headers["www-authenticate"]) == (401, "Bearer")
    assert other.status_code == 403
    assert right.status_code not in (401, 403)
    if method != "HEAD":
        assert nobody.json()["error"]["code"] == "invalid_api_key"
        assert other.json()["error"]["code"] == "model_not_allowed"


async def test_an_engine_hears_the_name_of_the_key_from_the_gate_alone(tmp_path: Path) -> None:
    """What a client says of it goes no further."""
    heard: list[list[str]] = []

    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append(SentHeaders(scope=scope).getlist("x-serve-app-key-name"))
        await Response()(scope, receive, send)

    async with client(KeyedApp(engine, make_gate(tmp_path)[0], "m")) as http:
        await http.post("/v1/chat/completions", headers=AUTH | {"x-serve-app-key-name": "another"})
    assert heard == [["a"]]


async def test_health_needs_no_key(tmp_path: Path) -> None:
    """With the route's prefix, and without one."""
    app = KeyedApp(ENGINE, make_gate(tmp_path)[0], "m")
    async with client(app) as http:
        assert (await http.get("/health")).text == "fine"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as http:
        assert (await http.get("/health")).text == "fine"
        assert (await http.get("/models/m/health")).status_code == 401


async def test_an_answer_carries_what_is_left_and_is_charged_by_its_usage(tmp_path: Path) -> None:
    """The answer's own headers stay, and the next answer tells of the correction."""
    gate, limiter = make_gate(tmp_path, "requests_per_minute: 9, tokens_per_minute: 100")
    async with client(KeyedApp(ENGINE, gate, "m")) as http:
        first = await http.post("/v1/chat/completions", content=b"x" * 80, headers=AUTH)
        second = await http.post("/v1/chat/completions", content=b"x" * 80, headers=AUTH)
    assert (first.headers["x-own"], first.headers["x-ratelimit-remaining-requests"]) == ("1", "8")
    assert first.headers["x-ratelimit-remaining-tokens"] == "80"
    assert second.headers["x-ratelimit-remaining-tokens"] == "73"
    assert limiter.settled == [7, 7]


@pytest.mark.parametrize(("path", "settled"), [("/stream?usage=1", 21), ("/stream", 1), ("/wrong", 0)])
async def test_what_a_request_used(tmp_path: Path, path: str, settled: int | None) -> None:
    """A stream by its last usage, also over pieces; without usage by its events; a refusal used nothing."""
    gate, limiter = make_gate(tmp_path, "tokens_per_minute: 100")
    async with client(KeyedApp(ENGINE, gate, "m")) as http:
        await http.post(path, headers=AUTH)
    assert limiter.settled == [settled]


async def test_looking_around_is_not_charged(tmp_path: Path) -> None:
    """GET makes no model work."""
    gate, limiter = make_gate(tmp_path, "requests_per_minute: 1")
    async with client(KeyedApp(ENGINE, gate, "m")) as http:
        assert [(await http.get("/metrics", headers=AUTH)).status_code for _ in range(3)] == [200] * 3
    assert limiter.takes == 0


async def test_over_the_limit_the_engine_is_not_reached(tmp_path: Path) -> None:
    """The second request gets 429 with the time to wait."""
    gate, _ = make_gate(tmp_path, "requests_per_minute: 1")
    async with client(KeyedApp(ENGINE, gate, "m")) as http:
        await http.post("/wrong", headers=AUTH)
        second = await http.post("/wrong", headers=AUTH)
    assert (second.status_code, second.headers["retry-after"]) == (429, "60")
    assert second.headers["x-ratelimit-reset-requests"] == "1m0s"
    assert second.json()["error"]["code"] == "rate_limit_exceeded"


SCOPE = {"type": "http", "method": "POST", "path": "/", "root_path": "", "headers": KEY}


async def receive() -> Message:
    """An empty request."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(_: Message) -> None:
    """Nobody reads."""


@pytest.mark.parametrize("end", ["raises", "cancelled", "send breaks"])
async def test_a_place_is_given_back_however_the_request_ends(tmp_path: Path, end: str) -> None:
    """An error of the engine, a cancelled task, and a client that has gone."""
    gate, limiter = make_gate(tmp_path, "max_concurrent_requests: 1")
    entered, end_now = asyncio.Event(), asyncio.Event()

    async def engine(_scope: Any, _receive: Any, send: Any) -> None:
        entered.set()
        await end_now.wait()
        if end == "raises":
            raise ValueError("broken")
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def broken(_: Message) -> None:
        raise OSError("gone")

    task = asyncio.create_task(KeyedApp(engine, gate, "m")(SCOPE, receive, broken))
    await entered.wait()
    assert limiter.settled == []
    with pytest.raises(RateLimited):
        await admit(gate, KEY, "m", 0)
    if end == "cancelled":
        task.cancel()
    else:
        end_now.set()
    with suppress(asyncio.CancelledError, ValueError, OSError):
        await task
    assert limiter.settled == [None]
    assert (await admit(gate, KEY, "m", 0)).key_name == "a"


async def test_a_body_that_metering_refuses_gives_its_place_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key would be locked out: the lease of a request that never ran was renewed for ever."""

    def refuse(*_: object, **__: object) -> RequestBody:
        raise InvalidRequest("nested too deep to be written")

    monkeypatch.setattr(RequestBody, "with_fields", refuse)
    gate, limiter = make_gate(tmp_path, "tokens_per_minute: 1000")
    async with client(KeyedApp(ENGINE, gate, "m")) as http:
        body = b'{"model": "m", "stream": true}'
        reply = await http.post("/v1/chat/completions", content=body, headers=dict(KEY))
    assert (reply.status_code, limiter.takes, limiter.settled) == (400, 1, [0])


async def test_websockets_are_refused(tmp_path: Path) -> None:
    """Closed before they are accepted, even with a key; the engine is not reached."""
    sent: list[Message] = []

    async def keep(message: Message) -> None:
        sent.append(message)

    app = KeyedApp(ENGINE, make_gate(tmp_path)[0], "m")
    await app({"type": "websocket", "path": "/health", "headers": KEY}, receive, keep)
    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]


async def test_lifespan_goes_through(tmp_path: Path) -> None:
    """The engine starts and stops behind the gate."""
    seen = []

    async def engine(scope: Any, _receive: Any, _send: Any) -> None:
        seen.append(scope["type"])

    await KeyedApp(engine, make_gate(tmp_path)[0], "m")({"type": "lifespan"}, receive, send)
    assert seen == ["lifespan"]


async def test_an_open_gate_lets_the_application_alone() -> None:
    """Every kind of call goes through as it is, with the sender of the caller."""
    seen = []

    async def engine(scope: Any, _receive: Any, own_send: Any) -> None:
        seen.append((scope["type"], own_send is send))

    app = KeyedApp(engine, Gate(KeySource(None, {}), LocalLimiter()), "m")
    for kind in ("http", "websocket"):
        await app({"type": kind, "method": "POST", "path": "/", "headers": []}, receive, send)
    assert seen == [("http", True), ("websocket", True)]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://evil.example", 403),
        ("http://evil.example:8000", 403),  # The page's own name may resolve to 127.0.0.1: then it is the same site.
        ("http://localhost.evil.example", 403),
        ("null", 403),
        ("http://[::1", 403),
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:8000", 200),
        ("http://[::1]:3000", 200),
        ("app://desktop", 200),
        (None, 200),
    ],
)
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/json"])
async def test_web_pages_of_other_sites_may_not_use_what_needs_no_key(
    tmp_path: Path, origin: str | None, status: int, kind: str
) -> None:
    """Whatever they call the body: a browser sends the first two without asking. curl and SDKs send no origin, and a
    page that knows a key may use it."""
    headers = {"content-type": kind} | ({} if origin is None else {"origin": origin})
    body = json.dumps({"model": "m", "messages": []})
    async with client(KeyedApp(ENGINE, Gate(KeySource(None, {}), LocalLimiter()), "m")) as http:
        reply = await http.post("/v1/chat/completions", content=body, headers=headers)
        preflight = await http.options("/v1/chat/completions", headers=headers)
    async with client(KeyedRouter(ENGINE, Gate(KeySource(None, {}), LocalLimiter()))) as http:
        by_name = await http.post("/v1/chat/completions", content=body, headers=headers)
    assert (reply.status_code, by_name.status_code) == (status, status)
    assert (preflight.status_code == 403) == (status == 403)
    if status == 403:
        assert reply.json()["error"]["code"] == "origin_not_allowed"
    async with client(KeyedApp(ENGINE, make_gate(tmp_path)[0], "m")) as http:
        assert (await http.post("/v1/chat/completions", content=body, headers=headers | AUTH)).status_code == 200


@pytest.mark.parametrize(
    ("origin", "host", "is_own"),
    [
        ("http://10.0.0.5:8000", "10.0.0.5:8000", True),
        ("https://[fd00::5]", "[fd00::5]", True),
        ("http://10.0.0.5:8000", "10.0.0.5:9000", False),
        ("http://10.0.0.6:8000", "10.0.0.5:8000", False),
        ("http://evil.example:8000", "evil.example:8000", False),
        ("http://10.0.0.5:8000", None, False),
    ],
)
def test_a_page_that_this_address_serves_may_use_it(origin: str, host: str | None, is_own: bool) -> None:
    """If the address is an IP address. A name may be one that was made to resolve to it."""
    headers = [(b"origin", origin.encode())] + ([] if host is None else [(b"host", host.encode())])
    if is_own:
        require_own_page(headers)
        return
    with pytest.raises(ForeignPage):
        require_own_page(headers)


def test_serve_still_sees_the_routes(tmp_path: Path) -> None:
    """Its metrics name them; an application without routes has none."""
    gate, _ = make_gate(tmp_path)
    assert KeyedApp(ENGINE, gate, "m").routes is ENGINE.routes  # type: ignore[attr-defined]
    assert not hasattr(KeyedApp(receive, gate, "m"), "routes")  # type: ignore[arg-type]


def test_the_estimate_is_length_and_what_is_asked_for() -> None:
    """Four bytes a token; a negative maximum takes nothing off."""
    assert estimate_tokens(400, 50) == 150
    assert estimate_tokens(400) == estimate_tokens(400, -7) == 100


async def test_a_body_without_a_length_is_counted_too(tmp_path: Path) -> None:
    """By route: in chunks, and with what it may generate."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"prompt": "' + b"x" * 386 + b'", "max_tokens": 50}'

    gate, _ = make_gate(tmp_path, "tokens_per_minute: 1000")
    async with client(KeyedApp(ENGINE, gate, "m")) as http:
        reply = await http.post("/v1/completions", content=chunks(), headers=AUTH)
    assert reply.headers["x-ratelimit-remaining-tokens"] == str(1000 - 417 // 4 - 50)
