"""Anthropic's own client against pt: whole messages, streams, tools, errors and counted tokens."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import httpx2
import pytest
import pytest_asyncio

from serve_app.engines.pt.api.conversation import with_joined_text
from serve_app.engines.pt.api.job import Job, WholeChoice
from serve_app.engines.pt.api.messages_form import MessagesForm
from serve_app.engines.pt.api.protocol import ChatRequest
from serve_app.engines.pt.api.tool_calls import Delta, ToolCall
from serve_app.engines.pt.core.sequence import Piece
from serve_app.engines.pt.engine import PtEngine
from tests.demo_answers import ANSWERS, QUESTIONS
from tests.engines.pt.conftest import demo_engine

QUESTION = QUESTIONS[0]
TOPICS = ["router", "backends"]
TOOL: Any = {
    "name": "look_up",
    "description": "Looks a topic up.",
    "input_schema": {
        "type": "object",
        "properties": {"topic": {"enum": TOPICS}},
        "required": ["topic"],
        "additionalProperties": False,
    },
}


def ask(question: str = QUESTION, **fields: Any) -> dict[str, Any]:
    """A greedy request."""
    return {
        "model": "demo",
        "max_tokens": 200,
        "messages": [{"role": "user", "content": question}],
        **fields,
    }


def sdk(question: str = QUESTION, **fields: Any) -> dict[str, Any]:
    """The same for Anthropic's client, whose newest models sample in one way only."""
    return ask(question, extra_body={"temperature": 0, **fields.pop("extra_body", {})}, **fields)


@pytest_asyncio.fixture(loop_scope="module")
async def claude(engine: PtEngine) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """Anthropic's client."""
    transport = httpx2.ASGITransport(app=engine.application)  # type: ignore[attr-defined]
    session = anthropic.DefaultAsyncHttpxClient(transport=transport)
    async with anthropic.AsyncAnthropic(
        api_key="none", base_url="http://pt", http_client=session, max_retries=0
    ) as client:
        yield client


async def test_a_whole_message(claude: anthropic.AsyncAnthropic) -> None:
    """It has the trained answer, why it ended, and what it used."""
    message = await claude.messages.create(**sdk())
    assert [block.model_dump(exclude_none=True) for block in message.content] == [
        {"type": "text", "text": ANSWERS[QUESTION]}
    ]
    assert (message.type, message.role, message.model) == ("message", "assistant", "demo")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    counted = await claude.messages.count_tokens(model="demo", messages=ask()["messages"])
    assert message.usage.input_tokens == counted.input_tokens
    assert message.usage.output_tokens > 5


