"""What is read of a body before an engine reads it: nothing in it makes an event loop wait."""

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.access import gate as gate_module
from serve_app.access.gate import KeyedApp, KeyedRouter
from serve_app.errors import InvalidRequest
from serve_app.wire import body as body_module
from serve_app.wire.body import MOST_NAME_BYTES, RequestBody
from serve_app.wire.census import UNCOUNTED_BYTES
from tests.access.test_gate import ENGINE, client
from tests.fakes import AUTH, Models, make_gate, router_app, says

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("field", [b'"prompt": ["",%s""]', b'"n": [[],%s[]]', b'"unknown": [{},%s{}]'])
def test_a_body_of_too_many_values_is_refused_before_it_is_read(field: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they stand: no other thread of Python runs while they are built."""
    monkeypatch.setattr(body_module, "_OBJECT", None)
    (item,) = {field[field.index(b"[") + 1 : field.index(b",") + 1]}
    with pytest.raises(InvalidRequest, match="Send several requests"):
        RequestBody(b'{"model": "m", ' + field % (item * 300_000) + b"}").peek()


@pytest.mark.parametrize("value", [b"[" + b"[]," * 20_000 + b"[]]", b"1" * 200, b'"' + b"1" * 200 + b'"', b"1e999"])
def test_what_is_too_long_for_a_number_is_not_built(value: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as none, and the engine refuses it."""
    decoded: list[int] = []
    real = body_module.msgspec.json.decode

    def watched(text: Any) -> Any:
        decoded.append(len(bytes(text)))
        return real(text)

    monkeypatch.setattr(body_module.msgspec.json, "decode", watched)
    body = b'{"model": "m", "stream": true, "max_tokens": 5, "n": %s, "max_output_tokens": %s}' % (value, value)
    seen = RequestBody(body).peek()
    assert (seen.model, seen.stream, seen.token_limit, seen.answers) == ("m", True, 5, 1)
    assert max(decoded) <= 100


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"model": "%s"}' % (b"m" * MOST_NAME_BYTES), "names have at most 1024"),
        (b'{"model": 7}', "must be a string, not int"),
        (b'{"model": "\xff"}', "not valid JSON"),
        (b'{"stream": 1e999}', "not valid JSON"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b'[{"model": "m"}]', "must be a JSON object"),
        (b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_what_cannot_be_read_says_why(body: bytes, words: str) -> None:
    """No engine would take it either."""
    with pytest.raises(InvalidRequest, match=words):
        RequestBody(body).peek()


def test_a_field_nested_too_deep_to_be_written_is_refused() -> None:
    """It could be read, since the writer needs more of the stack than the reader."""
    nested: list[Any] = []
    for _ in range(10_000):
        nested = [nested]
    with pytest.raises(InvalidRequest, match="nested more than"):
        RequestBody(b"{}").with_fields(stream_options={"x": nested})


@pytest.mark.parametrize("way", ["by name", "by route"])
async def test_large_bodies_are_read_and_written_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Looking at them, asking for their usage, and giving them another model's name; small ones stay on it."""
    loop_thread, seen = threading.get_ident(), set()
    gate, _ = make_gate(tmp_path, "tokens_per_minute: 10_000_000")
    on_bodies = ["peek", "with_fields"] if way == "by name" else ["peek"]
    watched_functions = [(gate_module, "metered"), *((RequestBody, name) for name in on_bodies)]
    for owner, name in watched_functions:
        real = getattr(owner, name)

        def watched(*args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            large = len(next(arg for arg in args if isinstance(arg, RequestBody)).content) > UNCOUNTED_BYTES
            seen.add((name, large, threading.get_ident() == loop_thread))
            return real(*args, **options)

        monkeypatch.setattr(owner, name, watched)
    if way == "by name":
        models = Models(m=says(b"{}"))
        app: Any = KeyedRouter(router_app(models, models, gate, aliases={"other": "m"})[1], gate)
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")
    else:
        http = client(KeyedApp(ENGINE, gate, "m"))
    async with http:
        for size in (10, UNCOUNTED_BYTES, 2**20):
            body = {"model": "other", "prompt": "x" * size, "stream": True}
            assert (await http.post(CHAT, json=body, headers=AUTH)).status_code == 200
    assert seen == {(name, large, not large) for _, name in watched_functions for large in (False, True)}
