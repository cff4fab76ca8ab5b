"""Streams whose replica is lost, with the pt engine itself behind the router."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from starlette.types import ASGIApp

from serve_app.config import ModelConfig
from serve_app.engines.pt.engine import PtEngine
from serve_app.router import dispatcher, suspicion
from serve_app.router import resume as resume_module
from serve_app.router.exchange import Exchange
from serve_app.router.observer import Nobody, Observer
from serve_app.router.suspicion import Death, Suspect
from serve_app.router.transcript import CannotResume, Transcript, WholeEvents, kind_of
from serve_app.router.upstream.protocol import ReplicaLost
from serve_app.wire.asgi import Headers, HttpRequest, call_asgi, decode_head
from serve_app.wire.census import UNCOUNTED_BYTES
from tests.fakes import ModelsFake, router_app

PROMPT = "What is max_memory?"
CHAT = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "stream": True}
TEXT = {"model": "demo", "prompt": PROMPT, "max_tokens": 30, "temperature": 0, "stream": True}


# How pt ends its streams when its thread has died.
DIED = b'data: {"error":{"message":"the pt engine has stopped","type":"server_error","param":null,\
"code":"model_unavailable"}}\n\n'


class CutAnswer:
    """An answer that breaks after `left` pieces, in the middle of an event if `half`; or ends as a dead engine's does.

    All others that were there are lost with it.
    """

    def __init__(self, app: ASGIApp, request: HttpRequest, left: int | None, half: bool, died: bool = False):
        self._died = died
        self._items = call_asgi(app, request)
        self._left = left
        self._half = half
        self.status, self.headers = 0, list[tuple[bytes, bytes]]()

    async def open(self) -> "CutAnswer":
        """Reads the head."""
        self.status, self.headers = decode_head(await anext(self._items))
        return self

    async def pieces(self) -> AsyncIterator[bytes]:
        """Event by event, as an engine that is slow makes them."""
        async for piece in self._items:
            for event in piece.split(b"\n\n")[:-1] if piece.endswith(b"\n\n") else [piece]:
                if self._left == 0 and self._died:
                    yield DIED
                    return
                if self._left == 0:
                    if self._half:
                        yield event[: len(event) // 2]
                    raise self.lost("it died")
                self._left = None if self._left is None else self._left - 1
                yield event + b"\n\n" if piece.endswith(b"\n\n") else event

    def lost(self, message: str) -> ReplicaLost:
        """With another request, which is lost once."""
        death = Death(time.monotonic(), present=2)
        Suspect().lost(death)
        return ReplicaLost(message, death)

    async def close(self) -> None:
        """Ends the application's work."""
        await self._items.aclose()


