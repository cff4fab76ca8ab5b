"""The router with models that are small ASGI applications instead of replicas."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from ray.exceptions import RayActorError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve_app.config import RouterConfig
from serve_app.errors import InvalidRequest, ModelUnavailable
from serve_app.router.model_status import ModelStatus
from serve_app.router.upstream.protocol import HandleUpstream
from serve_app.wire.asgi import HttpRequest, call_asgi
from serve_app.wire.body import RequestBody
from tests.fakes import ModelsFake, router_app

USES_VIRTUAL_CLOCK = True


class Items:
    """What a Ray handle returns: an asynchronous iterator that can be cancelled. `fail_after` items it breaks."""

    def __init__(self, app: Starlette, request: HttpRequest, fail_after: int | None):
        self._items = call_asgi(app, request)
        self._left = fail_after
        self.cancelled = False

    def __aiter__(self) -> "Items":
        return self

    async def __anext__(self) -> bytes:
        if self._left == 0:
            raise RayActorError
        self._left = None if self._left is None else self._left - 1
        return await anext(self._items)

    def cancel(self) -> None:
        """Remembers it."""
        self.cancelled = True


class Directory(ModelsFake):
    """One ready model and one that loads, over applications in this process; a handle's call breaks after so many
    items. `gone`: the model is being removed while a request waits for it."""

    def __init__(self, fail_after: int | None = None, gone: bool = False):
        super().__init__(a="ready", b="loading")
        self.fail_after = fail_after
        self.gone = gone
        self.items: list[Items] = []

    def require_hope(self, model: ModelStatus) -> None:
        """As in the real one."""
        if self.gone:
            raise ModelUnavailable("it is being removed")

    def unavailable(self, model: ModelStatus) -> ModelUnavailable:
        """As in the real one."""
        return ModelUnavailable("loading", retry_after_s=9.2)

    async def handle(self, name: str) -> Any:
        """An object whose `remote` calls the model."""
        if (await self.find(name)).state != "ready":
            raise ModelUnavailable("loading", retry_after_s=9.2)
        return self

    def remote(self, request: HttpRequest) -> Items:
        """As a Ray handle does."""
        self.items.append(Items(MODEL, request, self.fail_after))
        return self.items[-1]


async def _echo(request: Request) -> Response:
    body = await request.json()
    headers = {name: value for name, value in request.headers.items() if name.startswith(("x-", "content-t"))}
    seen = {"path": request.url.path, "query": request.url.query, "body": body, "headers": headers}
    return JSONResponse(seen, status_code=418, headers={"x-model": "a"})


async def _stream(_: Request) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        for number in range(3):
            yield f"data: {number}\n\n".encode()

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def _never(_: Request) -> Response:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


MODEL = Starlette(
    routes=[
        Route("/v1/never", _never, methods=["POST"]),
        Route("/v1/stream", _stream, methods=["POST"]),
        Route("/{path:path}", _echo, methods=["POST"]),
    ]
)


def client(directory: Directory, **config: Any) -> httpx.AsyncClient:
    """A client of the router."""
    upstream = HandleUpstream(directory, RouterConfig(**config).discovery_interval_s)  # type: ignore[arg-type]
    _, app = router_app(directory, upstream, **config)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://router")


async def test_a_request_and_its_answer_pass_unchanged() -> None:
    """Path, query, body and headers go to the model; status, headers and body come back."""
    async with client(Directory()) as session:
        reply = await session.post("/v1/any?q=1", json={"model": "a", "z": [1]}, headers={"x-request-id": "r1"})
    assert (reply.status_code, reply.headers["x-model"]) == (418, "a")
    seen = reply.json()
    assert (seen["path"], seen["query"], seen["body"]) == ("/v1/any", "q=1", {"model": "a", "z": [1]})
    assert seen["headers"]["x-request-id"] == "r1"


async def test_a_json_body_is_called_json() -> None:
    """curl -d calls it a form; vLLM would refuse that."""
    async with client(Directory()) as session:
        reply = await session.post(
            "/v1/any", content=b'{"model": "a"}', headers={"content-type": "application/x-www-form-urlencoded"}
        )
    assert reply.json()["headers"]["content-type"] == "application/json"


async def test_a_stream_passes_as_it_comes() -> None:
    """All events, and no length that was not the model's."""
    async with client(Directory()) as session:
        reply = await session.post("/v1/stream", json={"model": "a"})
    assert reply.text.startswith("data: 0\n\ndata: 1\n\ndata: 2\n\n: server-timing router;dur=")
    assert "content-length" not in reply.headers