async def test_a_stream_has_the_same_message(claude: anthropic.AsyncAnthropic, client: httpx.AsyncClient) -> None:
    """The client puts its events together, which come in their order."""
    whole = await claude.messages.create(**sdk())
    async with claude.messages.stream(**sdk()) as stream:
        final = await stream.get_final_message()
    assert [block.text for block in final.content if block.type == "text"] == [ANSWERS[QUESTION]]
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert final.usage.input_tokens == whole.usage.input_tokens
    events = named((await client.post("/v1/messages", json=ask(stream=True, temperature=0))).text)
    names = [name for name, _ in events if name != "content_block_delta"]
    assert names == [
        "message_start", "ping", "content_block_start", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert all(event["type"] == name for name, event in events)
    assert len(events) - len(names) > 5, "a stream comes in pieces"


def named(text: str) -> list[tuple[str, Any]]:
    """The events of a stream with their names."""
    found = []
    for block in filter(None, text.split("\n\n")):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def test_why_a_message_ended(claude: anthropic.AsyncAnthropic) -> None:
    """By its length, and by which of the stop sequences."""
    short = await claude.messages.create(**sdk(max_tokens=3))
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 3)
    stop = ANSWERS[QUESTION].split()[4]
    stopped = await claude.messages.create(**sdk(stop_sequences=["nowhere", stop]))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    async with claude.messages.stream(**sdk(stop_sequences=["nowhere", stop])) as stream:
        final = await stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", stop)
    assert [block.to_dict() for block in final.content] == [block.to_dict() for block in stopped.content]


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "look_up"}]
)
async def test_a_call(claude: anthropic.AsyncAnthropic, choice: Any) -> None:
    """Whole and streamed, with arguments within the tool's schema, and the results go back."""
    asked = sdk(tools=[TOOL], tool_choice=choice, max_tokens=1000)
    message = await claude.messages.create(**asked)
    (block,) = message.content
    assert block.type == "tool_use"
    assert (block.name, message.stop_reason) == ("look_up", "tool_use")
    assert block.input["topic"] in TOPICS
    async with claude.messages.stream(**asked) as stream:
        final = await stream.get_final_message()
    (streamed,) = final.content
    assert streamed.type == "tool_use"
    assert (streamed.input, final.stop_reason) == (block.input, "tool_use")
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "It routes."}]}
    turns = [
        *asked["messages"],
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    longer = await claude.messages.create(**sdk(messages=turns))
    assert longer.usage.input_tokens > message.usage.input_tokens


async def test_a_begun_answer_is_continued(claude: anthropic.AsyncAnthropic) -> None:
    """A last message of the assistant is the beginning of the answer."""
    begun = ANSWERS[QUESTION].partition(" I am")[0]
    turns = [*ask()["messages"], {"role": "assistant", "content": begun}]
    message = await claude.messages.create(**sdk(messages=turns))
    assert [block.text for block in message.content if block.type == "text"] == [ANSWERS[QUESTION].removeprefix(begun)]


async def test_system_blocks_are_one_prompt(claude: anthropic.AsyncAnthropic) -> None:
    """As a text, as blocks, and without the line of Claude Code that differs each time."""
    text = "You are a helpful assistant."
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=1"}
    blocks = [billing, {"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:], "cache_control": {}}]
    counts = [
        await claude.messages.count_tokens(model="demo", messages=ask()["messages"], system=system)  # type: ignore[arg-type]
        for system in (text, blocks)
    ]
    assert counts[0].input_tokens == counts[1].input_tokens
    answer = await claude.messages.create(**sdk(system=blocks))
    assert [block.text for block in answer.content if block.type == "text"] == [ANSWERS[QUESTION]]


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
RESULT = {"type": "tool_result", "tool_use_id": "x", "content": [IMAGE]}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": None}, "'max_tokens'"),
        ({"max_tokens": 0}, "'max_tokens'"),
        ({"messages": []}, "'messages'"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]: a block of type 'image'"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages[0].content[0].content[0]"),
        ({"system": [IMAGE]}, "system[0]: a block of type 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "needs a name"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
        ({"tools": [{"name": "f"}]}, "input_schema"),
        ({"tools": [TOOL]}, "Use this model with 'any'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "no tool 'other'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "name"),
        ({"tool_choice": {"type": "any"}}, "no tools to choose from"),
        ({"stop_sequences": ["x"] * 17}, "'stop_sequences'"),
        ({"temperature": 3}, "'temperature'"),
        ({"mcp_servers": [{}]}, "'mcp_servers'"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"top_q": 1}, "Did you mean 'top_p'"),
        ({"max_tokens": 100_000}, "maximum context length"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs.tokenize"),
    ],
)
async def test_what_is_refused_is_named(client: httpx.AsyncClient, fields: dict[str, Any], says: str) -> None:
    """In Anthropic's form."""
    reply = await client.post("/v1/messages", json=ask(**fields))
    assert (reply.status_code, reply.json()["type"]) == (400, "error")
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert says in reply.json()["error"]["message"]


async def test_errors_are_those_of_anthropics_client(
    claude: anthropic.AsyncAnthropic, client: httpx.AsyncClient
) -> None:
    """By status and by type, for a model, a method and a body that do not exist."""
    with pytest.raises(anthropic.NotFoundError) as missing:
        await claude.messages.create(**sdk(model="nobody"))
    assert missing.value.body == {
        "type": "error",
        "error": {
            "type": "not_found_error",
            "message": "This route serves 'demo', not 'nobody'.",
            "code": "model_not_found",
            "param": "model",
        },
    }
    for reply in (await client.get("/v1/messages"), await client.post("/v1/messages", content=b"{")):
        assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_what_agents_send_changes_nothing(claude: anthropic.AsyncAnthropic) -> None:
    """Fields for Anthropic's own bookkeeping, and thinking of a model that has none."""
    message = await claude.messages.create(
        **ask(
            metadata={"user_id": "x"},
            thinking={"type": "adaptive"},
            extra_body={
                "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
                "output_config": {"effort": "high"},
            },
        )
    )
    assert [block.text for block in message.content if block.type == "text"] == [ANSWERS[QUESTION]]


async def test_a_format(claude: anthropic.AsyncAnthropic) -> None:
    """`output_config.format` bounds the text."""
    schema = TOOL["input_schema"]
    output = {"format": {"type": "json_schema", "schema": schema}}
    message = await claude.messages.create(**sdk(extra_body={"output_config": output}))
    (block,) = message.content
    assert block.type == "text"
    assert json.loads(block.text)["topic"] in TOPICS


async def test_what_the_prompt_cache_had_is_told() -> None:
    """In the usage of each API, whole and streamed. All of the prompt together is the same."""
    engine = PtEngine(demo_engine().model_copy(update={"prompt_cache_memory": 2**26}), "demo")
    transport = httpx.ASGITransport(app=await engine.start())
    async with httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=60) as client:
        long = "Tell me more. " * 60
        asked = ask(long, temperature=0, max_tokens=20)
        first, second = [(await client.post("/v1/messages", json=asked)).json() for _ in range(2)]
        stream = named((await client.post("/v1/messages", json=asked | {"stream": True})).text)
        chat = (await client.post("/v1/chat/completions", json=asked)).json()
        body = {"input": long, "temperature": 0, "max_output_tokens": 20}
        response = (await client.post("/v1/responses", json=body)).json()
    await engine.stop()
    assert "cache_read_input_tokens" not in first["usage"]
    assert second["content"] == first["content"]
    kept = second["usage"]["cache_read_input_tokens"]
    assert second["usage"]["input_tokens"] + kept == first["usage"]["input_tokens"]
    assert stream[-2][1]["usage"] == second["usage"]
    assert chat["usage"]["prompt_tokens_details"] == {"cached_tokens": kept}
    assert response["usage"]["input_tokens_details"] == {"cached_tokens": kept}
    assert response["usage"]["input_tokens"] == first["usage"]["input_tokens"]


