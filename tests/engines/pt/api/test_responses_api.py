"""OpenAI's own client against pt's Responses API: whole, streamed, with tools and formats, and what is refused."""

import json
import threading
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx
import httpx2
import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel
from transformers import AutoTokenizer

from serve_app.engines.pt.api import responses_form
from serve_app.engines.pt.api.job import ContentLogprobs, Job, WholeChoice
from serve_app.engines.pt.api.messages_form import MessagesForm
from serve_app.engines.pt.api.protocol import ChatRequest
from serve_app.engines.pt.api.reasoning import Tags, ThinkReader
from serve_app.engines.pt.api.responses_form import ResponsesForm
from serve_app.engines.pt.api.tool_calls import Delta, PlainReader
from serve_app.engines.pt.core.sequence import Logprobs, Piece
from serve_app.engines.pt.engine import PtEngine
from serve_app.errors import InvalidRequest
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.demo_answers import ANSWERS, QUESTIONS
from tests.engines.pt.api_client import chat

QUESTION = QUESTIONS[0]
TOPICS = ["router", "backends"]
TOOL: Any = {
    "type": "function",
    "name": "look_up",
    "description": "Looks a topic up.",
    "parameters": {
        "type": "object",
        "properties": {"topic": {"enum": TOPICS}},
        "required": ["topic"],
        "additionalProperties": False,
    },
    "strict": True,
}


LONG_TOOL: Any = TOOL | {"description": "x" * 2**20}


def ask(given: Any = QUESTION, **fields: Any) -> dict[str, Any]:
    """A greedy request."""
    return {"model": "demo", "temperature": 0, "input": given, **fields}


