"""The last requests, as the router saw them."""

import asyncio
import json
from typing import Any

import httpx
import msgspec

from serve_app.console.ledger import Ledger
from serve_app.console.prompts import prompt_of
from serve_app.console.requests import MOST_PROMPT_CHARACTERS, MOST_REQUESTS, RequestLog, Row
from serve_app.router.console import RouterParts
from serve_app.router.exchange import Exchange
from serve_app.router.residency import Residency
from serve_app.router.upstream.protocol import ReplicaLost
from serve_app.wire.body import RequestBody
from tests.fakes import Models, router_app, says

USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}\n\n'
TOKEN = b'data: {"id":"a","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'  # noqa: E501
DONE = b"data: [DONE]\n\n"


class Watched:
    """A router before these models, and what its console keeps."""

    def __init__(self, models: Models, **config: Any):
        self.now = 1000.0
        forwarder, self.app = router_app(models, models, **config)
        parts = RouterParts(
            "router", "abc", models, forwarder, forwarder._gate, Residency(dict), lambda: forwarder.config, True  # type: ignore[arg-type]
        )  # fmt: skip
        self.ledger = Ledger(parts, lambda: self.now)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url="http://router")
        forwarder.observer = self.ledger

    async def ask(self, model: str = "m", **fields: Any) -> httpx.Response:
        """A chat request."""
        body = {"model": model, "messages": [{"role": "user", "content": "What is it?"}], **fields}
        return await self.http.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine"})

    def rows(self) -> list[Row]:
        """The requests, the oldest first."""
        return self.ledger.requests.rows()


async def test_a_request_is_shown_while_it_runs_and_when_it_is_over() -> None:
    """With its times and tokens, and without its prompt."""
    watched = Watched(Models(m=says(TOKEN, 0.2, TOKEN, TOKEN, USAGE, DONE)))
    task = asyncio.create_task(watched.ask(stream=True))
    await asyncio.sleep(0.1)
    (running,) = watched.rows()
    assert (running.outcome, running.model, running.status, running.total_ms) == ("running", "m", 200, None)
    await watched.ledger.tick()
    (active,) = watched.ledger.queued().values()
    assert active.active == 1
    await task
    (row,) = watched.rows()
    assert (row.id, row.outcome, row.streamed, row.request_id) == (running.id, "ok", True, "mine")
    assert (row.prompt_tokens, row.completion_tokens, row.prompt) == (7, 3, msgspec.UNSET)
    assert row.total_ms is not None
    assert row.total_ms > 100
    assert row.first_ms is not None
    assert row.first_ms < row.total_ms
    assert "prompt" not in json.loads(msgspec.json.encode(row))
    (entry,) = watched.ledger.traffic.rings()["m"].values()
    assert (entry.requests, entry.errors, entry.tokens, entry.active) == (1, 0, 3, 1)


async def test_only_streams_have_a_time_to_the_first_token() -> None:
    """An answer that comes whole, such as embeddings, would count its whole time as that."""
    usage = b'{"usage":{"prompt_tokens":7,"completion_tokens":30,"total_tokens":37}}'
    watched = Watched(Models(m=says(0.2, usage), s=says(TOKEN, 0.2, USAGE, DONE)))
    await watched.ask()
    await watched.ask("s", stream=True)
    rings = watched.ledger.traffic.rings()
    ((whole,), (stream,)) = (rings[name].values() for name in ("m", "s"))
    assert (whole.requests, whole.tokens, whole.firsts) == (1, 30, {})
    assert (stream.requests, sum(stream.firsts.values())) == (1, 1)
    assert watched.rows()[0].first_ms is not None  # Among the requests, it is when the answer began.


async def test_refused_and_failed_requests_are_told_apart() -> None:
    """What a client did wrong is no error of the model."""
    lost = ReplicaLost("gone")
    models = Models(
        m=says(b'{"error":{}}', status=400), broken=says(b'{"error":{}}', status=500), failed="failed",
        half=says(TOKEN, lost), **{"full": says(b'{"error":{}}', status=429)},
    )  # fmt: skip
    watched = Watched(models, max_retries=0)
    for model in ("m", "broken", "failed", "full", "nobody"):
        await watched.ask(model)
    await watched.ask("half", stream=True)
    assert [(row.model, row.outcome) for row in watched.rows()] == [
        ("m", "refused"), ("broken", "failed"), ("failed", "refused"), ("full", "refused"), ("unknown", "refused"),
        ("half", "failed"),
    ]  # fmt: skip
    errors = {
        name: sum(entry.errors for entry in ring.values()) for name, ring in watched.ledger.traffic.rings().items()
    }
    assert errors == {"m": 0, "broken": 1, "failed": 1, "full": 1, "half": 1}
    watched.now += 11
    await watched.ledger.tick()
    told = {event.model: event.text for event in watched.ledger.events.since() if event.kind == "refused"}
    assert told[""] == "1 request was refused (model_not_found)."
    assert set(told) == {"m", "failed", "full", ""}


