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
from serve_app.router.metrics import RouterMetrics
from serve_app.wire import usage as usage_module
from serve_app.wire.asgi import HttpRequest
from serve_app.wire.body import RequestBody
from serve_app.wire.usage import UsageMeter, asking, estimate_tokens, without_usage
from tests.access.test_gate import client
from tests.fakes import AUTH, Models, make_gate, router_app

CHAT = "/v1/chat/completions"
USAGE = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":2,"total_tokens":9,"completion_tokens":7}}\n\n'
TEXT = b'data: {"choices":[{"delta":{"content":"\\"usage\\": null} \\n\\n"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


def estimate(**fields: Any) -> int:
    """Without the body's own length."""
    seen = RequestBody(json.dumps({"model": "m", **fields}).encode()).peek()
    return estimate_tokens(0, seen.token_limit, seen.answers)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"max_tokens": 16000.0}, 16000),
        ({"max_tokens": "16000"}, 16000),
        ({"max_completion_tokens": 1, "max_tokens": 16000}, 16000),
        ({"max_completion_tokens": 16000, "max_tokens": 1}, 16000),
        ({"max_output_tokens": 16000, "max_tokens": 1}, 16000),
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
    body = RequestBody(json.dumps({"model": "m", "prompt": "a b", "top_p": 0.10, **fields}).encode())
    asked = asking(CHAT, body.peek(), body)
    assert asking("/v1/embeddings", body.peek(), body) is None
    if options is None:
        assert asked is None
    else:
        assert asked is not None
        assert json.loads(asked.content) == {**json.loads(body.content), "stream_options": options}


def test_the_event_that_was_not_asked_for_is_taken_out() -> None:
    """However the stream is cut into pieces. Text that looks like usage, and pt's `usage: null`, are no such event."""
    stream = TEXT + TEXT[:-3] + b', "usage": null}\n\n' + TEXT[:-3] + b',"usage":null}\n\n' + USAGE + DONE
    assert without_usage(stream) == TEXT * 3 + DONE
    for size in (1, 7, 50, 1000):
        meter = UsageMeter(is_hidden=True)
        pieces = [meter.feed(stream[at : at + size]) for at in range(0, len(stream), size)]
        assert b"".join(pieces) + meter.rest() == TEXT * 3 + DONE
        assert meter.total_tokens() == 9
    shown = UsageMeter()
    assert shown.feed(stream) == stream


# As vLLM writes it: what was asked for of the prompt comes behind the usage.
LONG = b'{"choices":[],"usage":{"prompt_tokens":2,"total_tokens":9,"completion_tokens":7},"prompt_token_ids":[%s]}' % (
    b",".join([b"1234"] * 2000)
)


@pytest.mark.parametrize("size", [1, 7, 63, 1000, 2**20])
def test_usage_is_found_wherever_it_stands(size: int) -> None:
    """However the answer is cut. Text in a string is none, and what a client wrote does not make it cheaper."""
    text = b'{"text":"\\"total_tokens\\": 99","tools":[{"total_tokens":1}],'
    for answer in (text + LONG[1:], LONG[:-1] + b"," + text[1:-1] + b"}"):
        meter = UsageMeter()
        for at in range(0, len(answer), size):
            meter.feed(answer[at : at + size])
        meter.rest()
        usage = meter.usage
        assert (meter.total_tokens(), usage.prompt, usage.completion) == (9, 2, 7)
        assert len(usage._end) <= 64


