"""What vLLM is not asked."""

import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from serve_app.engines.vllm.guard import Guard, guarded
from serve_app.errors import RequestError

GUARD = Guard(max_model_len=100, longest_token=10)


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
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_hold_others_up_is_refused_by_name(body: dict[str, Any], param: str | None) -> None:
    """Before vLLM sees it."""
    with pytest.raises(RequestError) as refused:
        GUARD.check(json.dumps(body).encode())
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
    ],
)
def test_the_rest_is_for_vllm_to_judge(body: bytes) -> None:
    """What is usual, and what is wrong in a way that costs nothing."""
    GUARD.check(body)


@pytest.mark.parametrize("body", [b'{"length_penalty": NaN, "top_k": 18446744073709551616}'])
def test_what_only_python_takes_for_json_does_not_pass_the_checks(body: bytes) -> None:
    """vLLM reads NaN."""
    with pytest.raises(RequestError, match="not valid JSON"):
        GUARD.check(body)


def test_media_are_long() -> None:
    """Where the model reads them."""
    body = json.dumps({"messages": [{"role": "user", "content": [{"image_url": "data:" + "x" * 100_000}]}]}).encode()
    Guard(100, 10, reads_media=True).check(body)


def test_the_application_gets_the_body_as_it_came() -> None:
    """Or the client an error object."""

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        body = await Request(scope, receive).body()
        await JSONResponse({"bytes": len(body)})(scope, receive, send)

    client = TestClient(guarded(echo, GUARD))
    assert client.post("/v1/completions", content=b'{"prompt": "x"}').json() == {"bytes": 15}
    assert client.get("/health").json() == {"bytes": 0}
    refused = client.post("/v1/completions", json={"prompt": "x", "n": 5000})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")


def test_spaces_hide_no_prompts() -> None:
    """However many stand before the first."""
    prompts = ",".join(['"a"'] * 10_000)
    with pytest.raises(RequestError, match="1280000 sequences"):
        GUARD.check(f'{{"n": 128, "prompt": [{" " * 70}{prompts}]}}'.encode())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_json_that_only_python_reads_is_refused(encoding: str) -> None:
    """vLLM's `json.loads` detects these encodings, so they would go past every bound."""
    with pytest.raises(RequestError, match="UTF-8"):
        GUARD.check('{"prompt": "x", "n": 100000}'.encode(encoding))
