"""Requests to the pt engine's HTTP interface and what comes back."""

import json
from typing import Any


def chat(question: str = "Hello", **fields: Any) -> dict[str, Any]:
    """A greedy chat request."""
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, **fields}


def events(text: str) -> list[Any]:
    """The decoded events of a stream, without `[DONE]`, which must be the last."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
