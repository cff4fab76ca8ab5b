"""Bodies are counted before they are built, and wrong ones are refused at the first error."""

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve_app.engines.pt.api import openai_api
from serve_app.engines.pt.api.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest
from serve_app.engines.pt.engine import PtEngine
from serve_app.engines.workers import MOST_WAITING_LARGE, SMALL_BYTES, Workers
from serve_app.errors import InvalidRequest, Overloaded
from serve_app.wire import census as body_module
from serve_app.wire.census import Census, census, decode_body
from tests.engines.pt.api_client import chat

STRINGS = st.text(alphabet='a"\\,:[{é', max_size=6)
DOCUMENTS = st.recursive(
    st.none() | st.integers() | STRINGS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(STRINGS, inner, max_size=4),
    max_leaves=30,
)


def counted(document: Any) -> Census:
    """The census of a decoded document."""
    if isinstance(document, list | dict):
        inner = [counted(item) for item in (document.values() if isinstance(document, dict) else document)]
        keys = len(document) if isinstance(document, dict) else 0
        return Census(
            1 + keys + sum(item.parts for item in inner),
            max(0, len(document) - 1) + sum(item.items for item in inner),
        )
    return Census(0, 0)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**20])
@settings(deadline=None)
@given(document=DOCUMENTS)
def test_the_census_is_exact(chunk: int, document: Any) -> None:
    """Quotes, backslashes and marks in strings count for nothing, wherever a chunk ends."""
    usual, body_module.CHUNK_BYTES = body_module.CHUNK_BYTES, chunk
    try:
        assert census(json.dumps(document, ensure_ascii=False).encode()) == counted(document)
    finally:
        body_module.CHUNK_BYTES = usual


@pytest.mark.parametrize("document", [{"prompt": [{}] * 60_000}, {"prompt": [1] * 1_100_000}, {"x": [[]] * 60_000}])
def test_a_body_of_too_many_values_is_never_decoded(document: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding holds up every other thread."""
    monkeypatch.setattr(body_module.msgspec.json, "decode", None)
    with pytest.raises(InvalidRequest, match="Send several requests"):
        decode_body(json.dumps(document).encode())


def test_a_long_text_of_marks_is_no_crowd_of_values() -> None:
    """Code and data are texts too."""
    document = {"prompt": '{"a": [1, 2], "b": {}}' * 50_000}
    assert decode_body(json.dumps(document).encode()) == document


WRONG = [
    (CompletionRequest, {"prompt": [{}] * 20_000}),
    (CompletionRequest, {"prompt": ["a", *[1] * 20_000]}),
    (CompletionRequest, {"prompt": [[1, "a"]] * 20_000}),
    (EmbeddingRequest, {"input": [None] * 20_000}),
    (EmbeddingRequest, {"input": [[[]]] * 20_000}),
    (DetokenizeRequest, {"tokens": ["a"] * 20_000}),
    (ChatRequest, {"messages": [{}] * 4000}),
    (ChatRequest, {"messages": [{"role": "user"}] * 20_000}),
    (ChatRequest, {"messages": [{"role": "user", "content": [1] * 20_000}]}),
    (ChatRequest, chat(tools=[{}] * 20_000)),
    (ChatRequest, chat(tools=[{"type": "function", "function": {"name": "f"}, **{str(n): 1 for n in range(20_000)}}])),
    (ChatRequest, chat(stop=[1] * 20_000)),
    (ChatRequest, chat(stop="a" * 20_000)),
    (ChatRequest, chat(logit_bias={str(n): "x" for n in range(20_000)})),
    (ChatRequest, chat(stream=True, stream_options={str(n): 1 for n in range(20_000)})),
    (ChatRequest, chat(response_format={"type": "text", **{str(n): 1 for n in range(20_000)}})),
    (ChatRequest, chat(structured_outputs={"choice": [1] * 20_000})),
    (ChatRequest, chat(tool_choice={str(n): 1 for n in range(20_000)})),
    (ChatRequest, chat(**{str(n): 1 for n in range(20_000)})),
]


@pytest.mark.parametrize(("model", "document"), WRONG, ids=lambda value: str(value)[:60])
def test_checking_ends_at_the_first_errors(model: Any, document: Any) -> None:
    """pydantic would keep one or more errors of each item."""
    with pytest.raises(InvalidRequest) as refused:
        model.read(document)
    assert refused.value.param
    assert len(refused.value.message) < 400
    assert errors_of(model, document) <= 8


def errors_of(model: Any, document: Any) -> int:
    """How many errors pydantic keeps for the fields that there are."""
    try:
        model.model_validate({name: value for name, value in document.items() if name in model.model_fields})
    except ValidationError as error:
        return error.error_count()
    return 0


async def test_the_bodies_of_requests_are_read_and_answers_written_on_threads(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding, checks, template, tokens: none of it on the event loop."""
    loop_thread, seen = threading.get_ident(), set()

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.add((name, threading.get_ident() == loop_thread))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(openai_api, "decode_body")
    for name in ("of_chat", "of_texts", "of_text", "text_of", "check_ids"):
        watch(openai_api.Prompts, name)
    for path, body in (
        ("/v1/chat/completions", chat(max_tokens=2)),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
        ("/v1/embeddings", {"input": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", chat(max_tokens=2)),
        ("/detokenize", {"tokens": [5]}),
    ):
        assert (await client.post(path, json=body)).status_code == 200
    assert {name for name, _ in seen} == {"decode_body", "of_chat", "of_texts", "of_text", "text_of", "check_ids"}
    assert not any(on_loop for _, on_loop in seen)


@pytest.mark.parametrize("size", [5000, 20_000])
async def test_choices_are_counted_before_anything_is_built(
    engine: PtEngine, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Prompts times `n`: no prompt is tokenised where the model could never take them all."""
    monkeypatch.setattr(openai_api.Prompts, "of_texts", None)
    reply = await client.post("/v1/completions", json={"prompt": ["a"] * size, "n": 128})
    assert reply.status_code == 400
    assert f"asks for {size * 128} sequences" in reply.json()["error"]["message"]
    assert engine.generator.in_flight == 0


async def test_tokenize_refuses_what_no_prompt_could_be(client: httpx.AsyncClient) -> None:
    """As completions do, before the work."""
    for path, body in (("/tokenize", {"prompt": "x" * 10**6}), ("/detokenize", {"tokens": [5] * 100_000})):
        reply = await client.post(path, json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_large_work_waits_within_a_bound_and_holds_up_no_small_work() -> None:
    """One lane for each."""
    workers, gate = Workers(), threading.Event()
    waiting = [asyncio.create_task(workers.run(SMALL_BYTES + 1, gate.wait)) for _ in range(MOST_WAITING_LARGE)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await workers.run(SMALL_BYTES + 1, gate.wait)
    assert await workers.run(1, lambda: "small") == "small"
    waiting[-1].cancel()  # Its client has left, so another's work may wait.
    await asyncio.gather(waiting[-1], return_exceptions=True)
    await asyncio.sleep(0)
    last = asyncio.create_task(workers.run(SMALL_BYTES + 1, lambda: "large"))
    await asyncio.sleep(0)
    gate.set()
    assert await last == "large"
    await asyncio.gather(*waiting[:-1])
