"""By a model's own route, a key reaches what it is allowed, and nothing else by any spelling or trick."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from serve_app.access.door import Inside, OuterDoor
from serve_app.access.gate import Gate, KeyedApp
from serve_app.access.keys import KeySource, sha256_of
from serve_app.adapters.records import AdapterState
from serve_app.config import ModelConfig
from serve_app.engines.adapters import AdapterCheck
from serve_app.errors import ModelUnavailable
from serve_app.replica.adapter_route import AdapterRoute
from serve_app.replica.adapter_shelf import AdapterShelf, Entry
from serve_app.replica.whole_body import WholeBody
from tests.fakes import LocalLimiter
from tests.replica.fake_engine import AdapterEngine

CONFIG = ModelConfig.from_args({"model": "m", "infer_backend": "pt", "max_loras": 2, "max_lora_rank": 8})
# What each key may use.
KEYS: Mapping[str, list[str] | None] = {
    "base": ["qwen"],
    "sql": ["sql"],
    "full": ["qwen:sql"],
    "star": ["qwen:*"],
    "every": ["qwen", "qwen:*"],
    "any": None,
    "other": ["llama", "llama:*", "sq", "SQL", "qwen:", "*"],
}
PATH = "/v1/chat/completions"


def route(tmp_path: Path) -> tuple[ASGIApp, AdapterEngine]:
    """The layers of a replica of `qwen` with the adapters `sql` and `legal`, from its door to its engine."""
    engine = AdapterEngine()
    engine.adapters = {"sql": tmp_path, "legal": tmp_path}
    shelf = shelf_of(engine)
    lines = [
        f"- {{name: {name}, sha256: {sha256_of(f'sk-{name}')}"
        + (f", models: {json.dumps(models)}}}" if models else "}")
        for name, models in KEYS.items()
    ]
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n" + "\n".join(lines))
    gate = Gate(KeySource(file, {}), LocalLimiter())
    own = WholeBody(AdapterRoute(engine.app(), shelf.require), CONFIG)
    app = KeyedApp(own, gate, "qwen", CONFIG, shelf.names)
    return OuterDoor(app, Inside(gate, lambda: CONFIG, "qwen", adapters=shelf.names)), engine


def shelf_of(engine: AdapterEngine) -> AdapterShelf:
    """A shelf on which the engine's adapters stand already."""
    shelf = AdapterShelf("qwen", AdapterCheck(CONFIG), engine)  # type: ignore[arg-type]
    shelf._entries = {name: Entry(AdapterState("ready")) for name in engine.adapters}
    return shelf


async def send(app: ASGIApp, key: str | None, body: Any, **more: Any) -> httpx.Response:
    """One request by the route of the model. A body that is no bytes is JSON."""
    headers = {} if key is None else {"authorization": f"Bearer sk-{key}"}
    headers |= {"content-type": "application/json"} | more.pop("headers", {})
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        return await client.request(
            more.pop("method", "POST"), more.pop("path", PATH), content=content, headers=headers
        )


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({}, "qwen"), ({"model": None}, "qwen"), ({"model": "qwen"}, "qwen"),
        ({"model": "sql"}, "sql"), ({"model": "qwen:sql"}, "sql"),
        ({"model": "legal"}, "legal"), ({"model": "qwen:legal"}, "legal"),
    ],
)  # fmt: skip
async def test_each_key_reaches_what_it_is_allowed(tmp_path: Path, key: str, body: dict[str, Any], asked: str) -> None:
    """In both spellings, and the engine gets its own."""
    app, engine = route(tmp_path)
    allowed = {
        "base": {"qwen"}, "sql": {"sql"}, "full": {"sql"}, "star": {"sql", "legal"}, "other": set(),
        "every": {"qwen", "sql", "legal"}, "any": {"qwen", "sql", "legal"},
    }[key]  # fmt: skip
    answer = await send(app, key, body)
    assert answer.status_code == (200 if asked in allowed else 403)
    if asked in allowed:
        assert answer.json() == {"asked": asked}
    else:
        assert answer.json()["error"]["code"] == "model_not_allowed"
        assert engine.bodies == []


