"""Errors of vLLM's Messages API become those of Anthropic's, and say whether the engine has died."""

import json
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve_app.engines.vllm.messages_errors import with_messages_errors
from serve_app.router.engine_loss import is_lost_event

# As vLLM 0.32 writes them.
BAD = {"type": "error", "error": {"type": "BadRequestError", "message": "max_tokens must be positive"}}
INVALID = {"error": {"message": "1 validation error", "type": "Bad Request", "param": None, "code": 400}}
BROKEN = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"2 validation errors"}}\n\n'
START = b'event: message_start\ndata: {"type":"message_start"}\n\n'


async def answer(reply: Response, death: str = "", path: str = "/v1/messages") -> httpx.Response:
    """What a client gets for it."""

    async def endpoint(_: Request) -> Response:
        return reply

    async def dead() -> str:
        return death

    app = with_messages_errors(Starlette(routes=[Route(path, endpoint, methods=["POST"])]), dead)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://vllm") as client:
        return await client.post(path, json={})


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [(BAD, 400, "invalid_request_error"), (INVALID, 400, "invalid_request_error"), (BAD, 404, "not_found_error"),
     (INVALID, 500, "api_error"), (["odd"], 422, "invalid_request_error")],
)  # fmt: skip
async def test_refusals_have_anthropics_types(body: Any, status: int, kind: str) -> None:
    """By their status, whatever form vLLM gave them."""
    reply = await answer(JSONResponse(body, status))
    said = reply.json()
    assert (reply.status_code, said["type"], said["error"]["type"]) == (status, "error", kind)
    assert said["error"]["message"]


async def test_a_dead_engine_is_a_503() -> None:
    """So that the router asks another replica, which vLLM's 500 would not have it do."""
    reply = await answer(JSONResponse(BAD, 500), death="it ended")
    assert (reply.status_code, reply.json()["error"]["type"]) == (503, "overloaded_error")
    assert reply.json()["error"]["code"] == "model_unavailable"
    assert reply.headers["retry-after"]


@pytest.mark.parametrize(("death", "is_lost"), [("it ended", True), ("", False)])
async def test_an_error_in_a_stream_says_whether_the_engine_has_died(death: str, is_lost: bool) -> None:
    """By the code that the router reads."""

    async def events() -> Any:
        yield START
        yield BROKEN

    reply = await answer(StreamingResponse(events(), media_type="text/event-stream"), death)
    assert reply.content.startswith(START)
    event = reply.content.removeprefix(START)
    assert is_lost_event(event) == is_lost
    said = json.loads(event.partition(b"data: ")[2])
    assert said["error"]["type"] == ("overloaded_error" if death else "api_error")


async def test_a_refusal_in_a_stream_is_one() -> None:
    """As vLLM 0.32 shows the chat's error, of which it fails to read the form."""
    shown = "Field required [type=missing, input_value={'error': {'message': 'Gr...am': None, 'code': 400}}, input_type"
    broken = {"type": "error", "error": {"type": "internal_error", "message": shown}}

    async def events() -> Any:
        yield START
        yield b"event: error\ndata: %s\n\n" % json.dumps(broken).encode()

    reply = await answer(StreamingResponse(events(), media_type="text/event-stream"))
    said = json.loads(reply.content.removeprefix(START).partition(b"data: ")[2])
    assert said["error"]["type"] == "invalid_request_error"
    assert "without 'stream'" in said["error"]["message"]


async def test_other_paths_stay_as_they_are() -> None:
    """OpenAI's form is theirs."""
    reply = await answer(JSONResponse(INVALID, 500), death="it ended", path="/v1/responses")
    assert (reply.status_code, reply.json()) == (500, INVALID)
