"""What a key's tokens are counted by: nothing that a client writes makes an answer free."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from serve_app.access.gate import KeyedApp, KeyedRouter
from serve_app.config import RouterConfig
from serve_app.router.deployment import build_app
from serve_app.router.forward import Proxy
from serve_app.router.metrics import RouterMetrics
from serve_app.wire.asgi import HttpRequest
from serve_app.wire.body import peek
from serve_app.wire.usage import UsageMeter, asking, estimate_tokens, without_usage
from tests.access.test_gate import AUTH, client, make_gate
from tests.router.test_forward import Models

CHAT = "/v1/chat/completions"
USAGE = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":2,"total_tokens":9,"completion_tokens":7}}\n\n'
TEXT = b'data: {"choices":[{"delta":{"content":"\\"usage\\": null} \\n\\n"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


def estimate(**fields: Any) -> int:
    """Without the body's own length."""
    seen = peek(json.dumps({"model": "m", **fields}).encode())
    return estimate_tokens(0, seen.token_limit, seen.answers)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"max_tokens": 16000.0}, 16000),
        ({"max_tokens": "16000"}, 16000),
        ({"max_completion_tokens": 1, "max_tokens": 16000}, 16000),
        ({"max_completion_tokens": 16000, "max_tokens": 1}, 16000),
        ({"max_tokens": 10, "n": 128}, 1280),
        ({"max_tokens": 10, "n": 4.0, "prompt": ["a", "b", "c"]}, 120),
        ({"max_tokens": 10, "prompt": [[1, 2], [3]]}, 20),
        ({"max_tokens": 10, "prompt": [1, 2, 3]}, 10),
        ({"max_tokens": 10, "prompt": "[\"a\", \"b\"]"}, 10),
        ({"max_tokens": -5, "n": -1}, 0),
        ({"max_tokens": "1e3", "n": "many"}, 0),
        ({"max_tokens": True}, 1),
        ({"max_tokens": "+100"}, 100),
        ({"max_tokens": "1_0", "n": " 2 "}, 20),
        ({"max_tokens": "0" * 100 + "1"}, 0),
        ({"max_tokens": 10, "prompt": ["a, [b]", '"', "\\"]}, 30),
        ({"max_tokens": 10, "prompt": ["a"]}, 10),
        ({"max_tokens": 10, "prompt": []}, 10),
    ],
)  # fmt: skip
def test_what_may_be_generated_is_estimated_as_engines_read_it(fields: dict[str, Any], tokens: int) -> None:
    """pydantic takes 16000.0 and "16000" for numbers, and engines differ in which of the two limits they follow."""
    assert estimate(**fields) == tokens


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"stream": True}, {"include_usage": True}),
        ({"stream": "true", "stream_options": None}, {"include_usage": True}),
        ({"stream": 1, "stream_options": {"include_usage": False, "x": 1}}, {"include_usage": True, "x": 1}),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, {"include_usage": True}),
        ({"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}, None),
        ({"stream": True, "stream_options": "wrong"}, None),
        ({"stream": False}, None),
        ({}, None),
    ],
)
def test_a_stream_is_asked_for_its_usage(fields: dict[str, Any], options: dict[str, Any] | None) -> None:
    """Once, and not what cannot be asked; all other fields stay what they are."""
    body = json.dumps({"model": "m", "prompt": "a b", "top_p": 0.10, **fields}).encode()
    asked = asking(CHAT, peek(body), body)
    assert asking("/v1/embeddings", peek(body), body) is None
    if options is None:
        assert asked is None
    else:
        assert asked is not None
        assert json.loads(asked) == {**json.loads(body), "stream_options": options}


def test_the_event_that_was_not_asked_for_is_taken_out() -> None:
    """However the stream is cut into pieces. Text that looks like usage, and pt's `usage: null`, are no such event."""
    stream = TEXT + TEXT[:-3] + b', "usage": null}\n\n' + USAGE + DONE
    assert without_usage(stream) == TEXT + TEXT + DONE
    for size in (1, 7, 50, 1000):
        meter = UsageMeter(is_hidden=True)
        pieces = [meter.feed(stream[at : at + size]) for at in range(0, len(stream), size)]
        assert b"".join(pieces) + meter.rest() == TEXT + TEXT + DONE
        assert meter.total_tokens() == 9
    shown = UsageMeter()
    assert shown.feed(stream) == stream


def test_a_stream_that_its_client_left_is_counted_by_its_events() -> None:
    """It was estimated at a few tokens, without `max_tokens`. The larger of the two counts."""
    meter = UsageMeter(prompt_tokens=10, is_hidden=True)
    for _ in range(500):
        meter.feed(TEXT)
    assert meter.total_tokens(estimate=10) == 510
    assert meter.total_tokens(estimate=16_000) is None


async def test_a_stream_by_route_is_charged_by_what_it_used(tmp_path: Path) -> None:
    """Its client, which asked for no usage, sees none; the engine is asked by a body of the right length."""
    asked: list[dict[str, Any]] = []

    async def engine(request: Request) -> Response:
        body = await request.body()
        assert int(request.headers["content-length"]) == len(body)
        asked.append(json.loads(body))

        async def pieces() -> AsyncIterator[bytes]:
            yield TEXT
            if (asked[-1].get("stream_options") or {}).get("include_usage"):
                yield USAGE
            yield DONE

        return StreamingResponse(pieces(), media_type="text/event-stream")

    app = Starlette(routes=[Route(f"{prefix}{CHAT}", engine, methods=["POST"]) for prefix in ("", "/models/m")])
    gate, limiter = make_gate(tmp_path, "tokens_per_minute: 1000")
    async with client(KeyedApp(app, gate, "m")) as http:
        plain = await http.post(CHAT, json={"stream": True}, headers=AUTH)
        wanted = await http.post(CHAT, json={"stream": True, "stream_options": {"include_usage": True}}, headers=AUTH)
    assert plain.content == TEXT + DONE
    assert wanted.content == TEXT + USAGE + DONE
    assert limiter.settled == [9, 9]
    unlimited, _ = make_gate(tmp_path, "requests_per_minute: 9")
    async with client(KeyedApp(app, unlimited, "m")) as http:
        await http.post(CHAT, json={"stream": True}, headers=AUTH)
    assert "stream_options" not in asked[-1]


@pytest.mark.parametrize("cut", [True, False])
async def test_a_stream_by_name_is_charged_by_what_it_used(tmp_path: Path, cut: bool) -> None:
    """As by route, whether or not an event is cut between two pieces, and where the stream breaks."""
    asked: list[dict[str, Any]] = []

    def reply(request: HttpRequest) -> tuple[int, list[Any]]:
        asked.append(json.loads(request.body))
        return 200, [TEXT, USAGE[:20], USAGE[20:] + DONE] if cut else [TEXT, USAGE + DONE]

    gate, limiter = make_gate(tmp_path, "tokens_per_minute: 1000")
    models = Models(m=reply)
    proxy = Proxy(RouterConfig(), models, models, RouterMetrics(), gate)  # type: ignore[arg-type]
    app = KeyedRouter(build_app(proxy, models, gate), gate)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router", headers=AUTH) as http:
        plain = await http.post(CHAT, json={"model": "m", "stream": True})
        wanted = await http.post(CHAT, json={"model": "m", "stream": True, "stream_options": {"include_usage": True}})
    assert asked[0]["stream_options"] == {"include_usage": True}
    assert plain.content.startswith(TEXT + DONE)
    assert wanted.content.startswith(TEXT + USAGE + DONE)
    assert limiter.settled == [9, 9]
