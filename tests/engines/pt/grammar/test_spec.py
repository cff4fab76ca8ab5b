"""Output formats as clients ask for them."""

import json
from typing import Any

import pytest

from serve_app.engines.pt.api.protocol import ChatRequest
from serve_app.engines.pt.grammar import spec
from serve_app.engines.pt.grammar.spec import GrammarSpec
from serve_app.errors import InvalidRequest
from tests.engines.pt.api_client import chat

LARGE: Any = {"description": "x" * 70_000}


def schema_format(schema: Any) -> dict[str, Any]:
    """`response_format` of a JSON schema."""
    return {"type": "json_schema", "json_schema": {"schema": schema}}


TOOL = {"type": "function", "function": {"name": "f", "parameters": LARGE}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": schema_format(LARGE)}, "response_format"),
        ({"response_format": schema_format({"enum": [1] * 70_000})}, "response_format"),
        ({"response_format": schema_format({"x" * 70_000: 1})}, "response_format"),
        ({"structured_outputs": {"json": LARGE}}, "structured_outputs"),
        ({"structured_outputs": {"json": "x" * 70_000}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["x"] * 9000}}, "structured_outputs"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tools"),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_written_as_json(
    fields: dict[str, Any], param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To write it takes all of Python's threads their time, in proportion to what the client sent."""
    monkeypatch.setattr(spec.json, "dumps", lambda *_, **__: pytest.fail("it was written"))
    with pytest.raises(InvalidRequest, match="at most") as refused:
        ChatRequest.read(chat(**fields))
    assert refused.value.param == param


def test_a_format_of_just_the_size_is_taken() -> None:
    """The bound is one of bytes: characters that take several count as so many."""
    assert GrammarSpec("regex", "é" * 4096, "x").source
    with pytest.raises(InvalidRequest, match="has 8194 bytes"):
        GrammarSpec("regex", "é" * 4097, "x")
    schema = {"enum": ["x" * 60_000]}
    assert json.loads(GrammarSpec.of_schema(schema, "x").source) == schema