class Replicas:
    """One running engine, seen as replicas of which the first ones die: after so many events each."""

    headers: Headers

    def __init__(self, app: ASGIApp, cuts: list[int], half: bool = False, died: bool = False):
        self._died = died
        self._app = app
        self._cuts = cuts
        self._half = half
        self.paths: list[str] = []

    async def start(self) -> None:
        """As in `Upstream`."""

    async def close(self) -> None:
        """As in `Upstream`."""

    async def send(self, name: str, request: HttpRequest) -> CutAnswer:
        """As in `Upstream`. Only streams are cut."""
        self.paths.append(request.path)
        streams = b'"stream": true' in request.body or b'"stream":true' in request.body
        left = self._cuts.pop(0) if streams and self._cuts else None
        return await CutAnswer(self._app, request, left, self._half, self._died).open()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody needs time to see that a replica has died."""
    monkeypatch.setattr(dispatcher, "BACKOFF_S", (0.0,))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine() -> AsyncIterator[ASGIApp]:
    """The demo model."""
    fields = {"model": "serve-app/demo", "infer_backend": "pt", "device": "cpu", "dtype": "float32"}
    running = PtEngine(ModelConfig.from_args(fields), "demo")
    from serve_app.facts.checkpoint import with_absolute_paths

    running._config = with_absolute_paths(running._config)
    yield await running.start()
    await running.stop()


class Resumes(Nobody):
    """Counts how often a stream went on, and keeps what the record of each request says of that."""

    def __init__(self) -> None:
        self.count = 0
        self.told: list[int] = []

    def ended(self, exchange: Exchange) -> None:
        """Keeps it."""
        self.told.append(exchange.record.resumes)

    def resumed(self, exchange: Exchange) -> None:
        """Counts it."""
        self.count += 1


async def stream(
    replicas: Replicas, path: str, body: dict[str, Any], observer: Observer | None = None, **config: Any
) -> list[Any]:
    """The events that a client gets."""
    forwarder, app = router_app(ModelsFake(demo="ready"), replicas, **{"max_retries": 5, **config})
    forwarder.observer = observer or forwarder.observer
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as session:
        reply = await session.post(path, json=body)
    blocks = [block for block in reply.text.split("\n\n") if block.startswith("data: ")]
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


def text_of(events: list[Any]) -> str:
    """All that the model said."""
    choices = [event["choices"][0] for event in events if isinstance(event, dict) and event.get("choices")]
    return "".join(choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in choices)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
@pytest.mark.parametrize("half", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_a_stream_goes_on_wherever_it_was_cut(
    engine: ASGIApp, path: str, body: dict[str, Any], half: bool
) -> None:
    """One stream with one id, the text of the undisturbed one, one end, and the usage of the whole."""
    body = {**body, "stream_options": {"include_usage": True}}
    whole = await stream(Replicas(engine, []), path, body)
    expected, usage = text_of(whole), whole[-2]["usage"]
    assert len(whole) > 5
    # All at once, since the engine computes them together.
    streams = await asyncio.gather(*(stream(Replicas(engine, [cut], half), path, body) for cut in range(len(whole))))
    for cut, events in enumerate(streams):
        assert text_of(events) == expected, cut
        assert len({event["id"] for event in events[:-1]}) == 1
        assert events.count("[DONE]") == 1
        assert events[-1] == "[DONE]"
        reasons = [event["choices"][0]["finish_reason"] for event in events[:-1] if event["choices"]]
        assert [reason for reason in reasons if reason] == [
            event["choices"][0]["finish_reason"] for event in whole[:-1] if event["choices"]
        ][-1:]
        told = [event["usage"] for event in events[:-1] if event.get("usage")]
        assert (told[-1]["prompt_tokens"], told[-1]["completion_tokens"]) == (
            usage["prompt_tokens"],
            usage["completion_tokens"],
        )


@pytest.mark.asyncio(loop_scope="module")
async def test_several_losses_in_one_stream(engine: ASGIApp) -> None:
    """Each one goes on where the last one stopped, and the console is told of each."""
    observer = Resumes()
    expected = text_of(await stream(Replicas(engine, []), "/v1/completions", TEXT, observer))
    assert observer.count == 0
    events = await stream(Replicas(engine, [3, 2, 4, 1]), "/v1/completions", TEXT, observer)
    assert text_of(events) == expected
    assert (observer.count, observer.told) == (4, [0, 4])


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
async def test_a_stream_goes_on_where_the_engine_died_in_a_replica_that_lives(
    engine: ASGIApp, path: str, body: dict[str, Any]
) -> None:
    """It ends with an error event then, which the client does not see."""
    expected = text_of(await stream(Replicas(engine, []), path, body))
    for cut in (0, 1, 5):
        events = await stream(Replicas(engine, [cut, 3], died=True), path, body)
        assert (text_of(events), events.count("[DONE]")) == (expected, 1)
        assert not any("error" in event for event in events)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_stream_that_kills_replicas_is_given_up(engine: ASGIApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its second replica dies at the same place of the answer, and no other request was there both times."""
    monkeypatch.setattr(suspicion, "SETTLE_S", 0.01)
    replicas = Replicas(engine, [4, 0, 0, 0, 0])
    events = await stream(replicas, "/v1/completions", TEXT)
    assert events[-1]["error"]["code"] == "request_may_be_harmful"
    assert replicas.paths.count("/v1/completions") == 2


@pytest.mark.asyncio(loop_scope="module")
async def test_not_more_often_than_configured(engine: ASGIApp) -> None:
    """Then the stream ends with an error event."""
    events = await stream(Replicas(engine, [1, 1, 1, 1]), "/v1/completions", TEXT, max_retries=2)
    assert events[-1]["error"]["code"] == "model_unavailable"