def test_an_event_in_many_pieces_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine may write long ones; looking at all of it with each piece would grow with its square."""
    searched: list[int] = []
    real = usage_module.without_usage
    monkeypatch.setattr(usage_module, "without_usage", lambda events: searched.append(len(events)) or real(events))
    meter = UsageMeter(is_hidden=True)
    for _ in range(1000):
        assert meter.feed(b"x" * 100 + b"\n") == b""
    assert meter.feed(b"\ndata: half").endswith(b"x\n\n")
    assert (searched, meter.rest()) == ([101_001], b"data: half")


def test_an_answer_without_a_usage_is_counted_by_its_length() -> None:
    """It would be free otherwise. What a client has put into a plain answer does not make it a stream."""
    meter = UsageMeter(prompt_tokens=10)
    meter.feed(b'{"echo": "data: {"}' + b" " * 4000)
    meter.rest()
    assert meter.total_tokens(estimate=10) == 10 + 4019 // 4
    assert meter.total_tokens(estimate=5000) is None


def test_an_answer_that_was_cut_costs_what_it_shows() -> None:
    """The usage comes last, so what was read before may be what the client wrote."""
    meter = UsageMeter(prompt_tokens=10)
    meter.feed(b'data: {"tools": [{"total_tokens": 1}]}\n\n' + TEXT * 100)
    assert meter.total_tokens(estimate=10) == 111
    meter.rest()
    assert meter.total_tokens(estimate=10) == 1


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


@pytest.mark.parametrize("way", ["by name", "by route"])
async def test_a_long_field_behind_the_usage_makes_no_answer_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Nor do the metrics miss it."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(RouterMetrics, "used", lambda _, __, usage: told.append((usage.prompt, usage.completion)))
    gate, limiter = make_gate(tmp_path, "tokens_per_minute: 1000")

    async def engine(_: Request) -> Response:
        return Response(LONG, media_type="application/json")

    if way == "by route":
        http = client(KeyedApp(Starlette(routes=[Route(CHAT, engine, methods=["POST"])]), gate, "m"))
    else:
        models = Models(m=lambda _: (200, [LONG]))
        app = KeyedRouter(router_app(models, models, gate)[1], gate)
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")
    async with http:
        assert (await http.post(CHAT, json={"model": "m"}, headers=AUTH)).content == LONG
    assert limiter.settled == [9]
    assert told == ([(2, 7)] if way == "by name" else [])


@pytest.mark.parametrize("cut", [True, False])
async def test_a_stream_by_name_is_charged_by_what_it_used(tmp_path: Path, cut: bool) -> None:
    """As by route, whether or not an event is cut between two pieces, and where the stream breaks."""
    asked: list[dict[str, Any]] = []

    def reply(request: HttpRequest) -> tuple[int, list[Any]]:
        asked.append(json.loads(request.body))
        return 200, [TEXT, USAGE[:20], USAGE[20:] + DONE] if cut else [TEXT, USAGE + DONE]

    gate, limiter = make_gate(tmp_path, "tokens_per_minute: 1000")
    models = Models(m=reply)
    app = KeyedRouter(router_app(models, models, gate)[1], gate)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router", headers=AUTH) as http:
        plain = await http.post(CHAT, json={"model": "m", "stream": True})
        wanted = await http.post(CHAT, json={"model": "m", "stream": True, "stream_options": {"include_usage": True}})
    assert asked[0]["stream_options"] == {"include_usage": True}
    assert plain.content.startswith(TEXT + DONE)
    assert wanted.content.startswith(TEXT + USAGE + DONE)
    assert limiter.settled == [9, 9]


def fed(*pieces: bytes) -> UsageMeter:
    """A meter that has read a whole answer."""
    meter = UsageMeter(prompt_tokens=3)
    for piece in pieces:
        meter.feed(piece)
    return meter


STARTED = b'event: message_start\ndata: {"message":{"usage":{"input_tokens":5,"output_tokens":0}}}\n\n'
ENDED = b'event: message_delta\ndata: {"usage":{"input_tokens":5,"cache_read_input_tokens":4,"output_tokens":7}}\n\n'


def test_usage_of_messages_is_the_sum_of_its_parts() -> None:
    """Anthropic's usage has no total, and what a cache had is not part of the input."""
    for pieces in ([STARTED, ENDED], [STARTED + ENDED], [bytes([byte]) for byte in STARTED + ENDED]):
        meter = fed(*pieces)
        meter.rest()
        assert (meter.total_tokens(), meter.usage.prompt, meter.usage.completion) == (16, 9, 7)
    meter = fed(STARTED.replace(b":5", b":9"), ENDED)
    assert meter.usage.total == 16, "what a cache had is known later"
    used = b'"usage":{"input_tokens":5,"output_tokens":7}}'
    call = b'{"content":[{"type":"tool_use","input":{"input_tokens":0,"output_tokens":0,"total_tokens":1}}],'
    for answer in (call + used, b"{" + used[:-1] + b"," + call[1:-1] + b"}"):
        meter = fed(answer)
        meter.rest()
        assert meter.total_tokens() == 12, "what a model wrote does not make it cheaper"


def test_a_stream_of_messages_that_was_cut_is_counted_by_its_events() -> None:
    """Its first event has the input alone."""
    meter = fed(STARTED, *[b'event: x\ndata: {"delta":{"text":"a"}}\n\n'] * 100)
    assert meter.total_tokens(estimate=10) == 3 + 101
    meter.rest()
    assert meter.total_tokens(estimate=10) == 3 + 101


def test_usage_of_responses() -> None:
    """It has other names, and a total."""
    details = b'"input_tokens_details":{"cached_tokens":2},"output_tokens_details":{"reasoning_tokens":3}'
    meter = fed(b'{"usage":{"input_tokens":5,"output_tokens":7,"total_tokens":12,' + details + b"}}")
    meter.rest()
    assert (meter.total_tokens(), meter.usage.prompt, meter.usage.completion) == (12, 5, 7)


REPEATED = b'{"tools":[{"parameters":{"total_tokens":1,"prompt_tokens":0,"completion_tokens":0}}]}'


@pytest.mark.parametrize(
    "failure",
    [
        b'event: error\ndata: {"type":"error","message":"x"}\n\n',
        b'event: response.failed\ndata: {"type":"response.failed","response":{}}\n\n',
        b'data: {"error":{"message":"x"}}\n\n',
    ],
)
def test_a_stream_that_failed_costs_no_less_than_it_shows(failure: bytes) -> None:
    """It has no usage but what it repeats of the request, which the client chose."""
    created = b"event: response.created\ndata: " + REPEATED + b"\n\n"
    deltas = b'event: x\ndata: {"delta":"a"}\n\n' * 500
    whole = created + deltas + failure
    for pieces in ([created, deltas, failure], [whole], [whole[: 1 - len(failure)], whole[1 - len(failure) :]]):
        meter = fed(*pieces)
        meter.rest()
        assert meter.usage.total == 1
        assert (meter.total_tokens() or 0) >= 3 + 501


def test_text_that_looks_like_a_failure_is_text() -> None:
    """JSON escapes the ends of lines, so no text of a client or model begins a line."""
    text = json.dumps({"delta": '\nevent: error\ndata: {"error": 1}'}).encode()
    meter = fed(b"event: x\ndata: " + text + b"\n\n", b'data: {"usage":{"total_tokens":2}}\n\n')
    meter.rest()
    assert meter.total_tokens() == 2
