"""What vLLM is not asked."""

import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from serve_app.engines.vllm.guard import Guard, guarded
from serve_app.engines.vllm.response_tools import ToolAbilities
from serve_app.errors import RequestError
from serve_app.replica.whole_body import WholeBody
from serve_app.wire.body import RequestBody
from serve_app.wire.responses.chat_request import chat_request
from tests.builders import model_config

GUARD = Guard(max_model_len=100, longest_token=10)
CONFIG = model_config()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "n": 16_384}, "n"),
        ({"prompt": ["x"] * 1024, "n": "128"}, "n"),
        ({"prompt": ["x"] * 1024, "n": 128.0}, "n"),
        ({"prompt": ["x"] * 10_000}, "prompt"),
        ({"prompt": [[1]] * 40, "n": 30}, "prompt"),
        ({"input": [{}] * 2000}, "input"),
        ({"prompt": "x" * 7000}, "prompt"),
        ({"prompt": ["x", "x" * 7000]}, "prompt"),
        ({"messages": [{"role": "user", "content": "x" * 7000}]}, "messages"),
        ({"messages": [{}] * 75_000}, None),
        ({"tokens": [1] * 2000}, "tokens"),
        ({"prompt": "x", "logit_bias": {str(token): 1 for token in range(2000)}}, "logit_bias"),
        ({"prompt": "x", "tools": [{"a": 1, "b": {}}] * 10_000}, None),
        ({"prompt": "x", "structured_outputs": 0}, "structured_outputs"),
        ({"prompt": "x", "top_k": 10**400}, "top_k"),
        ({"prompt": "x", "top_k": str(2**70)}, "top_k"),
        ({"prompt": "x", "top_k": f" +{2**70}.0 "}, "top_k"),
        ({"prompt": "x", "max_tokens": f"{2**35}_{2**35}"}, "max_tokens"),
        ({"prompt": "x", "min_tokens": -(2**63)}, "min_tokens"),
        ({"prompt": "x", "logprobs": "1" * 101}, "logprobs"),
        ({"prompt": "x", "temperature": "0." + "1" * 100}, "temperature"),
        ({"prompt": "x", "repetition_penalty": "inf"}, "repetition_penalty"),
        ({"prompt": "x", "length_penalty": "nan"}, "length_penalty"),
        ({"prompt": "x", "seed": 2**63 - 1, "n": 2}, "seed"),
        ({"prompt": "x", "seed": str(2**63 - 1), "n": 2}, "seed"),
        ({"prompt": "x", "n": "1" * 200}, "n"),
        ({"prompt": "x", "allowed_token_ids": [1] * 1025}, "allowed_token_ids"),
        ({"prompt": "x", "stop_token_ids": [1] * 129, "min_tokens": 1}, "stop_token_ids"),
        ({"prompt": "x", "repetition_detection": {"max_pattern_size": 10**5}}, "repetition_detection.max_pattern_size"),
        ({"prompt": "x", "repetition_detection": {"min_count": "100000"}}, "repetition_detection.min_count"),
        ({"prompt": "x", "bad_words": ["x" * 1100]}, "bad_words"),
        ({"prompt": "x", "bad_words": ["xxxxx"] * 100}, "bad_words"),
        ({"prompt": "x", "bad_words": ["x"] * 129}, "bad_words"),
        ({"prompt": "x", "bad_words": ["x" * 20_000]}, "bad_words"),
        ({"prompt": "x", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "x", "use_beam_search": "on"}, "use_beam_search"),
        ({"input": "x", "enable_response_messages": 1}, "enable_response_messages"),
        ({"input": "x", "user": "x" * 2000}, "user"),
        ({"query": "x", "documents": ["x"] * 2000}, "documents"),
        ({"queries": "x", "documents": ["x" * 7000]}, "documents"),
        ({"input": "x", "instructions": "x" * 7000}, "instructions"),
        ({"messages": [], "system": "x" * 7000}, "system"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_hold_others_up_is_refused_by_name(body: dict[str, Any], param: str | None) -> None:
    """Before vLLM sees it."""
    with pytest.raises(RequestError) as refused:
        GUARD.check(RequestBody(json.dumps(body).encode()))
    assert refused.value.status == 400
    assert refused.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "Hello", "n": 8, "logit_bias": {"5": -100}}',
        b'{"prompt": [1, 2, 3]}',
        b'{"prompt": [[1, 2], [3]], "n": 2}',
        b'{"input": ["a", "b"]}',
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "structured_outputs": null}',
        b'{"tokens": [1, 2, 3]}',
        b'{"messages": 5, "n": 2}',
        b"[]",
        b"",
        b"--form\r\n",
        b'{"prompt": "\xff"}',
        b'{"prompt": "x", "top_k": "5", "seed": "+1_0", "temperature": " 0.5 ", "logprobs": null, "max_tokens": 5.0}',
        b'{"prompt": "x", "top_k": "many", "temperature": {}, "seed": [1]}',
        b'{"prompt": "x", "bad_words": ["a", "b"], "use_beam_search": false, "stop_token_ids": [1, 2]}',
        b'{"prompt": "x", "bad_words": 5, "repetition_detection": {"max_pattern_size": 20, "min_count": 3}}',
        b'{"prompt": "x", "repetition_detection": {"\xff": 1}}',
    ],
)
def test_the_rest_is_for_vllm_to_judge(body: bytes) -> None:
    """What is usual, and what is wrong in a way that costs nothing."""
    GUARD.check(RequestBody(body))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"length_penalty": NaN, "top_k": 18446744073709551616}', "not valid JSON"),
        (b'{"temperature": 1e999}', "finite"),
        (b'{"n": 1e999}', "whole number"),
    ],
)
def test_what_only_python_takes_for_json_does_not_pass_the_checks(body: bytes, said: str) -> None:
    """vLLM reads NaN, and infinity for what is too large."""
    with pytest.raises(RequestError, match=said):
        GUARD.check(RequestBody(body))