async def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    """Never in silence."""
    async with client(Directory(fail_after=2)) as session:  # the head and one piece
        reply = await session.post("/v1/stream", json={"model": "a"})
    last = reply.text.strip().split("\n\n")[-2].removeprefix("data: ")  # after it the times, as a comment
    assert json.loads(last)["error"]["code"] == "model_unavailable"


async def test_a_replica_that_dies_before_answering_is_a_503() -> None:
    """The client may try again at once."""
    async with client(Directory(fail_after=0)) as session:
        reply = await session.post("/v1/any", json={"model": "a"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")


async def test_nobody_waits_for_a_model_that_is_gone() -> None:
    """A handle without replicas waits for ever; the router does not, and lets go of the call."""
    directory = Directory(gone=True)
    async with client(directory, discovery_interval_s=0.05) as session:
        reply = await session.post("/v1/never", json={"model": "a"})
    assert reply.status_code == 503
    assert directory.items[0].cancelled


@pytest.mark.parametrize("body", [b'{"model": "\\ud800"}', b'{"model": "a", "x": ' + b"[" * 100_000])
async def test_json_that_no_program_can_hold_is_refused(body: bytes) -> None:
    """Half a character, and nesting without end."""
    async with client(Directory()) as session:
        reply = await session.post("/v1/any", content=body)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_a_loading_model_is_a_503_with_retry_after() -> None:
    """Whole seconds, rounded up."""
    async with client(Directory(), hold_timeout_s=0.1) as session:
        reply = await session.post("/v1/any", json={"model": "b"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "10")


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_refused_before_it_is_read(declared: bool) -> None:
    """By its declared length, or as soon as it is over."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 100

    async with client(Directory(), max_body_bytes=1000) as session:
        content: Any = b"x" * 1001 if declared else endless()
        reply = await session.post("/v1/any", content=content)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")


async def test_ready_is_200_as_soon_as_one_model_serves() -> None:
    """And tells of each."""
    async with client(Directory()) as session:
        reply = await session.get("/ready")
        assert (reply.status_code, reply.json()["status"]) == (200, "degraded")
        assert reply.json()["models"]["b"]["status"] == "loading"
        assert reply.json()["models"]["a"]["residency"] == ["parked"]
        assert "residency" not in reply.json()["models"]["b"]
        assert (await session.get("/health")).json() == {"status": "ok"}
        assert (await session.get("/v1/models/nobody")).status_code == 404


async def test_other_methods_lead_to_the_models_route() -> None:
    """A GET has no body, so no model can be read from it."""
    async with client(Directory()) as session:
        reply = await session.get("/v1/responses/7")
    assert reply.status_code == 404
    assert "/models/NAME/" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("HEAD", "/v1/embeddings", 405, "POST"),
        ("PUT", "/v1/anything", 405, "POST"),
        ("DELETE", "/v1/models", 405, "GET, HEAD"),
        ("DELETE", "/v1/models/a", 405, "GET, HEAD"),
        ("GET", "/favicon.ico", 404, None),
    ],
)
async def test_a_wrong_method_is_told_with_the_right_one(
    method: str, path: str, status: int, allowed: str | None
) -> None:
    """In OpenAI's form. An unknown address is not found, although POST goes to models from everywhere."""
    async with client(Directory()) as session:
        reply = await session.request(method, path)
    assert (reply.status_code, _methods(reply.headers.get("allow"))) == (status, _methods(allowed))
    if method != "HEAD":
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"


def _methods(header: str | None) -> set[str] | None:
    return None if header is None else set(header.split(", "))


def test_the_model_is_read_from_any_json_object() -> None:
    """Wherever it stands."""
    assert RequestBody('{"messages": [{"model": "inner"}], "model": "ünder/x"}'.encode()).peek().model == "ünder/x"


def test_another_model_is_put_into_a_body_that_stays_as_it_is() -> None:
    """The other fields are not read, so a large body costs little, and numbers keep their digits."""
    body = b'{"a": 1.10, "model": "x", "b": [1e2, {"model": "x"}], "c": "\\u00fc"}'
    renamed = RequestBody(body).with_fields(model="y").content
    assert renamed == b'{"a":1.10,"model":"y","b":[1e2, {"model": "x"}],"c":"\\u00fc"}'
    with pytest.raises(InvalidRequest):
        RequestBody(b"[").with_fields(model="y")
