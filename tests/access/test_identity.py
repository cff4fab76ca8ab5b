"""Each process looks a key up once and splits a body once, and nobody outside can say whose a request is."""

import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from serve_app.access import keys as keys_module
from serve_app.access.door import Inside, OuterDoor
from serve_app.access.gate import Gate, KeyedApp, KeyedRouter
from serve_app.access.identity import known_identity, with_identity
from serve_app.access.keys import ApiKey, KeySource
from serve_app.config import RouterConfig
from serve_app.engines.vllm.guard import Guard, guarded
from serve_app.errors import Forbidden, ForeignPage, Unauthorized
from serve_app.replica.whole_body import WholeBody
from serve_app.wire import body as body_module
from serve_app.wire.arrival import known_body, with_body
from serve_app.wire.asked_model import Asked
from serve_app.wire.body import RequestBody
from tests.builders import model_config
from tests.fakes import AUTH, KEY, LocalLimiter, Models, make_gate, router_app, says

CHAT = "/v1/chat/completions"


class Counter:
    """How often keys were hashed and bodies split."""

    def __init__(self) -> None:
        self.hashes = self.splits = 0

    def sha256(self, data: bytes) -> Any:
        """As hashlib's."""
        self.hashes += 1
        return SHA256(data)

    def decode(self, content: bytes) -> Any:
        """As msgspec's."""
        self.splits += 1
        return DECODER.decode(content)


SHA256, DECODER = hashlib.sha256, body_module._OBJECT


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """Counts from here on."""
    counter = Counter()
    monkeypatch.setattr(keys_module.hashlib, "sha256", counter.sha256)
    monkeypatch.setattr(body_module, "_OBJECT", counter)
    return counter


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An engine that tells the body that it got."""
    body = await Request(scope, receive).body()
    await JSONResponse({"body": body.decode(), "usage": {"total_tokens": 3}})(scope, receive, send)


async def ask(app: Any, **headers: str) -> httpx.Response:
    """One chat, through the whole application."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as http:
        body = {"model": "other", "messages": [], "stream": True}
        return await http.post(CHAT, json=body, headers=headers)


async def test_a_models_process_looks_up_and_splits_once(tmp_path: Path, counter: Counter) -> None:
    """By route: door, gate with a limit of tokens, limits of the body, and vLLM's guard, which sees what is sent on."""
    gate, limiter = make_gate(tmp_path, "tokens_per_minute: 1000")
    counter.hashes = 0
    engine = WholeBody(guarded(echo, Guard(100, 10)), model_config())
    door = OuterDoor(KeyedApp(engine, gate, "m"), Inside(gate, RouterConfig, "m"))
    reply = await ask(door, **AUTH)
    assert json.loads(reply.json()["body"])["stream_options"] == {"include_usage": True}
    assert (counter.hashes, counter.splits, limiter.settled) == (1, 1, [3])


async def test_the_routers_process_looks_up_and_splits_once(tmp_path: Path, counter: Counter) -> None:
    """By name: door, gate, names, limits, and the body for a model by another name."""
    gate, _ = make_gate(tmp_path, "tokens_per_minute: 1000")
    counter.hashes = 0
    models = Models(m=says(b"{}"))
    _, app = router_app(models, models, gate, aliases={"other": "m"})
    reply = await ask(OuterDoor(KeyedRouter(app, gate), Inside(gate, RouterConfig)), **AUTH)
    assert (reply.status_code, models.asked) == (200, ["m"])
    assert (counter.hashes, counter.splits) == (1, 1)


async def test_no_header_says_whose_a_request_is(tmp_path: Path) -> None:
    """Past the door, and where there is none."""
    gate, _ = make_gate(tmp_path)
    keyed = KeyedApp(echo, gate, "m")
    forged = {"serve_app.identity": "a", "serve-app-identity": "a", "x-serve-app-key-name": "a", "state": "a"}
    for app in (OuterDoor(keyed, Inside(gate, RouterConfig, "m")), keyed, KeyedRouter(echo, gate)):
        assert (await ask(app, **forged)).status_code == 401


def test_an_identity_stays_in_its_process(tmp_path: Path) -> None:
    """Serve's Python proxy pickles the scope of a request: the replica finds nothing, and asks itself."""
    key = make_gate(tmp_path)[0].identify(KEY, Asked("m"))
    scope, _ = with_body(with_identity({"type": "http", "headers": KEY}, key), _none, RequestBody(b"{}" * 10_000))
    arrived = pickle.loads(pickle.dumps(scope))  # noqa: S301  as Serve does
    assert (known_identity(arrived), known_body(arrived)) == (None, None)
    assert len(pickle.dumps(scope)) < 1000


async def _none() -> Any:
    raise AssertionError("nothing is received")


def test_a_known_key_opens_its_own_models_alone(tmp_path: Path) -> None:
    """Whatever the door was told of the model."""
    gate, _ = make_gate(tmp_path)
    scope = with_identity({"headers": []}, gate.identify(KEY))
    assert isinstance(gate.identity_of(scope, Asked("m")), ApiKey)
    with pytest.raises(Forbidden):
        gate.identity_of(scope, Asked("other"))


async def test_a_key_that_was_revoked_is_refused_at_the_next_request(tmp_path: Path) -> None:
    """The door looks it up anew for each."""
    now = [0.0]
    gate, _ = make_gate(tmp_path)
    file = tmp_path / "keys.yaml"
    gate = Gate(KeySource(file, {}, lambda: now[0]), LocalLimiter())
    door = OuterDoor(KeyedApp(echo, gate, "m"), Inside(gate, RouterConfig, "m"))
    assert (await ask(door, **AUTH)).status_code == 200
    file.write_text("keys: []\n")
    now[0] = 2.0
    assert (await ask(door, **AUTH)).status_code == 401


def test_who_came_in_while_nobody_needed_a_key_is_asked_once_keys_are_needed() -> None:
    """Keys have come up elsewhere between the door and the gate. Pages of other sites stay out before that."""
    source = KeySource(None, {})
    gate = Gate(source, LocalLimiter())
    scope = with_identity({"headers": []}, gate.identify([]))
    assert gate.identity_of(scope) is None
    source.shut()
    with pytest.raises(Unauthorized):
        gate.identity_of(scope)
    with pytest.raises(ForeignPage):
        Gate(KeySource(None, {}), LocalLimiter()).identity_of({"headers": [(b"origin", b"https://evil.example")]})