@pytest.mark.parametrize("content", ["", [], [{"type": "text", "text": ""}]])
async def test_an_empty_begun_answer_is_none(claude: anthropic.AsyncAnthropic, content: Any) -> None:
    """Anthropic's API takes one, and the answer begins as it does without it."""
    turns = [*ask()["messages"], {"role": "assistant", "content": content}]
    message = await claude.messages.create(**sdk() | {"messages": turns})
    assert [block.text for block in message.content if block.type == "text"] == [ANSWERS[QUESTION]]


async def test_an_empty_text_cannot_be_continued_in_a_chat(client: httpx.AsyncClient) -> None:
    """The error says what to do."""
    turns = [*ask()["messages"], {"role": "assistant", "content": ""}]
    reply = await client.post("/v1/chat/completions", json={"messages": turns, "continue_final_message": True})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "continue_final_message")
    assert "no text that the model could continue" in reply.json()["error"]["message"]


def test_a_call_that_cannot_be_shown_as_one_is_no_reason_for_the_end() -> None:
    """A client that reads `tool_use` looks for a block of that type."""
    answer = WholeChoice()
    answer.add(Piece("", 3, "stop"), Delta(calls=(ToolCall(0, "call_1", "f", "[1]"),)))
    request = ChatRequest.read({"messages": [{"role": "user", "content": "x"}]})
    job = Job(request, [[1]], request.sampling(5, None), [], [""], "m")
    message = json.loads(MessagesForm().whole(job, [answer]))
    assert message["content"] == [{"type": "text", "text": "[1]"}]
    assert message["stop_reason"] == "end_turn"
    answer.add(Piece("", 4, "stop"), Delta(calls=(ToolCall(1, "call_2", "f", "{}"),)))
    assert json.loads(MessagesForm().whole(job, [answer]))["stop_reason"] == "tool_use"


def test_a_message_of_calls_alone_has_empty_text() -> None:
    """As with vLLM: templates put texts together, and `None` would be a word in some."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for content in (None, "", []):
        (message,) = with_joined_text([{"role": "assistant", "content": content, "tool_calls": [call]}])
        assert message["content"] == ""