@pytest.mark.asyncio(loop_scope="module")
async def test_the_end_of_all_time_is_a_timeout_in_a_resume_too(
    engine: ASGIApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No replica is to blame for it, and a client that asked again would wait as long."""

    async def never(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(dispatcher, "resume", never)
    events = await stream(Replicas(engine, [1]), "/v1/completions", TEXT, total_timeout_s=1.0)
    assert events[-1]["error"]["code"] == "timeout"
    assert "total_timeout_s" in events[-1]["error"]["message"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_resume_reads_and_writes_large_bodies_beside_the_event_loop(
    engine: ASGIApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All streams of a replica are lost at once. The stream's text is the same all the same."""
    loop_thread, seen = threading.get_ident(), set()

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*args: Any) -> Any:
            seen.add((name, threading.get_ident() == loop_thread))
            return real(*args)

        monkeypatch.setattr(owner, name, watched)

    for name in ("decode_body", "kind_of", "continuation"):
        watch(resume_module, name)
    padded = {**TEXT, "metadata": {"x": "y" * UNCOUNTED_BYTES}}
    expected = text_of(await stream(Replicas(engine, []), "/v1/completions", padded))
    assert text_of(await stream(Replicas(engine, [3]), "/v1/completions", padded)) == expected
    assert seen == {("decode_body", False), ("kind_of", False), ("continuation", False)}


async def test_a_request_of_too_many_values_is_not_taken_up_again() -> None:
    """It is counted before it is built, and no engine takes it either."""
    transcript = Transcript()
    transcript.add(b'data: {"choices": [{"text": "x"}]}\n\n')
    request = HttpRequest("POST", "/v1/completions", b"", [], b'{"prompt": [' + b"[]," * 60_000 + b"[]]}")
    with pytest.raises(CannotResume, match="Send several requests"):
        await resume_module.resume(Replicas(None, []), "demo", request, transcript)  # type: ignore[arg-type]


@pytest.mark.asyncio(loop_scope="module")
async def test_what_cannot_go_on_says_so(engine: ASGIApp) -> None:
    """Two choices are two streams in one. The try does not count as a stream that went on."""
    observer = Resumes()
    events = await stream(Replicas(engine, [3]), "/v1/completions", {**TEXT, "n": 2}, observer)
    assert "sets 'n'" in events[-1]["error"]["message"]
    assert (observer.count, observer.told) == (0, [0])


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"guided_json": {}}, "guided_json"),
    ],
)
def test_requests_whose_rest_would_differ_are_not_taken_up(fields: dict[str, Any], part: str) -> None:
    """A grammar would begin anew, and penalties count what now is prompt."""
    with pytest.raises(CannotResume, match=part):
        kind_of("/v1/chat/completions", {**CHAT, **fields})
    assert kind_of("/v1/chat/completions", {**CHAT, "n": 1, "tool_choice": "auto", "seed": 7}) == "chat"


def test_half_an_event_is_kept_back() -> None:
    """It cannot be taken back once it is sent."""
    cutter = WholeEvents()
    assert [cutter.feed(piece) for piece in (b"data: 1\n\nda", b"ta: 2\n", b"\ndata: 3")] == [
        b"data: 1\n\n",
        b"",
        b"data: 2\n\n",
    ]
    assert cutter.rest() == b"data: 3"


def test_a_long_stream_keeps_its_text_only() -> None:
    """The bytes of its events are read and dropped now and then."""
    transcript = Transcript()
    event = b'data: {"id": "a", "choices": [{"text": "x", "index": 0}]}\n\n'
    for _ in range(20_000):
        transcript.add(event)
        if transcript.is_full:
            transcript.read()
        assert transcript.unread_bytes <= 256 * 1024 + len(event)
    transcript.read()
    assert transcript.text == "x" * 20_000


def test_fields_without_an_effect_on_the_text_hinder_nothing() -> None:
    """SDKs and frameworks send some of them with every request."""
    asked = {"messages": [{"role": "user", "content": "x"}], "service_tier": "auto", "metadata": {"a": "b"}}
    assert kind_of("/v1/chat/completions", {**asked, "store": True, "modalities": ["text"]}) == "chat"
    with pytest.raises(CannotResume, match="modalities"):
        kind_of("/v1/chat/completions", {**asked, "modalities": ["audio"]})
