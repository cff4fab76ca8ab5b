"""OpenAI's own client against pt's Responses API: whole, streamed, with tools and formats, and what is refused."""

import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx
import httpx2
import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel

from serve_app.engines.pt.engine import PtEngine
from tests.demo_answers import ANSWERS, QUESTIONS

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
        ({"text": {"verbosity": "low"}}, "text", "verbosity"),
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