# Each of these tries to reach what the key `sql` or `base` may not use. The engine reads bodies with Python's JSON, as
# vLLM does, which takes other encodings, and of two equal fields the last.
TRICKS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "another case": ({"model": "LEGAL"}, {}),
    "a space before": ({"model": " legal"}, {}),
    "a space after": ({"model": "legal "}, {}),
    "a tab": ({"model": "legal\t"}, {}),
    "a zero-width space": ({"model": "legal\u200b"}, {}),
    "a Cyrillic letter": ({"model": "l\u0435gal"}, {}),
    "a full-width letter": ({"model": "\uff4cegal"}, {}),
    "a NUL": ({"model": "legal\x00"}, {}),
    "the prefix twice": ({"model": "qwen:qwen:legal"}, {}),
    "the prefix in another case": ({"model": "Qwen:legal"}, {}),
    "another model's prefix": ({"model": "llama:legal"}, {}),
    "a star": ({"model": "qwen:*"}, {}),
    "a list": ({"model": ["legal"]}, {}),
    "an object": ({"model": {"id": "legal"}}, {}),
    "a number": ({"model": 1}, {}),
    "the last of two": (b'{"model": "KEY", "model": "legal"}', {}),
    "an escaped name": (b'{"model": "KEY", "mod\\u0065l": "legal"}', {}),
    "an escaped value": (b'{"model": "l\\u0065gal"}', {}),
    "UTF-16": (json.dumps({"model": "legal"}).encode("utf-16"), {}),
    "UTF-16 without a mark": (json.dumps({"model": "legal"}).encode("utf-16-le"), {}),
    "UTF-32": (json.dumps({"model": "legal"}).encode("utf-32"), {}),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps({"model": "legal"}).encode(), {}),
    "a form": (b"model=legal", {"headers": {"content-type": "application/x-www-form-urlencoded"}}),
    "a multipart form": (
        b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nlegal\r\n--x--\r\n',
        {"headers": {"content-type": "multipart/form-data; boundary=x"}},
    ),
    "a query": ({"model": "KEY"}, {"path": f"{PATH}?model=legal"}),
    "a header": ({"model": "KEY"}, {"headers": {"model": "legal", "x-model": "legal"}}),
    "NaN": (b'{"model": "legal", "x": NaN}', {}),
    "a list around it": ([{"model": "legal"}], {}),
    "nothing": (b"", {}),
    "a comment": (b'{"model": "KEY"} {"model": "legal"}', {}),
    "another path": ({"model": "legal"}, {"path": "/v1/load_lora_adapter"}),
    "PUT": ({"model": "legal"}, {"method": "PUT"}),
    "the router's header": ({"model": "legal"}, {"headers": {"x-serve-app-router": "guess"}}),
}


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("key", ["sql", "base"])
async def test_no_trick_reaches_what_a_key_may_not_use(
    tmp_path: Path, key: str, trick: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the engine sees the request at all, it reads a name that the key may use."""
    monkeypatch.setattr("serve_app.access.gate.router_token", lambda: b"secret")
    app, engine = route(tmp_path)
    own = {"sql": "sql", "base": "qwen"}[key]
    body, more = TRICKS[trick]
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await send(app, key, text.replace(b"KEY", own.encode()), **{**more})
    assert answer.status_code < 500
    for seen in engine.bodies:
        assert (json.loads(seen).get("model") or "qwen") == own, (trick, seen)
    if answer.status_code == 200:
        assert answer.json() == {"asked": own}
    else:
        assert isinstance(answer.json()["error"], dict), answer.text


async def test_a_name_that_is_neither_is_a_404_as_openai_has_it(tmp_path: Path) -> None:
    """Whoever asks, if he may ask anything here."""
    app, _ = route(tmp_path)
    for key in ("base", "sql", "any"):
        answer = await send(app, key, {"model": "poet"})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["type"], error["param"]) == ("model_not_found", "invalid_request_error", "model")
        assert "'poet' does not exist at this route, which serves 'qwen' and its adapters" in error["message"]


async def test_a_key_of_adapters_alone_reads_nothing_of_the_model_but_the_list(tmp_path: Path) -> None:
    """Metrics and documents belong to the model. A key of something else does not even get in."""
    app, _ = route(tmp_path)
    for path, expected in (("/v1/models", 200), ("/metrics", 403), ("/health", 200), ("/v1/models/x", 403)):
        assert (await send(app, "sql", b"", method="GET", path=path)).status_code == expected
    assert (await send(app, "base", b"", method="GET", path="/metrics")).status_code == 200
    assert (await send(app, "other", b"", method="GET", path="/v1/models")).status_code == 403
    assert (await send(app, "other", {})).status_code == 403
    assert (await send(app, None, {})).status_code == 401


async def test_a_body_that_is_no_json_goes_to_the_engine_for_keys_that_may_use_all(tmp_path: Path) -> None:
    """Such as a form with a recording. Nobody has to know what it asks for."""
    app, engine = route(tmp_path)
    form = {"headers": {"content-type": "application/x-www-form-urlencoded"}}
    for key in ("any", "every"):
        assert (await send(app, key, b"model=sql", **form)).json() == {"error": "no JSON"}
    assert engine.bodies == [b"model=sql"] * 2
    assert (await send(app, "star", b"model=sql", **form)).status_code == 400


async def test_an_adapter_that_loads_or_has_failed_is_a_503_with_a_time(tmp_path: Path) -> None:
    """And its model answers."""
    app, engine = route(tmp_path)
    shelf = shelf_of(engine)
    shelf._entries["sql"] = Entry(AdapterState("loading"))
    with pytest.raises(ModelUnavailable) as caught:
        shelf.require("sql")
    assert caught.value.retry_after_s == 5.0
    own = WholeBody(AdapterRoute(engine.app(), shelf.require), CONFIG)
    answer = await send(own, None, {"model": "qwen:sql"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert (await send(own, None, {"model": "legal"})).json() == {"asked": "legal"}
    assert (await send(own, None, {"model": "qwen"})).json() == {"asked": "qwen"}
    assert (await send(app, "any", {"model": "sql"})).status_code == 200


async def test_an_adapter_that_the_engine_has_lost_is_no_404(tmp_path: Path) -> None:
    """A request may have waited for an engine that comes without it. One that was removed is a 404 as ever, and so is
    what the engine itself does not find."""
    app, engine = route(tmp_path)
    shelf: AdapterShelf = app._inside.adapters.__self__  # type: ignore[attr-defined]

    async def loses(*_: Any) -> None:
        del engine.adapters["sql"]
        shelf._entries["sql"].state = AdapterState("failed", "its files have changed")

    engine.before = loses
    answer = await send(app, "any", {"model": "sql"})
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "The model 'sql' has failed: its files have changed"
    assert answer.headers["retry-after"] == "60"

    async def removes(*_: Any) -> None:
        del engine.adapters["legal"], shelf._entries["legal"]

    engine.before = removes
    assert (await send(app, "any", {"model": "legal"})).json() == {"error": "no model legal"}