@pytest_asyncio.fixture(loop_scope="module")
async def gpt(engine: PtEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client."""
    transport = httpx2.ASGITransport(app=engine.application)  # type: ignore[attr-defined]
    session = openai.DefaultAsyncHttpxClient(transport=transport)
    async with openai.AsyncOpenAI(
        api_key="none", base_url="http://pt/v1", http_client=session, max_retries=0
    ) as client:
        yield client


async def test_a_whole_response(gpt: openai.AsyncOpenAI) -> None:
    """It has the trained answer and what it used, and says that nothing is stored."""
    response = await gpt.responses.create(**ask(max_output_tokens=200, metadata={"a": "b"}))
    assert response.output_text == ANSWERS[QUESTION]
    assert (response.object, response.status, response.model, response.error) == ("response", "completed", "demo", None)
    assert response.model_extra is not None
    assert response.to_dict()["store"] is False
    assert (response.temperature, response.max_output_tokens, response.metadata) == (0, 200, {"a": "b"})
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


async def test_a_stream_has_the_same_response(gpt: openai.AsyncOpenAI) -> None:
    """Its events come in their order, each with its number."""
    whole = await gpt.responses.create(**ask())
    stream: Any = await gpt.responses.create(**ask(stream=True))
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 5, "a stream comes in pieces"
    assert "".join(event.delta for event in deltas) == whole.output_text
    assert [event.type.removeprefix("response.") for event in events if event not in deltas] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.done", "content_part.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    final = events[-1].response
    assert final.id == events[0].response.id
    assert (final.output_text, final.usage, final.status) == (whole.output_text, whole.usage, "completed")
    assert {event.item_id for event in deltas} == {final.output[0].id}


async def test_a_response_that_is_cut(gpt: openai.AsyncOpenAI) -> None:
    """Says so, whole and streamed."""
    whole = await gpt.responses.create(**ask(max_output_tokens=3))
    stream: Any = await gpt.responses.create(**ask(max_output_tokens=3, stream=True))
    last = [event async for event in stream][-1]
    assert last.type == "response.incomplete"
    for response in (whole, last.response):
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert response.usage.output_tokens == 3
        assert response.output[0].status == "incomplete"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "look_up"}])
async def test_a_call(gpt: openai.AsyncOpenAI, choice: Any) -> None:
    """Whole and streamed, and its output goes back with the items of the answer."""
    asked = ask(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    response = await gpt.responses.create(**asked)
    call = response.output[0]
    assert call.type == "function_call"
    assert (call.name, call.status) == ("look_up", "completed")
    assert json.loads(call.arguments)["topic"] in TOPICS
    stream: Any = await gpt.responses.create(**asked, stream=True)
    events = [event async for event in stream]
    parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert json.loads("".join(parts)) == json.loads(done.arguments) == json.loads(call.arguments)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "It routes."}
    items = [{"role": "user", "content": QUESTION}, *(item.to_dict() for item in response.output), output]
    longer = await gpt.responses.create(**ask(items))
    assert longer.usage is not None
    assert response.usage is not None
    assert longer.usage.input_tokens > response.usage.input_tokens


class Topic(BaseModel):
    """What is asked for."""

    topic: Literal["router", "backends"]


async def test_a_format_is_parsed(gpt: openai.AsyncOpenAI) -> None:
    """By the client's own helper, whole and streamed."""
    response = await gpt.responses.parse(**ask(), text_format=Topic)
    assert response.output_parsed is not None
    assert response.output_parsed.topic in TOPICS
    async with gpt.responses.stream(**ask(), text_format=Topic) as stream:
        final = await stream.get_final_response()
    assert final.output_parsed == response.output_parsed
    loose = await gpt.responses.create(**ask(max_output_tokens=20, text={"format": {"type": "json_object"}}))
    assert loose.output_text.lstrip().startswith("{")


async def test_the_items_of_an_input(gpt: openai.AsyncOpenAI) -> None:
    """Parts, instructions, developers and earlier answers are messages of the template."""
    part = {"type": "input_text", "text": QUESTION}
    texts = await gpt.responses.create(**ask([{"role": "user", "content": [part]}]))
    assert texts.output_text == ANSWERS[QUESTION]
    system = "You are a helpful assistant."
    counts = []
    for fields in (
        ask(instructions=system),
        ask([{"role": "developer", "content": system}, {"role": "user", "content": QUESTION}]),
        ask([{"type": "message", "role": "system", "content": system}, {"role": "user", "content": QUESTION}]),
    ):
        response = await gpt.responses.create(**fields)
        assert response.output_text == ANSWERS[QUESTION]
        assert response.usage is not None
        counts.append(response.usage.input_tokens)
    assert len(set(counts)) == 1
    earlier = [{"role": "user", "content": "Hello"}, *(item.to_dict() for item in texts.output)]
    again = await gpt.responses.create(**ask([*earlier, {"role": "user", "content": QUESTION}]))
    assert again.usage is not None
    assert again.usage.input_tokens > counts[0]


async def test_log_probabilities(gpt: openai.AsyncOpenAI) -> None:
    """Of the text's tokens, whole and streamed."""
    asked = ask(include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=8)
    whole: Any = await gpt.responses.create(**asked)
    entries = whole.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries) == whole.output_text
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    stream: Any = await gpt.responses.create(**asked, stream=True)
    parts = [event.logprobs async for event in stream if event.type == "response.output_text.delta"]
    assert [entry.token for part in parts for entry in part] == [entry.token for entry in entries]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"previous_response_id": "resp_x"}, "previous_response_id", "nothing is stored"),
        ({"conversation": "conv_x"}, "conversation", "nothing is stored"),
        ({"background": True}, "background", "stream it"),
        ({"metadata": {"a": "b" * 513}}, "metadata", "at most 512 characters"),
        ({"metadata": {str(number): "b" for number in range(17)}}, "metadata", "at most 16 items"),
        ({"input": [{"role": "user", "content": [{"type": ["x"], "text": "a"}]}]}, "input", "input[0].content[0]"),
        ({"prompt": {"id": "x"}}, "prompt", "'instructions'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "Send the item itself"),
        ({"input": [{"type": "computer_call"}]}, "input", "'computer_call'"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input", "'nobody'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "input[0].content[0]"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input", "encrypted_content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", "input[0]"),
        ({"input": []}, "input", "'input'"),
        ({"input": "x" * 100_000}, "input", "'input' has"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{"}]}, "input", "JSON"),
        ({"tools": [{"type": "web_search"}]}, "tools", "'web_search'"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "'allowed_tools'"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "no tool 'g'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"truncation": "auto"}, "truncation", "'truncation'"),
        ({"text": {"format": {"type": "json_schema"}}}, None, "schema"),
        ({"text": {"verbosity": "loud"}}, "text", "verbosity"),
        ({"max_tool_calls": "x" * 100}, "max_tool_calls", "integer"),
        ({"tools": [LONG_TOOL], "tool_choice": "none"}, "tools", "at most 262144 bytes"),
        ({"text": {"format": {"type": "text", "description": "x" * 2**20}}}, "text", "at most 262144 bytes"),
        ({"reasoning": {"summary": "x" * 2**20}}, "reasoning", "at most 262144 bytes"),
        ({"max_output_tokens": 0}, "max_output_tokens", "'max_output_tokens'"),
        ({"max_output_tokens": 100_000}, "max_output_tokens", "maximum context length"),
        ({"top_q": 1}, "top_q", "Did you mean 'top_p'"),
        ({"messages": []}, "messages", "Unknown field"),
    ],
)
async def test_what_is_refused_is_named(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str | None, says: str
) -> None:
    """In OpenAI's form, under this API's names."""
    reply = await client.post("/v1/responses", json=ask(**fields) if "input" not in fields else ask() | fields)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param or param is None
    assert says in error["message"]


async def test_what_agents_send_changes_nothing(gpt: openai.AsyncOpenAI) -> None:
    """`store` is true where it is left out, and others are bookkeeping."""
    response = await gpt.responses.create(
        **ask(store=True, include=["reasoning.encrypted_content"], reasoning={"effort": "low", "summary": "auto"}),
        parallel_tool_calls=True,
        truncation="disabled",
        prompt_cache_key="x",
    )
    assert response.output_text == ANSWERS[QUESTION]


async def test_what_agents_hint_at_changes_nothing(gpt: openai.AsyncOpenAI) -> None:
    """No model here was trained on how long an answer should be."""
    response = await gpt.responses.create(**ask(text={"verbosity": "low"}, max_tool_calls=3))
    assert response.output_text == ANSWERS[QUESTION]
    assert (response.to_dict()["max_tool_calls"], response.to_dict()["text"]) == (3, {"verbosity": "low"})


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
async def test_events_are_padded_on_demand(client: httpx.AsyncClient, path: str) -> None:
    """Text and padding together have one of few lengths."""
    body = ask(stream=True, stream_options={"include_obfuscation": True}) | chat(QUESTION, stream=True)
    del body["messages" if path == "/v1/responses" else "input"]
    body = {name: value for name, value in body.items() if name != "max_tokens"}
    text = (await client.post(path, json=body)).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    if path == "/v1/responses":
        padded = [(event["delta"], event["obfuscation"]) for event in events if "delta" in event]
        assert not any("obfuscation" in event for event in events if "delta" not in event)
    else:
        padded = [(event["choices"][0]["delta"].get("content") or "", event["obfuscation"]) for event in events]
    assert "".join(delta for delta, _ in padded) == ANSWERS[QUESTION]
    assert {len((delta + padding).encode()) % 32 for delta, padding in padded} == {0}
    assert len({padding for _, padding in padded}) > 1


async def test_long_fields_are_repeated_beside_the_event_loop(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are not part of the prompt, whole and streamed: one request must not hold up the tokens of others."""
    tools = [TOOL | {"name": f"f{number}", "description": "x" * 2000} for number in range(100)]
    threads: list[str] = []
    encode = responses_form.named_events

    def watched(events: Any) -> bytes:
        events = list(events)
        if any("response" in event for event in events):
            threads.append(threading.current_thread().name)
        return encode(events)

    monkeypatch.setattr(responses_form, "named_events", watched)
    asked = ask(tools=tools, tool_choice="none", max_output_tokens=4)
    text = (await client.post("/v1/responses", json=asked | {"stream": True})).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    repeating = [event["response"] for event in events if "response" in event]
    assert [len(response["tools"]) for response in repeating] == [100] * 3
    assert repeating[0]["tools"] == tools
    assert len(threads) == 2
    assert all(name.startswith("answers") for name in threads)
    whole = (await client.post("/v1/responses", json=asked)).json()
    assert (whole["tools"], whole["tool_choice"]) == (tools, "none")


async def test_an_error_in_a_stream_has_the_names_of_this_api(client: httpx.AsyncClient) -> None:
    """As one before the stream."""
    error = InvalidRequest("'messages' has too much.", param="messages")
    form = ResponsesForm(AutoTokenizer.from_pretrained(model_path(DEMO_MODEL)), {})
    event = form.events(some_job()).failed(error).decode()
    assert "'input' has too much" in event
    error = InvalidRequest("'stop' has too much.", param="stop")
    assert '"param":"stop_sequences"' in MessagesForm().events(some_job()).failed(error).decode()


def some_job() -> Job:
    """A job of a chat."""
    request = ChatRequest.read({"messages": [{"role": "user", "content": "x"}]})
    return Job(request, [[1]], request.sampling(5, None), [], [""], "m")


@pytest.mark.parametrize("text", ["<think> hm </think> yes !", "<th ink>hm</thi nk> yes !"])
def test_log_probabilities_of_the_thinking_are_not_those_of_the_text(text: str) -> None:
    """The tags belong to the thinking too, though no text of them comes out."""
    reader = ThinkReader(PlainReader(), Tags("<think>", "</think>"), "")
    whole, streamed = WholeChoice(), ContentLogprobs()
    found = []
    pieces = text.split(" ")
    for number, part in enumerate(pieces):
        piece = Piece(part, number + 1, logprobs=(Logprobs(number, -1.0),))
        delta = reader.feed(part)
        whole.add(piece, delta)
        found += streamed.add(piece, delta)
    assert (
        [item.token_id for item in found]
        == [item.token_id for item in whole.content_logprobs]
        == [len(pieces) - 2, len(pieces) - 1]
    )
    assert len(whole.logprobs) == len(pieces), "chat completions show all of them"


def test_a_long_item_that_ends_within_a_stream_is_written_beside_the_event_loop() -> None:
    """Its text comes three times more when the next item begins."""
    writer: Any = ResponsesForm(AutoTokenizer.from_pretrained(model_path(DEMO_MODEL)), {}).events(some_job())
    writer.begin()
    thought = Delta(reasoning="x" * 100_000)
    assert writer.weight(thought) == 0
    writer.add(0, Piece("", 1), thought)
    assert writer.weight(thought) == 0
    assert writer.weight(Delta("yes")) == 100_000
    assert writer.weight(None) == 100_000
