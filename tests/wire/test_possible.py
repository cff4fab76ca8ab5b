"""What no engine takes is known without one."""

import json
from typing import Any

import pytest

from serve_app.errors import InvalidRequest
from serve_app.wire.body import RequestBody
from serve_app.wire.possible import GENERATING, require_possible

CHAT = "/v1/chat/completions"


def body(text: str | dict[str, Any]) -> RequestBody:
    """A request's body."""
    return RequestBody((text if isinstance(text, str) else json.dumps(text)).encode())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": -1}, "'temperature' must be a number, at least 0 and at most 2, and not -1."),
        ({"temperature": 2.5}, "and not 2.5."),
        ({"temperature": "hot"}, 'and not "hot".'),
        ({"temperature": [1]}, "'temperature' must be a number"),
        ({"temperature": "1" * 200}, "'temperature' must be a number"),
        ({"top_p": 0}, "'top_p' must be a number, above 0 and at most 1, and not 0."),
        ({"top_p": 1.1}, "'top_p'"),
        ({"n": 0}, "'n' must be a number, at least 1, and not 0."),
        ({"frequency_penalty": -3}, "'frequency_penalty'"),
        ({"messages": {"role": "user"}}, "'messages' must be a list."),
        ({"tools": "x"}, "'tools' must be a list."),
        ('{"temperature": 1e999}', "'temperature' must be a number"),
    ],
)
def test_what_no_engine_takes_is_refused_by_name(fields: Any, says: str) -> None:
    """With what would be right."""
    with pytest.raises(InvalidRequest) as refused:
        require_possible(CHAT, body(fields))
    assert says in refused.value.message
    assert f"'{refused.value.param}'" in says or refused.value.param == "temperature"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": None, "messages": None, "n": None},
        {"temperature": 0, "top_p": 1, "min_p": 0, "top_k": -1, "presence_penalty": -2, "n": 1, "tools": []},
        {"temperature": "0.5", "n": 4.0, "messages": []},
        ' {"messages" :  [ ], "temperature" : 2.0 }',
    ],
)
def test_what_an_engine_may_take_passes(fields: Any) -> None:
    """In all the forms in which engines read it."""
    for path in GENERATING:
        require_possible(path, body(fields))


def test_other_endpoints_have_other_fields() -> None:
    """An embedding has no temperature, and who knows what else it has."""
    require_possible("/v1/embeddings", body({"temperature": -1, "n": "x"}))