@pytest.mark.parametrize("field", ["previous_response_id", "background", "conversation", "prompt"])
def test_responses_refer_to_nothing_stored(field: str) -> None:
    """As with pt, and in the same words."""
    body = RequestBody(json.dumps({"input": "x", field: "resp_x"}).encode())
    with pytest.raises(RequestError, match="nothing is stored here") as refused:
        GUARD.check(body, "/v1/responses")
    assert refused.value.param == field
    GUARD.check(RequestBody(json.dumps({"input": "x", field: None}).encode()), "/v1/responses")


def test_wrong_items_of_a_response_are_refused_one_by_one() -> None:
    """vLLM would write some 200 errors for each, and the first one is enough."""
    seen = []

    def is_known(item: Any) -> bool:
        seen.append(item)
        return item.get("type") == "message" and item["content"] != [{"type": "x"}]

    guard = Guard(max_model_len=10_000, longest_token=10, is_known_item=is_known)
    good = {"type": "message", "content": [{"type": "a"}, {"type": "b"}]}
    for items, place in (([1] * 5000, 0), ([good, *[{}] * 2000], 1), ([good | {"content": [{"type": "x"}] * 999}], 0)):
        seen.clear()
        with pytest.raises(RequestError, match=rf"'input\[{place}\]'") as refused:
            guard.check(RequestBody(json.dumps({"input": items}).encode()), "/v1/responses")
        assert refused.value.param == "input"
        assert len(seen) <= 3
    seen.clear()
    guard.check(RequestBody(json.dumps({"input": [good]}).encode()), "/v1/responses")
    assert seen == [good | {"content": [{"type": "a"}]}, good | {"content": [{"type": "b"}]}]
    with pytest.raises(RequestError, match="at most 20000"):
        guard.check(RequestBody(json.dumps({"messages": [1] * 30_000}).encode()), "/v1/chat/completions")


def test_what_a_response_repeats_has_a_bound() -> None:
    """vLLM writes it on the event loop of all clients, three times in a stream, also if it is not in the prompt."""
    tool = {"type": "function", "name": "f", "description": "x" * 2**20}
    body = RequestBody(json.dumps({"input": "x", "tools": [tool], "tool_choice": "none"}).encode())
    with pytest.raises(RequestError, match="at most 262144 bytes") as refused:
        GUARD.check(body, "/v1/responses")
    assert refused.value.param == "tools"
    GUARD.check(body, "/v1/chat/completions")


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}


def check_tools(abilities: ToolAbilities, path: str = "/v1/responses", **fields: Any) -> None:
    """Has the guard of an engine with these abilities look at a request."""
    guard = Guard(max_model_len=100, longest_token=10, tools=abilities)
    guard.check(RequestBody(json.dumps({"input": "x", **fields}).encode()), path)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({}, "choice 'auto'"),
        ({"tool_choice": "auto"}, "choice 'auto'"),
        ({"tool_choice": None}, "choice 'auto'"),
        ({"tool_choice": "required"}, "choice 'required'"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "choice of the function 'f'"),
    ],
)
def test_tools_that_no_parser_would_read_are_refused(choice: dict[str, Any], said: str) -> None:
    """vLLM refuses them in its other endpoints, and would answer 200 with text here."""
    with pytest.raises(RequestError, match=said) as refused:
        check_tools(ToolAbilities(reads_calls=False), tools=[TOOL], **choice)
    assert "engine_args: {enable_auto_tool_choice: true, tool_call_parser: …}" in str(refused.value)
    assert (refused.value.status, refused.value.param) == (400, "tools")
    check_tools(ToolAbilities(), tools=[TOOL], **choice)
    check_tools(ToolAbilities(reads_calls=False), "/v1/chat/completions", tools=[TOOL], **choice)


