"""Output in a form that the client asks for. The demo model knows none of these forms: only the grammar makes them."""

import asyncio
import json
import re
from typing import Any

import httpx
import pytest

from tests.demo_answers import ANSWERS
from tests.engines.pt.api_client import chat, events

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def schema_format(schema: Any) -> dict[str, Any]:
    """`response_format` of a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


async def content(client: httpx.AsyncClient, **fields: Any) -> str:
    """The text of one answer that ended by itself."""
    reply = await client.post("/v1/chat/completions", json=chat(**fields))
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    assert choice["finish_reason"] == "stop"
    text: str = choice["message"]["content"]
    return text


@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_json_schema_is_followed(client: httpx.AsyncClient, temperature: float) -> None:
    """Greedy and sampled."""
    text = await content(client, response_format=schema_format(PERSON), temperature=temperature, seed=3)
    person = json.loads(text)
    assert set(person) == {"name", "age", "tags"}
    assert 0 <= person["age"] <= 120
    assert set(person["tags"]) <= {"a", "b"}


async def test_json_object_is_free(client: httpx.AsyncClient) -> None:
    """Any object, so this model does not end it by itself; what there is, is the start of one."""
    body = chat(response_format={"type": "json_object"}, max_tokens=30)
    text = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]["content"]
    assert re.match(r'\{\s*("|\})', text)


async def test_regex_choice_and_grammar(client: httpx.AsyncClient) -> None:
    """vLLM's `structured_outputs`."""
    assert re.fullmatch("[0-9]{3}-[x-z]{2}", await content(client, structured_outputs={"regex": "[0-9]{3}-[x-z]{2}"}))
    choices = ['a "b"', "naïve\n", "c"]
    assert await content(client, structured_outputs={"choice": choices}) in choices
    assert await content(client, structured_outputs={"grammar": 'root ::= "ab" "cd"*  "e"'}, seed=1)
    assert isinstance(json.loads(await content(client, structured_outputs={"json": PERSON})), dict)


async def test_others_in_the_batch_are_not_constrained(client: httpx.AsyncClient) -> None:
    """A row's mask is its own."""
    plain, forced = await asyncio.gather(
        content(client), content(client, structured_outputs={"choice": ["zzzz"]}, logprobs=True)
    )
    assert (plain, forced) == (ANSWERS["Hello"], "zzzz")


async def test_the_completions_endpoint_takes_them_too(client: httpx.AsyncClient) -> None:
    """And streams the text as it comes."""
    body = {"prompt": "x", "max_tokens": 20, "structured_outputs": {"regex": "(ab){4}"}, "stream": True}
    chunks = events((await client.post("/v1/completions", json=body)).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abababab"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "it must come with type 'json_schema'"),
        ({"response_format": {"type": "yaml"}}, "response_format", "json_object"),
        ({"response_format": schema_format({"type": "foo"})}, "response_format", 'Unsupported type "foo"'),
        (
            {"response_format": schema_format({"properties": {"x": {"type": "integer", "multipleOf": 5}}})},
            "response_format",
            "cannot enforce 'multipleOf'",
        ),
        ({"structured_outputs": {"regex": "(ab"}}, "structured_outputs", "parenthesis is not closed"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs", "Lookahead is not supported"),
        ({"structured_outputs": {"grammar": "root = 1"}}, "structured_outputs", "root"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "Give only one of them",
        ),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs", "at most 8192"),
        ({"structured_outputs": {"json": "{bad"}}, "structured_outputs", "is not JSON"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "says where the text ends"),
        (
            {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
            "tools",
        ),
        ({"tool_choice": "required"}, "tool_choice", "no tools to choose from"),
        ({"tools": [WEATHER]}, "tool_choice", "needs a model whose tokenizer"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "no tools to choose from"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "nope"}}},
            "tool_choice",
            "there is no tool 'nope'",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "'tools[0].function.name'"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a", "parameters": {"$defs": 1}}}],
                "tool_choice": "required",
            },
            "tools",
            "'tools[0].function.parameters.$defs' must be an object",
        ),
    ],
)
async def test_what_cannot_be_followed_is_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str | None, words: str
) -> None:
    """By the field's name, and before anything is generated; with a stream too."""
    for stream in (False, True):
        reply = await client.post("/v1/chat/completions", json=chat(stream=stream, **fields))
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert words in error["message"]
        assert error["param"] == param


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"a": {}}, "required": ["a"], "anyOf": [{"type": "object"}]}, "beside 'anyOf'"),
        ({"$ref": "#/$defs/s", "maxLength": 2, "$defs": {"s": {"type": "string"}}}, "'maxLength' beside '$ref'"),
        ({"type": "string", "pattern": "^(?!v)[a-z]{3}$"}, "looks ahead"),
        ({"properties": {"a": {}}, "required": ["zz"]}, "not among the 'properties'"),
        ({"$ref": "http://x.y/z"}, "another document"),
        ({"const": 10**29}, "15 digits"),
        ({"type": "object", "required": ["a"]}, "not among the 'properties'"),
        ({"type": "integer", "allOf": [{"maximum": 3}]}, "'type' beside 'allOf'"),
        ({"minimum": 5}, "'minimum' in a schema of no type"),
        ({"type": "integer", "enum": [300], "maximum": 2}, "'maximum' beside 'enum'"),
        ({"type": "string", "contentEncoding": "base64"}, "'contentEncoding'"),
        ({"type": "string", "format": "postcode"}, "the format 'postcode'"),
    ],
)
async def test_what_xgrammar_would_drop_in_silence_is_refused(
    client: httpx.AsyncClient, schema: dict[str, Any], words: str
) -> None:
    """Each of these gave output that broke the schema, with a status of 200."""
    reply = await client.post("/v1/chat/completions", json=chat(response_format=schema_format(schema)))
    assert (reply.status_code, words in reply.json()["error"]["message"]) == (400, True), reply.text


