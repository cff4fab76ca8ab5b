"""Requests that are wrong, huge or abandoned: each gets the right 4xx, and the next good one its usual answer, in the
same steps of the engine as before."""

import asyncio
import itertools
import json
import time
import typing
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from serve_app.engines.pt.api import conversation
from serve_app.engines.pt.api.conversation import with_read_arguments
from serve_app.engines.pt.api.protocol import ChatRequest, CompletionRequest
from serve_app.engines.pt.api.tool_calls import CallListReader
from serve_app.engines.pt.engine import PtEngine
from serve_app.errors import InvalidRequest
from serve_app.wire.census import MOST_PARTS
from tests.demo_answers import ANSWERS
from tests.engines.pt.api_client import chat

# Seconds that a good request may take, as in the tests with a cluster. It takes 0.02 where nothing else runs.
MOST_WAIT_S = 2.0


@pytest.fixture
def decoded(engine: PtEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences in each of the engine's steps from now on."""
    runner, rows = engine._runner, list[int]()
    assert runner is not None
    decode = runner.decode

    def counted(sequences: Sequence[Any]) -> Any:
        rows.append(len(sequences))
        return decode(sequences)

    monkeypatch.setattr(runner, "decode", counted)
    return rows


async def good(client: httpx.AsyncClient, decoded: list[int]) -> list[int]:
    """The steps of a good request, which must be answered rightly and in time."""
    decoded.clear()
    start = time.monotonic()
    reply = await client.post("/v1/chat/completions", json=chat())
    assert time.monotonic() - start < MOST_WAIT_S
    assert reply.json()["choices"][0]["message"]["content"] == ANSWERS["Hello"]
    return list(decoded)


def wrong_types() -> list[tuple[str, dict[str, Any]]]:
    """For each field of both endpoints a value of each JSON type, as far as the field does not take it."""
    values = ["wrong", -3.5, True, {"wrong": [1]}, [{"wrong": 1}], [[["wrong"]]], "\ud83d"]
    bodies = []
    for path, model, base in (
        ("chat/completions", ChatRequest, chat()),
        ("completions", CompletionRequest, {"prompt": "Hello", "temperature": 0, "max_tokens": 4}),
    ):
        for name in typing.cast(Any, model).model_fields:
            bodies += [(path, base | {name: value}) for value in values]
    return bodies


async def test_every_field_of_a_wrong_type(client: httpx.AsyncClient, decoded: list[int]) -> None:
    """Answered or refused by name, never a 500; where it is refused, the field is named."""
    usual = await good(client, decoded)
    refused = 0
    for path, body in wrong_types():
        payload = json.dumps(body | {"max_tokens": body.get("max_tokens", 4)})
        reply = await client.post(f"/v1/{path}", content=payload, headers={"content-type": "application/json"})
        assert reply.status_code in (200, 400, 404), f"{payload}: {reply.text}"
        if reply.status_code != 200:
            refused += 1
            error = reply.json()["error"]
            assert error["message"], payload
            assert error["param"] or "JSON" in error["message"], f"{payload}: {error}"
    assert refused > 200
    assert await good(client, decoded) == usual


@pytest.mark.parametrize(
    ("payload", "status"),
    [
        (json.dumps(chat(temperature=-1)), 400),
        (json.dumps(chat(temperature=float("nan"))), 400),
        (json.dumps(chat(top_p=float("inf"))), 400),
        (json.dumps(chat()).replace('"temperature": 0', '"temperature": 1e999'), 400),
        (json.dumps(chat(max_tokens=10**9)), 400),
        (json.dumps(chat(seed=10**30)), 400),
        (json.dumps(chat(n=10**6)), 400),
        (json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]}), 400),
        (json.dumps({"messages": [{"role": "user", "content": " "}] * 100_000}), 400),
        (json.dumps(chat(stop=["\ud83d", "\ude00"])), 400),
        (json.dumps(chat(stop=["x"] * 100)), 400),
        ('{"messages": ' + "[" * 100_000, 400),
        (b"\xff\xfe{}", 400),
        ("", 400),
        (json.dumps(chat(logit_bias={str(number): 1 for number in range(100_000)})), 400),
    ],
    ids=lambda value: str(value)[:48],
)
async def test_numbers_and_sizes_out_of_bounds(
    client: httpx.AsyncClient, decoded: list[int], payload: str | bytes, status: int
) -> None:
    """Refused before anything reaches the batch."""
    usual = await good(client, decoded)
    reply = await client.post(
        "/v1/chat/completions", content=payload, headers={"content-type": "application/json"}, timeout=60
    )
    assert reply.status_code == status, reply.text[:300]
    assert reply.json()["error"]["message"]
    assert await good(client, decoded) == usual


async def test_an_empty_prompt(client: httpx.AsyncClient, decoded: list[int]) -> None:
    """A text needs a token to begin with."""
    for prompt in ("", [], [""], [[]]):
        assert (await client.post("/v1/completions", json={"prompt": prompt})).status_code == 400
    await good(client, decoded)


async def test_stops_that_cut_a_character(client: httpx.AsyncClient) -> None:
    """A stop string of a character that spans several tokens, and one that combines with what stands before."""
    for stop in ("é", "\N{COMBINING ACUTE ACCENT}", "\N{GRINNING FACE}", "\N{REPLACEMENT CHARACTER}"):
        reply = await client.post("/v1/chat/completions", json=chat(stop=[stop]))
        assert reply.json()["choices"][0]["message"]["content"] == ANSWERS["Hello"].split(stop)[0]