async def test_a_client_that_leaves_a_stream_has_left() -> None:
    """Also after the head with its status, whether the client's end or Serve's cancels the request."""
    watched = Watched(Models(m=says(TOKEN, 5.0, TOKEN, DONE)))
    task = asyncio.create_task(watched.ask(stream=True))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [(row.status, row.outcome) for row in watched.rows()] == [(200, "left")]


async def test_a_lost_replica_is_an_event_at_once() -> None:
    """Serve's own status lags behind."""
    answers = iter([ReplicaLost("gone"), None])

    def reply(_: Any) -> tuple[int, list[Any]]:
        lost = next(answers)
        return 200, [lost or b"{}"]

    watched = Watched(Models(m=reply))
    assert (await watched.ask()).status_code == 200
    await watched.ledger.tick()
    assert [(event.kind, event.model) for event in watched.ledger.events.since()] == [("retried", "m")]
    assert [(row.retries, row.outcome) for row in watched.rows()] == [(1, "ok")]


async def test_prompts_are_kept_only_if_the_config_says_so() -> None:
    """And then their beginning alone."""
    watched = Watched(Models(m=says(b"{}")), console_keeps_prompts=True)
    await watched.ask()
    await watched.ask(messages=[{"role": "user", "content": [{"type": "text", "text": "y" * 10_000}]}])
    assert [row.prompt for row in watched.rows()] == ["What is it?", "y" * MOST_PROMPT_CHARACTERS]
    silent = Watched(Models(m=says(b"{}")))
    await silent.ask()
    assert [row.prompt for row in silent.rows()] == [msgspec.UNSET]


def test_a_prompt_is_read_of_any_body() -> None:
    """Also of one that makes no sense."""
    for fields, text in (
        ({"prompt": ["one", "two"]}, "two"), ({"prompt": [1, 2, 3]}, "(3 tokens)"), ({"input": "text"}, "text"),
        ({"query": "q"}, "q"), ({}, ""), ({"messages": 5}, ""), ({"messages": [{"content": None}]}, ""),
        ({"messages": []}, ""), ({"input": "x" * 2**21}, "(too long to be shown)"),
    ):  # fmt: skip
        assert prompt_of(RequestBody(json.dumps(fields).encode())) == text
    assert prompt_of(RequestBody(b"[1]")) == ""
    assert prompt_of(RequestBody(b"{")) == ""


async def test_the_log_is_bounded_and_its_ids_rise() -> None:
    """Whatever runs. A request that is too old to be shown is still counted when it ends."""
    log = RequestLog("router", lambda: 1000.0)
    metrics: Any = Models()

    async def send(_: Any) -> None:
        pass

    exchanges = [Exchange.begin(f"{number}", "/v1/x", send, metrics) for number in range(2 * MOST_REQUESTS)]
    for exchange in exchanges:
        log.began(exchange)
    rows = log.rows()
    assert [row.request_id for row in rows] == [str(number) for number in range(MOST_REQUESTS, 2 * MOST_REQUESTS)]
    assert [row.id for row in rows] == sorted({row.id for row in rows})
    assert rows[-1].id < 2**53
    assert len(log.running()) == 2 * MOST_REQUESTS
    revision = log.revision
    exchanges[0].downstream.status = exchanges[-1].downstream.status = 200
    found = log.ended(exchanges[0])
    assert found is not None
    assert found[1] == "ok"
    log.ended(exchanges[-1])
    assert [row.request_id for row in log.rows(revision)] == [str(2 * MOST_REQUESTS - 1)]
    assert log.rows(log.revision) == []
    assert log.ended(exchanges[0]) is None
    assert len(log._revisions) == MOST_REQUESTS


def test_the_ids_of_two_routers_differ() -> None:
    """Though they count at the same moment."""

    async def send(_: Any) -> None:
        pass

    ids = []
    for name in ("one", "two"):
        log = RequestLog(name, lambda: 1000.0)
        log.began(Exchange.begin("x", "/v1/x", send, Models()))  # type: ignore[arg-type]
        ids.append(log.rows()[0].id)
    assert ids[0] != ids[1]