async def test_keywords_that_ask_for_nothing_are_taken(client: httpx.AsyncClient) -> None:
    """`uniqueItems: false`, and OpenAPI's formats of numbers."""
    schema = {"type": "array", "items": {"type": "integer", "format": "int32"}, "uniqueItems": False, "maxItems": 2}
    reply = await client.post("/v1/chat/completions", json=chat(response_format=schema_format(schema), max_tokens=20))
    assert reply.status_code == 200, reply.text


async def test_a_regex_that_explodes_ends_itself_too(client: httpx.AsyncClient) -> None:
    """26 characters that compile at once, and cost seconds a token after a while."""
    ends = (await client.post("/tokenize", json={"prompt": "<|im_end|>", "add_special_tokens": False})).json()["tokens"]
    body = chat(
        structured_outputs={"regex": "((a{1,200}){1,200}){1,200}"}, logit_bias={str(ends[0]): -100}, max_tokens=1500
    )
    slow, plain = await asyncio.gather(client.post("/v1/chat/completions", json=body), content(client))
    assert plain == ANSWERS["Hello"]
    assert (slow.status_code, "too long to follow" in slow.text) == (400, True), slow.text[:200]


async def test_an_ambiguous_grammar_ends_itself_and_not_the_others(client: httpx.AsyncClient) -> None:
    """Its masks cost more with every token, and all sequences of the batch wait for them."""
    grammar = 'root ::= a\na ::= a a a | "x" | "xx" | ""'
    ids = (await client.post("/tokenize", json={"prompt": "x", "add_special_tokens": False})).json()["tokens"]
    body = chat(structured_outputs={"grammar": grammar}, logit_bias={str(ids[0]): 100}, max_tokens=1500)
    slow, plain = await asyncio.gather(client.post("/v1/chat/completions", json=body), content(client))
    assert plain == ANSWERS["Hello"]
    assert (slow.status_code, "ambiguous" in slow.text) == (400, True), slow.text[:200]


async def test_many_short_answers_of_one_format_leave_the_engine_free(client: httpx.AsyncClient) -> None:
    """Their last masks, which nobody reads, once filled the way to their process, and the engine waited for it."""
    body = chat(response_format={"type": "json_object"}, max_tokens=1, temperature=1, n=100)
    for _ in range(6):
        reply = await client.post("/v1/chat/completions", json=body)
        assert (reply.status_code, len(reply.json()["choices"])) == (200, 100), reply.text[:200]
    assert await content(client) == ANSWERS["Hello"]


async def test_a_property_may_have_a_keywords_name(client: httpx.AsyncClient) -> None:
    """`not` as a property is no `not`."""
    schema = {"type": "object", "properties": {"not": {"enum": [1]}}, "required": ["not"]}
    text = await content(client, response_format=schema_format(schema | {"additionalProperties": False}))
    assert json.loads(text) == {"not": 1}


async def test_a_named_function_is_called(client: httpx.AsyncClient) -> None:
    """The whole answer is its arguments; whole and streamed."""
    body = chat(tools=[WEATHER, CLOCK], tool_choice={"type": "function", "function": {"name": "weather"}})
    (choice,) = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"], call["type"]) == ("stop", None, "function")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
    chunks = events((await client.post("/v1/chat/completions", json=body | {"stream": True})).text)
    parts = [part for chunk in chunks for part in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert parts[0]["function"]["name"] == "weather"
    assert all("id" not in part for part in parts[1:])
    assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]


async def test_tools_with_nested_types_and_a_cut_answer(client: httpx.AsyncClient) -> None:
    """pydantic puts nested types under `$defs`; complete calls come out although the last one is cut."""
    inner = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}
    parameters = {
        "type": "object",
        "properties": {"inner": {"$ref": "#/$defs/Inner"}},
        "required": ["inner"],
        "$defs": {"Inner": inner},
    }
    tool = {"type": "function", "function": {"name": "nested", "parameters": parameters}, "strict": True}
    body = chat(tools=[tool, WEATHER], tool_choice="required", max_tokens=400)
    (choice,) = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
    calls = choice["message"]["tool_calls"]
    assert {call["function"]["name"] for call in calls} <= {"nested", "weather"}
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        assert arguments.get("city") in ("Oslo", "Rome") or arguments["inner"]["x"] in (1, 2)


async def test_a_conversation_with_calls_goes_on(client: httpx.AsyncClient) -> None:
    """Calls and their results come back as messages; no arguments may be an empty text."""
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": ""}}
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "12:00"},
        {"role": "user", "content": "Hello"},
    ]
    reply = await client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 3})
    assert reply.status_code == 200, reply.text


async def test_required_calls_some_tool(client: httpx.AsyncClient) -> None:
    """At least one call to a tool that exists; one at most without parallel calls. The demo model knows no tools, and
    writes as much white space as the format allows."""
    body = chat(tools=[WEATHER, CLOCK], tool_choice="required", parallel_tool_calls=False, max_tokens=1000)
    (choice,) = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert call["function"]["name"] in ("weather", "clock")
    assert isinstance(json.loads(call["function"]["arguments"]), dict)
    chunks = events((await client.post("/v1/chat/completions", json=body | {"stream": True})).text)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_tool_choice_none_is_a_plain_answer(client: httpx.AsyncClient) -> None:
    """The tools are not even shown to the model."""
    assert await content(client, tools=[WEATHER], tool_choice="none") == ANSWERS["Hello"]