async def test_a_hundred_clients_that_leave_after_one_token(
    engine: PtEngine, client: httpx.AsyncClient, decoded: list[int]
) -> None:
    """Streaming, through the application: each frees its place before the next step, so the next good request has its
    usual steps."""
    usual = await good(client, decoded)

    async def leave_early(number: int) -> None:
        body = json.dumps(chat(stream=True, max_tokens=1000, ignore_eos=True)).encode()
        left = asyncio.Event()
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if b"delta" in message.get("body", b"") and b'"role"' not in message["body"]:
                left.set()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await asyncio.wait_for(engine.application(scope, receive, send), 60)  # type: ignore[attr-defined]
        assert left.is_set(), number

    await asyncio.gather(*map(leave_early, range(100)))
    assert not engine.generator._outputs
    steps = await good(client, decoded)
    assert steps[-len(usual) :] == usual
    assert len(steps) <= len(usual) + 1  # One was under way when the last ones left.


def nested(levels: int, opening: str = "[", closing: str = "]") -> str:
    """JSON of so many levels."""
    return opening * levels + closing * levels


def with_arguments(arguments: str) -> dict[str, Any]:
    """A conversation in which a tool was called with these arguments, a JSON text in a string."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {**chat(max_tokens=2), "messages": [{"role": "user", "content": "Hello"}, said]}


TOOL = '{"type": "function", "function": {"name": "f", "parameters": %s}}'
OBJECTS = ('{"a":', "}")


# More than may be; than pydantic serialises (255); than Python's frames (1000); than any parser takes.
DEEP = (101, 300, 900, 100_000)


def test_the_arguments_of_all_calls_are_counted_before_one_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding holds up every other thread, and the body's own count takes each of them for one text."""
    monkeypatch.setattr(conversation, "decode_counted", None)
    half = "[" + "[]," * (MOST_PARTS // 2) + "[]]"
    messages = with_arguments(half)["messages"]
    messages[1]["tool_calls"] *= 2
    for crowded in (messages, [*with_arguments(half)["messages"]] * 2):
        with pytest.raises(InvalidRequest, match="arguments of tool calls has 500") as refused:
            with_read_arguments(crowded)
        assert refused.value.param == "messages"


async def test_arguments_that_cannot_fit_are_not_read(client: httpx.AsyncClient) -> None:
    """Their characters are counted first, so nobody finds out that they are no JSON."""
    for path in ("v1/chat/completions", "tokenize"):
        reply = await client.post(f"/{path}", json=with_arguments("[" * 10**6))
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_arguments_of_a_call_nested_too_deep(client: httpx.AsyncClient) -> None:
    """They are JSON within JSON, so the body itself is flat; the field is named."""
    for path, levels in itertools.product(("v1/chat/completions", "tokenize"), (*DEEP[:-1], 5000)):
        reply = await client.post(f"/{path}", json=with_arguments(nested(levels)))
        assert reply.status_code == 400, reply.text[:300]
        error = reply.json()["error"]
        assert error["param"] == "messages"
        assert error["message"].startswith("messages[1].tool_calls: ")
        assert "nested more than 100 levels deep" in error["message"]
    assert (await client.post("/v1/chat/completions", json=with_arguments(nested(60)))).status_code == 200


@pytest.mark.parametrize(
    "field",
    [
        '"chat_template_kwargs": {"x": %s}',
        '"tools": [' + TOOL + "]",
        '"tools": [' + TOOL + '], "tool_choice": "required"',
        '"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": %s}}',
        '"structured_outputs": {"json": %s}',
        '"logit_bias": %s',
        '"unknown": %s',
    ],
)
async def test_a_body_nested_too_deep(client: httpx.AsyncClient, field: str) -> None:
    """Whatever the field is, and whichever later step would recurse: pydantic, json, the template or the grammar."""
    for levels in DEEP:
        value = '{"a":' * levels + "1" + "}" * levels
        body = json.dumps(chat(max_tokens=2))[:-1] + ", " + field % value + "}"
        reply = await client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400, reply.text[:300]
        told = reply.json()["error"]["message"]
        assert "nested more than 100 levels deep" in told or "lists, objects and keys" in told


async def test_a_schema_in_a_string_nested_too_deep(client: httpx.AsyncClient) -> None:
    """It is JSON within JSON too, also where a value of it is deep and not the schema."""
    for schema in (nested(2_000), '{"const": ' + nested(900) + "}", '{"const": ' + nested(100_000) + "}"):
        reply = await client.post("/v1/chat/completions", json=chat(structured_outputs={"json": schema}))
        assert reply.status_code == 400, reply.text[:300]
        assert reply.json()["error"]["param"] == "structured_outputs"


async def test_deep_values_that_are_allowed(client: httpx.AsyncClient) -> None:
    """Every step takes the 100 levels that a body may have."""
    value = json.loads('{"a":' * 90 + "1" + "}" * 90)
    for fields in ({"chat_template_kwargs": value}, {"metadata": value}):
        reply = await client.post("/v1/chat/completions", json=chat(max_tokens=2, **fields))
        assert reply.status_code == 200, reply.text[:300]


def test_calls_that_a_model_nests_too_deep_are_text() -> None:
    """A grammar with a recursive schema lets it; the answer is text then, and no error."""
    reader = CallListReader()
    text = '[{"name": "f", "arguments": ' + nested(5_000, *OBJECTS).replace(":}", ":1}", 1) + "}]"
    assert not reader.feed(text).calls
    assert reader.finish().content == text