@pytest.mark.parametrize("fields", [{"tools": [TOOL], "tool_choice": "none"}, {"tools": []}, {"tools": None}, {}])
def test_without_a_parser_other_responses_are_served(fields: dict[str, Any]) -> None:
    """These call no tool."""
    check_tools(ToolAbilities(reads_calls=False), **fields)


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_hosted_tools_are_refused_in_pts_words(choice: str) -> None:
    """vLLM would drop them, unless it has a server of tools."""
    hosted = {"input": "x", "tools": [TOOL, {"type": "web_search"}], "tool_choice": choice}
    with pytest.raises(RequestError) as of_pt:
        chat_request(hosted)
    with pytest.raises(RequestError, match=r"^tools\[1\]: the tool type 'web_search'") as refused:
        check_tools(ToolAbilities(), **hosted)
    assert (str(refused.value), refused.value.param) == (str(of_pt.value), of_pt.value.param)
    check_tools(ToolAbilities(runs_hosted=True), **hosted)
    for kind in ("custom", "namespace"):
        check_tools(ToolAbilities(), tools=[{"type": kind, "name": "n"}])
    for kind in (None, ["web_search"]):
        with pytest.raises(RequestError, match="the tool type"):
            check_tools(ToolAbilities(), tools=[{"type": kind}])


def test_tools_of_a_wrong_type_are_for_vllm_to_judge() -> None:
    """Except for nesting, which nothing could write again."""
    check_tools(ToolAbilities(), tools=5)
    check_tools(ToolAbilities(), tools=["x"])
    deep = b'{"input": "x", "tools": ' + b"[" * 400 + b"]" * 400 + b"}"
    with pytest.raises(RequestError, match="deep"):
        GUARD.check(RequestBody(deep), "/v1/responses")


def test_the_input_of_a_response_is_one_conversation() -> None:
    """It may have more items than there may be prompts, but no more text than the context holds."""
    items = [{"role": "user", "content": "x"}] * 60
    GUARD.check(RequestBody(json.dumps({"input": items}).encode()), "/v1/responses")
    many = Guard(max_model_len=10_000, longest_token=10)
    body = RequestBody(json.dumps({"input": [{"content": "x"}] * 2000}).encode())
    many.check(body, "/v1/responses")
    with pytest.raises(RequestError):
        many.check(body, "/v1/embeddings")
    with pytest.raises(RequestError, match="'input' has"):
        GUARD.check(RequestBody(json.dumps({"input": [{"content": "x" * 4000}] * 2}).encode()), "/v1/responses")


def test_media_are_long() -> None:
    """Where the model reads them."""
    body = json.dumps({"messages": [{"role": "user", "content": [{"image_url": "data:" + "x" * 100_000}]}]}).encode()
    Guard(100, 10, reads_media=True).check(RequestBody(body))


def test_the_application_gets_the_body_as_it_came() -> None:
    """Or the client an error object."""

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        body = await Request(scope, receive).body()
        await JSONResponse({"bytes": len(body)})(scope, receive, send)

    client = TestClient(WholeBody(guarded(echo, GUARD), CONFIG))
    assert client.post("/v1/completions", content=b'{"prompt": "x"}').json() == {"bytes": 15}
    assert client.get("/health").json() == {"bytes": 0}
    refused = client.post("/v1/completions", json={"prompt": "x", "n": 5000})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")


@pytest.mark.parametrize(
    ("method", "path", "root", "status"),
    [
        ("POST", "/v1/completions", "", 200),
        ("POST", "/v1/completions/", "", 200),
        ("POST", "/models/m/v1/rerank", "/models/m", 200),
        ("GET", "/metrics", "", 200),
        ("POST", "/inference/v1/generate", "", 404),
        ("POST", "/models/m/scale_elastic_ep", "/models/m", 404),
        ("POST", "/v1/completions//", "", 404),
        ("PUT", "/v1/load_lora_adapter", "", 404),
    ],
)
def test_endpoints_whose_bodies_nobody_knows_are_not_served(method: str, path: str, root: str, status: int) -> None:
    """Some would stop the engine for everybody, and no limit of a key counts them."""

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        await JSONResponse({})(scope, receive, send)

    reply = TestClient(WholeBody(guarded(engine, GUARD), CONFIG), root_path=root).request(method, path, content=b"{}")
    assert reply.status_code == status
    if status == 404:
        assert f"{method} {path.removeprefix(root)} is not served" in reply.json()["error"]["message"]


def test_spaces_hide_no_prompts() -> None:
    """However many stand before the first."""
    prompts = ",".join(['"a"'] * 10_000)
    with pytest.raises(RequestError, match="1280000 sequences"):
        GUARD.check(RequestBody(f'{{"n": 128, "prompt": [{" " * 70}{prompts}]}}'.encode()))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_json_that_only_python_reads_is_refused(encoding: str) -> None:
    """vLLM's `json.loads` detects these encodings, so they would go past every bound."""
    with pytest.raises(RequestError, match="UTF-8"):
        GUARD.check(RequestBody('{"prompt": "x", "n": 100000}'.encode(encoding)))
