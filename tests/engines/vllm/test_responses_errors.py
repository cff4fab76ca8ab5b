"""Streams of vLLM's Responses API end by an event, whatever breaks them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve_app.engines.vllm.responses_errors import with_responses_errors
from serve_app.router.engine_loss import is_lost_event

CREATED = b'event: response.created\ndata: {"type":"response.created","sequence_number":0}\n\n'


class Refusal(Exception):
    """Is what vLLM says of a wrong request."""


async def answer(reply: Response, death: str = "", path: str = "/v1/responses") -> httpx.Response:
    """What a client gets for it."""

    async def endpoint(_: Request) -> Response:
        return reply

    async def dead() -> str:
        return death

    def refusal(error: BaseException) -> str | None:
        found = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        return str(found) if isinstance(found, Refusal) else None

    app = with_responses_errors(Starlette(routes=[Route(path, endpoint, methods=["POST"])]), dead, refusal)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://vllm") as client:
        return await client.post(path, json={})


def breaking(error: Exception) -> Response:
    """A stream that breaks after its first event."""

    async def events() -> AsyncIterator[bytes]:
        yield CREATED
        raise error

    return StreamingResponse(events(), media_type="text/event-stream")


@pytest.mark.parametrize(
    ("error", "death", "code", "says"),
    [
        (Refusal("the schema is empty"), "", "invalid_request_error", "the schema is empty"),
        (RuntimeError("a path"), "", "server_error", "vLLM failed on this request (RuntimeError)."),
        (RuntimeError("x"), "it ended", "model_unavailable", "it ended"),
    ],
)
async def test_a_stream_that_breaks_ends_by_an_event(error: Exception, death: str, code: str, says: str) -> None:
    """With the number that comes next, and the code that says whose fault it is."""
    content = (await answer(breaking(error), death)).content
    assert content.startswith(CREATED + b"event: error\n")
    event = content.removeprefix(CREATED)
    said: dict[str, Any] = json.loads(event.partition(b"data: ")[2])
    assert (said["type"], said["sequence_number"], said["code"]) == ("error", 1, code)
    assert says in said["message"]
    assert is_lost_event(event) == bool(death)


async def test_what_has_no_stream_stays_as_it_is() -> None:
    """Errors before a stream are vLLM's own, and so are other paths."""
    assert (await answer(JSONResponse({"error": {}}, 400))).status_code == 400
    with pytest.raises(RuntimeError, match="x"):
        await answer(breaking(RuntimeError("x")), path="/v1/chat/completions")
