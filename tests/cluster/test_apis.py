"""The APIs of agents on both engines, with their own clients, by name and by route: the same answers from both."""

import json
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.cluster.serve_run import ServeRun
from tests.cluster.test_serving import ENGINES, WAYS
from tests.demo_answers import ANSWERS, QUESTIONS

QUESTION = QUESTIONS[0]
TURNS: Any = [{"role": "user", "content": QUESTION}]
GREEDY = {"temperature": 0}
TOPICS = ["router", "backends"]
SCHEMA = {
    "type": "object",
    "properties": {"topic": {"enum": TOPICS}},
    "required": ["topic"],
    "additionalProperties": False,
}


class Topic(BaseModel):
    """What is asked for."""

    topic: Literal["router", "backends"]


def address(run: ServeRun, model: str, way: str) -> str:
    """The address before /v1."""
    return run.url if way == "by name" else f"{run.url}/models/{model}"


def claude(run: ServeRun, model: str, way: str) -> anthropic.Anthropic:
    """Anthropic's client."""
    return anthropic.Anthropic(base_url=address(run, model, way), api_key="none", timeout=60, max_retries=0)


def gpt(run: ServeRun, model: str, way: str) -> openai.OpenAI:
    """OpenAI's client."""
    return openai.OpenAI(base_url=f"{address(run, model, way)}/v1", api_key="none", timeout=60, max_retries=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ENGINES)
def test_anthropics_client_gets_the_known_answer(run: ServeRun, model: str, way: str) -> None:
    """Whole and streamed, with the same counts."""
    asked: Any = {"model": model, "messages": TURNS, "max_tokens": 200, "extra_body": GREEDY}
    with claude(run, model, way) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            final = stream.get_final_message()
        counted = client.messages.count_tokens(model=model, messages=TURNS)
        short = client.messages.create(**asked | {"max_tokens": 3})
        stop = ANSWERS[QUESTION].split()[4]
        stopped = client.messages.create(**asked, stop_sequences=[stop])
    for message in (whole, final):
        assert [block.text for block in message.content if block.type == "text"] == [ANSWERS[QUESTION]]
        assert (message.role, message.type, message.stop_reason, message.stop_sequence) == (
            "assistant",
            "message",
            "end_turn",
            None,
        )
        assert message.usage.input_tokens == counted.input_tokens
        assert message.usage.output_tokens == whole.usage.output_tokens > 5
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 3)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ENGINES)
def test_openais_client_gets_the_known_response(run: ServeRun, model: str, way: str) -> None:
    """Whole, streamed and parsed."""
    asked: Any = {"model": model, "input": QUESTION, "temperature": 0, "max_output_tokens": 200}
    with gpt(run, model, way) as client:
        whole = client.responses.create(**asked)
        events: Any = list(client.responses.create(**asked, stream=True))
        schema: Any = {"format": {"type": "json_schema", "name": "topic", "schema": SCHEMA}}
        formed = client.responses.create(**asked | {"max_output_tokens": 20}, text=schema)
        # With vLLM's grammar, this model writes spaces without end.
        parsed = (
            client.responses.parse(**asked | {"max_output_tokens": 500}, text_format=Topic)
            if model == "tiny-pt"
            else None
        )
    assert whole.output_text == ANSWERS[QUESTION]
    assert (whole.status, whole.object) == ("completed", "response")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    final = events[-1].response
    assert final.id == events[0].response.id
    assert (final.output_text, final.usage.total_tokens) == (whole.output_text, whole.usage.total_tokens)  # type: ignore[union-attr]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == ANSWERS[QUESTION]
    assert len(deltas) > 5
    assert formed.output_text.lstrip().startswith("{")
    if parsed is not None:
        assert parsed.output_parsed is not None
        assert parsed.output_parsed.topic in TOPICS


def test_a_named_tool_is_called(run: ServeRun) -> None:
    """By both clients, whole and streamed. vLLM needs a parser for it, which `agent_calls.py` gives it."""
    model = "tiny-pt"
    tool: Any = {"name": "look_up", "input_schema": SCHEMA}
    asked: Any = {
        "model": model, "messages": TURNS, "max_tokens": 500, "extra_body": GREEDY, "tools": [tool],
        "tool_choice": {"type": "tool", "name": "look_up"},
    }  # fmt: skip
    with claude(run, model, "by name") as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            final = stream.get_final_message()
    for message in (whole, final):
        (block,) = message.content
        assert block.type == "tool_use"
        assert (block.name, message.stop_reason) == ("look_up", "tool_use")
        assert block.input["topic"] in TOPICS  # type: ignore[index]
    function: Any = {"type": "function", "name": "look_up", "parameters": SCHEMA}
    with gpt(run, model, "by name") as client:
        response = client.responses.create(
            model=model, input=QUESTION, temperature=0, tools=[function], max_output_tokens=500,
            tool_choice={"type": "function", "name": "look_up"},
        )  # fmt: skip
    (call,) = response.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["topic"] in TOPICS


def test_both_engines_count_the_same_tokens(run: ServeRun) -> None:
    """With a system prompt, blocks and earlier results of tools."""
    turns = [
        *TURNS,
        {"role": "assistant", "content": [
            {"type": "text", "text": "Let me see."}, {"type": "tool_use", "id": "x", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "text", "text": "It routes."}]},
            {"type": "text", "text": "And now?"}, {"type": "text", "text": "Hello"}]},
    ]  # fmt: skip
    system = [{"type": "text", "text": "You are"}, {"type": "text", "text": " helpful."}]
    counts = []
    for model in ENGINES:
        body = {"model": model, "messages": turns, "system": system}
        reply = httpx.post(f"{run.url}/v1/messages/count_tokens", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        counts.append(reply.json()["input_tokens"])
    assert counts[0] == counts[1]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/messages", {"messages": TURNS}),
    ("/v1/messages", {"messages": [{"role": "nobody", "content": "x"}], "max_tokens": 5}),
    ("/v1/messages", {"messages": TURNS, "max_tokens": 100_000}),
    ("/v1/messages", {"messages": TURNS, "max_tokens": 5, "tools": [{"type": "web_search_20250305", "name": "w"}]}),
    ("/v1/messages/count_tokens", {"messages": 1}),
    ("/v1/responses", {"input": "x", "previous_response_id": "resp_x"}),
    ("/v1/responses", {"input": "x", "background": True}),
    ("/v1/responses", {"input": "x", "conversation": "conv_x"}),
    ("/v1/responses", {"input": [{"type": "nothing"}]}),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ENGINES)
def test_refusals_have_the_apis_own_form(run: ServeRun, model: str, way: str) -> None:
    """With both engines, and with the router where no engine is asked."""
    for path, fields in REFUSED:
        reply = httpx.post(address(run, model, way) + path, json={"model": model, **fields}, timeout=60)
        assert reply.status_code == 400, (path, fields, reply.text)
        error = reply.json()["error"]
        assert error["message"]
        if path.startswith("/v1/messages"):
            assert (reply.json()["type"], error["type"]) == ("error", "invalid_request_error")
    url = address(run, model, way) + "/v1/messages"
    unknown = httpx.post(url, json={"model": "nobody", **REFUSED[2][1]}, timeout=60)
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
    assert unknown.headers["x-request-id"]
    wrong = httpx.get(url, timeout=60)
    assert (wrong.status_code, wrong.json()["type"]) == (405, "error")
