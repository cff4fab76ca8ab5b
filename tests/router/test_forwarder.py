"""Names, queues, limits and waiting, with a model that is a small application."""

import asyncio
import json
import threading
import time
from contextlib import suppress
from typing import Any

import httpx
import pytest
from starlette.types import Message

from serve_app.access.gate import Admission, Gate
from serve_app.access.keys import ApiKey
from serve_app.config import RouterConfig
from serve_app.errors import DeadlineExceeded, UnreadableAnswer
from serve_app.router import dispatcher, downstream, relay, suspicion
from serve_app.router.directory import ControllerSilent
from serve_app.router.model_status import ModelStatus
from serve_app.router.queues import ModelQueue
from serve_app.router.suspicion import Death, Suspect
from serve_app.router.upstream import protocol as upstream
from serve_app.router.upstream.protocol import EngineGone, NotOpen, ReplicaLost
from serve_app.wire.asgi import HttpRequest
from tests.fakes import Models, Reply, Said, forwarder_of, router_app, says

USES_VIRTUAL_CLOCK = True


async def ask(models: Models, body: dict[str, Any], path: str = "/v1/x", **config: Any) -> httpx.Response:
    """One request."""
    _, client = forwarder_of(models, **config)
    async with client:
        return await client.post(path, json=body)


async def test_an_alias_and_the_default_lead_to_the_model_by_its_own_name() -> None:
    """An engine refuses a name that is not its own."""
    models = Models(real=says(b"{}"))
    assert (await ask(models, {"model": "gpt"}, aliases={"gpt": "real"})).status_code == 200
    assert (await ask(models, {}, default_model="real")).status_code == 200
    assert models.asked == ["real", "real"]
    assert (await ask(models, {})).json()["error"]["param"] == "model"


@pytest.mark.parametrize("first", ["failed", "loading", says(b"{}", status=429), says(ReplicaLost("died"))])
async def test_a_stand_in_answers_for_a_model_that_is_down_or_full(first: Reply | str) -> None:
    """At once: nobody waits for a loading model while another is ready."""
    models = Models(a=first, b=says(b'{"from": "b"}'))
    reply = await ask(models, {"model": "a"}, fallbacks={"a": ["b"]}, max_retries=0)
    assert reply.json() == {"from": "b"}


async def test_names_change_while_requests_run() -> None:
    """What `user_config` replaces is read for each request."""
    forwarder, client = forwarder_of(Models(real=says(b"{}")))
    async with client:
        assert (await client.post("/v1/x", json={"model": "gpt"})).status_code == 404
        forwarder.config = RouterConfig(aliases={"gpt": "real"})
        assert (await client.post("/v1/x", json={"model": "gpt"})).status_code == 200


async def test_full_models_are_asked_once_and_the_last_answer_stands() -> None:
    """To ask them again would double the load of those that have none to spare."""
    models = Models(a=says(b"{}", status=429), b=says(b'{"b": 1}', status=429))
    reply = await ask(models, {"model": "a"}, fallbacks={"a": ["b"]})
    assert (reply.status_code, reply.json(), models.asked) == (429, {"b": 1}, ["a", "b"])
    models = Models(a="loading", b=says(b"{}", status=429))
    reply = await ask(models, {"model": "a"}, fallbacks={"a": ["b"]}, hold_timeout_s=0.1)
    assert (reply.status_code, models.asked) == (429, ["b"])


@pytest.mark.parametrize(("replies", "wait_s", "used"), [
    (says(5.0, b"{}"), 0.2, None),  # Its client left while the engine worked.
    (says(b"{}", status=400), 5, 0),
    (says(ReplicaLost("gone")), 20, 0),
    (says(b'{"usage": {"total_tokens": 12}}'), 5, 12),
])  # fmt: skip
async def test_what_a_request_used_of_its_key(
    replies: Reply, wait_s: float, used: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that was refused costs nothing; one that its client left keeps its estimate (None)."""
    told: list[int | None] = []

    async def release(_: Admission, tokens: int | None) -> None:
        told.append(tokens)

    monkeypatch.setattr(Admission, "release", release)
    _, client = forwarder_of(Models(a=replies), max_retries=0)
    async with client:
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await client.post("/v1/x", json={"model": "a", "max_tokens": 5})
    assert told == [used]


@pytest.mark.parametrize(
    ("pieces", "limits"),
    [
        ([5.0, b"{}"], {"first_byte_timeout_s": 0.1}),
        ([5.0, b"{}"], {"total_timeout_s": 0.1}),
        ([b"data: half an event", 5.0, b"x"], {"idle_timeout_s": 0.1}),
    ],
)
async def test_an_engine_that_worked_until_a_deadline_was_not_free(
    pieces: list[Any], limits: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key without tokens left could keep engines busy for ever: the estimate stands."""
    told: list[int | None] = []

    async def release(_: Admission, tokens: int | None) -> None:
        told.append(tokens)

    monkeypatch.setattr(Admission, "release", release)
    reply = await ask(Models(a=says(*pieces)), {"model": "a", "max_tokens": 5}, **limits)
    assert (told, "timeout" in reply.text) == ([None], True)


async def test_a_request_that_was_never_sent_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model stopped being ready as it was to be sent, and its client leaves while it waits for the model."""
    told: list[int | None] = []

    async def release(_: Admission, tokens: int | None) -> None:
        told.append(tokens)

    def closed(_: HttpRequest) -> tuple[int, list[Any]]:
        models.replies["a"] = "loading"
        return 200, [NotOpen("loading")]

    monkeypatch.setattr(Admission, "release", release)
    models = Models(a=closed)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5):
            await ask(models, {"model": "a", "max_tokens": 5})
    assert (models.asked, told) == (["a"], [0])


USED = b'{"usage": {"total_tokens": 9}}'


@pytest.mark.parametrize("pieces", [[USED], [b"data: %s\n\n" % USED, b"data: [DONE]\n\n"]])
async def test_an_answer_that_its_client_never_takes_is_not_free(
    pieces: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is a stream or not. It ends with the first deadline, and costs what the engine has made of it."""
    monkeypatch.setattr(downstream, "LAST_WORDS_TIMEOUT_S", 0.1)
    told: list[int | None] = []

    async def release(_: Admission, tokens: int | None) -> None:
        told.append(tokens)

    async def receive() -> Message:
        if not read:
            read.append(True)
            return {"type": "http.request", "body": b'{"model": "a"}', "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError("nothing comes")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    monkeypatch.setattr(Admission, "release", release)
    forwarder, read = forwarder_of(Models(a=says(*pieces)), idle_timeout_s=0.1)[0], list[bool]()
    scope = {"type": "http", "method": "POST", "path": "/v1/x", "query_string": b"", "headers": []}
    with suppress(DeadlineExceeded):
        await forwarder(scope, receive, send)
    assert told == [9]


@pytest.mark.parametrize("key", ["team", None])
async def test_a_model_hears_the_name_of_the_key_from_the_router_alone(
    key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the client says of it, also that it is for this connection alone."""
    heard: list[bytes] = []

    def reply(request: HttpRequest) -> tuple[int, list[Any]]:
        heard.extend(value for name, value in request.headers if name == b"x-serve-app-key-name")
        return 200, [b"{}"]

    identity = None if key is None else ApiKey(name=key, sha256="0" * 64)
    monkeypatch.setattr(Gate, "identity_of", lambda *_: identity)
    _, client = forwarder_of(Models(a=reply))
    headers = {"x-serve-app-key-name": "another", "connection": "x-serve-app-key-name"}
    async with client:
        for sent in ({}, headers, {"x-serve-app-key-name": "another"}):
            await client.post("/v1/x", json={"model": "a"}, headers=sent)
    assert heard == ([key.encode()] * 3 if key else [])


async def test_a_path_is_told_without_serves_root_path() -> None:
    """Replicas add their own."""
    models = Models(a=says(b"{}"))
    _, app = router_app(models, models)
    seen: list[str] = []
    send = models.send

    async def remembering(name: str, request: HttpRequest) -> Said:
        seen.append(request.path)
        return await send(name, request)

    models.send = remembering  # type: ignore[method-assign]
    transport = httpx.ASGITransport(app=app, root_path="/api")
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        assert (await client.post("/api/v1/x", json={"model": "a"})).status_code == 200
    assert seen == ["/v1/x"]


async def test_a_request_waits_for_a_model_that_loads() -> None:
    """Up to a deadline, and so many at a time."""
    models = Models(a="loading")
    waiting = asyncio.create_task(ask(models, {"model": "a"}, hold_timeout_s=20))
    await asyncio.sleep(0.1)
    models.replies["a"] = says(b"{}")
    assert (await waiting).status_code == 200
    late = await ask(Models(a="loading"), {"model": "a"}, hold_timeout_s=0.1)
    assert (late.status_code, late.headers["retry-after"]) == (503, "7")
    forwarder, client = forwarder_of(Models(a="loading"), hold_timeout_s=1, max_held_requests=1)
    async with client:
        replies = await asyncio.gather(*(client.post("/v1/x", json={"model": "a"}) for _ in range(3)))
    assert sorted(reply.status_code for reply in replies) == [429, 429, 503]
    assert not any(queue.held or queue.waiting for queue in forwarder._dispatcher.queues.values())


async def test_a_model_that_is_asleep_is_woken_and_its_requests_wait() -> None:
    """Each makes a call of its own, by which Serve counts them; one that may not wait makes one and is refused."""
    models = Models(a="asleep")
    _, client = forwarder_of(models)
    async with client:
        replies = await asyncio.gather(*(client.post("/v1/x", json={"model": "a"}) for _ in range(3)))
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    assert (models.calls, models.woken) == (3, ["a", "a", "a"])
    models = Models(a="asleep")
    _, client = forwarder_of(models, max_held_requests=0)
    async with client:
        refused = [await client.post("/v1/x", json={"model": "a"}) for _ in range(2)]
        assert [(reply.status_code, reply.headers["retry-after"]) for reply in refused] == [(503, "7"), (503, "7")]
        await asyncio.sleep(0.4)
        assert models.calls == 1
        assert (await client.post("/v1/x", json={"model": "a"})).status_code == 200
    late = Models(a="asleep")
    late.wakes_after_s = 5.0
    reply = await ask(late, {"model": "a"}, hold_timeout_s=0.2)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "7")


async def test_what_no_engine_takes_wakes_no_model() -> None:
    """It would push another one out of the memory that they share, only to be refused."""
    models = Models(a="asleep")
    body = {"model": "a", "messages": [{"role": "user", "content": "x"}]}
    reply = await ask(models, body | {"temperature": -1}, "/v1/chat/completions")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "temperature")
    assert (models.calls, models.woken, models.asked) == (0, [], [])
    assert (await ask(models, body | {"temperature": 1}, "/v1/chat/completions")).status_code == 200
    assert models.woken == ["a"]


async def test_a_stand_in_does_not_answer_for_a_model_that_is_asleep() -> None:
    """Asleep is not down: it would never wake."""
    models = Models(a="asleep", b=says(b"{}"))
    reply = await ask(models, {"model": "a"}, fallbacks={"a": ["b"]})
    assert (reply.status_code, models.asked) == (200, ["a"])


PROGRESS = {"x-serve-app-progress": "1"}


async def test_a_client_that_streams_may_be_told_how_long_it_waits(caplog: pytest.LogCaptureFixture) -> None:
    """In comments before the answer, which readers of events skip. What fails then is an event, and is counted."""
    _, client = forwarder_of(Models(a="asleep"))
    async with client:
        told = await client.post("/v1/x", json={"model": "a", "stream": True}, headers=PROGRESS)
        assert told.text.startswith(": loading 'a', about 7 s left\n\ndata: 1\n\ndata: [DONE]\n\n")
        assert (told.status_code, told.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    _, client = forwarder_of(Models(a="asleep"))
    async with client:
        whole = await client.post("/v1/x", json={"model": "a"}, headers=PROGRESS)
        assert not whole.text.startswith(":")
    _, client = forwarder_of(Models(a="loading"), hold_timeout_s=0.1)
    async with client:
        late = await client.post("/v1/x", json={"model": "a", "stream": True}, headers=PROGRESS)
    _, event, _ = late.text.split("\n\n")
    assert (late.status_code, json.loads(event[6:])["error"]["code"]) == (200, "model_unavailable")
    logged = [json.loads(record.getMessage()) for record in caplog.records if record.getMessage().startswith("{")]
    assert logged[-1]["error_code"] == "model_unavailable"
    models = Models(a="loading")
    _, client = forwarder_of(models)
    async with client:
        asking = asyncio.create_task(client.post("/v1/x", json={"model": "a", "stream": True}, headers=PROGRESS))
        await asyncio.sleep(0.1)
        models.replies["a"] = says(b'{"error":\n{"code": 404}}', status=404)
        refused = await asking
    assert refused.text.endswith('data: {"error": {"code": 404}}\n\n')


async def test_a_client_that_streams_may_be_told_that_its_model_is_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the measured seconds of a wake. A model that shares no memory is not spoken of."""
    models = Models(a=says(b"data: 1\n\n", b"data: [DONE]\n\n"), b=says(b"data: 2\n\n", b"data: [DONE]\n\n"))
    send = models.send

    async def late(name: str, request: HttpRequest) -> Any:
        await asyncio.sleep(0.1)
        return await send(name, request)

    monkeypatch.setattr(models, "send", late)
    _, client = forwarder_of(models)
    async with client:
        parked, plain = [
            await client.post("/v1/x", json={"model": name, "stream": True}, headers=PROGRESS) for name in "ab"
        ]
    assert parked.text.startswith(": waking 'a', which takes about 1.5 s once it is its turn\n\ndata: 1\n\n")
    assert plain.text.startswith("data: 2\n\n")


async def test_a_refusal_that_is_no_json_or_breaks_is_an_event_too() -> None:
    """For a client whose stream has begun with comments."""
    for reply in (says(b"bad gateway", status=404), says(ReplicaLost("died"), status=404)):
        models = Models(a="loading")
        _, client = forwarder_of(models, max_retries=0)
        async with client:
            body = {"model": "a", "stream": True}
            asking = asyncio.create_task(client.post("/v1/x", json=body, headers=PROGRESS))
            await asyncio.sleep(0.1)
            models.replies["a"] = reply
            refused = await asking
        assert json.loads(refused.text.split("\n\n")[1][6:])["error"]["message"]


async def test_a_large_answer_becomes_an_event_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings, say, for a client that asked for a stream with comments: they may have a hundred megabytes."""
    loop_thread, seen = threading.get_ident(), list[bool]()
    real = relay.msgspec.json.format

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(threading.get_ident() == loop_thread)
        return real(*args, **options)

    monkeypatch.setattr(relay.msgspec.json, "format", watched)
    models = Models(a="loading")
    _, client = forwarder_of(models)
    async with client:
        asking = asyncio.create_task(client.post("/v1/x", json={"model": "a", "stream": True}, headers=PROGRESS))
        await asyncio.sleep(0.1)
        models.replies["a"] = says(b'{"data":\n[' + b"0.5, " * 20_000 + b"1]}")
        answer = await asking
    assert json.loads(answer.text.split("\n\n")[1][6:]) == {"data": [0.5] * 20_000 + [1]}
    assert seen == [False]


async def test_what_fails_in_the_router_is_an_error_and_no_broken_connection() -> None:
    """Before the first byte."""
    reply = await ask(Models(a=lambda _: 1 / 0), {"model": "a"})  # type: ignore[arg-type,return-value]
    assert (reply.status_code, "ZeroDivisionError" in reply.json()["error"]["message"]) == (500, True)


async def test_a_model_that_fails_while_it_wakes_lets_nobody_wait() -> None:
    """The call that was to wake it may hang for ever."""
    models = Models(a="asleep")
    models.wakes_after_s = 60.0
    asking = asyncio.create_task(ask(models, {"model": "a"}))
    await asyncio.sleep(0.1)
    models.replies["a"] = "failed"
    async with asyncio.timeout(5):
        assert (await asking).status_code == 503


async def test_who_waits_waits_on_while_the_controller_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be restarting."""
    models = Models(a="loading")
    asking = asyncio.create_task(ask(models, {"model": "a"}))
    await asyncio.sleep(0.1)
    find = models.find

    async def silent(_: str) -> ModelStatus:
        raise ControllerSilent("no answer")

    monkeypatch.setattr(models, "find", silent)
    await asyncio.sleep(0.6)
    monkeypatch.setattr(models, "find", find)
    models.replies["a"] = says(b"{}")
    assert (await asking).status_code == 200


async def test_a_model_that_stops_being_ready_in_between_is_waited_for() -> None:
    """That is no try: nothing was sent."""
    replies = iter([NotOpen("loading")] * 5)
    models = Models(a=lambda _: (200, [next(replies, b"{}")]))
    assert (await ask(models, {"model": "a"}, max_retries=0)).status_code == 200


async def test_a_reader_that_stands_still_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be told either, and must not hold its place for ever."""
    monkeypatch.setattr(downstream, "LAST_WORDS_TIMEOUT_S", 0.2)
    forwarder, _ = forwarder_of(Models(a=says(*[b"data: 1\n\n"] * 3)), total_timeout_s=0.3)
    body = [{"type": "http.request", "body": b'{"model": "a"}', "more_body": False}]

    async def receive() -> Any:
        return body.pop() if body else await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(3600)

    scope = {"type": "http", "method": "POST", "path": "/v1/x", "query_string": b"", "headers": []}
    async with asyncio.timeout(5):
        with pytest.raises(DeadlineExceeded):
            await forwarder(scope, receive, send)


async def test_a_lost_request_is_sent_again_before_its_first_byte() -> None:
    """As often as configured; a proxy's 502 counts as lost too."""
    replies = iter([(200, [ReplicaLost("died")]), (502, [b"bad gateway"]), (200, [b'{"a": 1}'])])
    models = Models(a=lambda _: next(replies))
    assert (await ask(models, {"model": "a"}, max_retries=2)).json() == {"a": 1}
    again = await ask(Models(a=says(ReplicaLost("died"))), {"model": "a"}, max_retries=1)
    assert (again.status_code, "2 tries" in again.json()["error"]["message"]) == (503, True)


async def test_an_answer_that_cannot_be_read_is_told_once() -> None:
    """Another replica would say the same."""
    models = Models(a=says(UnreadableAnswer("a header of 70000 bytes")))
    reply = await ask(models, {"model": "a"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (502, "unreadable_answer")
    assert models.asked == ["a"]


async def test_an_engine_that_dies_before_its_first_token_costs_a_retry_whatever_the_endpoint() -> None:
    """Its head is out by then, so it says so in the first event."""
    died = b'data: {"error": {"message": "the pt engine has stopped", "code": "model_unavailable"}}\n\n'
    replies = iter([(200, [died, b""]), (200, [b"data: 1\n\n", b"data: [DONE]\n\n"])])
    reply = await ask(Models(a=lambda _: next(replies)), {"model": "a"})
    assert reply.text.startswith("data: 1\n\ndata: [DONE]\n\n")


def deadly(*beside: Suspect) -> Reply:
    """A replica that dies with each request, and with these others."""

    def reply(_: HttpRequest) -> tuple[int, list[Any]]:
        death = Death(time.monotonic(), 1 + len(beside))
        for suspect in beside:
            suspect.lost(death)
            suspect.cleared()
        return 200, [ReplicaLost("died", death)]

    return reply


async def test_a_request_that_kills_replicas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """After three, with a status that has no SDK send it again. The stand-in is spared."""
    monkeypatch.setattr(suspicion, "SETTLE_S", 0.01)
    models = Models(a=deadly(Suspect()), b=says(b"{}"))
    reply = await ask(models, {"model": "a"}, fallbacks={"a": ["b"]}, max_retries=9)
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "request_may_be_harmful")
    assert models.asked == ["a"] * 3
    assert "3 replicas of 'a' died" in reply.json()["error"]["message"]


async def test_a_request_that_is_lost_alone_is_sent_as_often_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others that were there went on, so that no replica has died."""
    monkeypatch.setattr(suspicion, "SETTLE_S", 0.01)
    monkeypatch.setattr(dispatcher, "BACKOFF_S", (0.01,))
    models = Models(a=lambda _: (200, [ReplicaLost("reset", Death(time.monotonic(), present=4))]))
    reply = await ask(models, {"model": "a"}, max_retries=4)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_unavailable")
    assert models.asked == ["a"] * 5


async def test_engines_that_are_gone_are_waited_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no try, since nothing was sent; but Serve may see nothing wrong with them for ever."""
    replies = iter([EngineGone("gone")] * 5)
    models = Models(a=lambda _: (200, [next(replies, b"{}")]))
    assert (await ask(models, {"model": "a"}, max_retries=0)).status_code == 200
    monkeypatch.setattr(upstream, "REPLACED_WITHIN_S", 0.5)
    reply = await ask(Models(a=says(EngineGone("gone"))), {"model": "a"}, max_retries=0)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_unavailable")


async def test_a_full_queue_is_a_429_with_the_time_that_it_needs() -> None:
    """One model's flood leaves the others alone."""
    models = Models(slow=says(0.5, b"{}"), other=says(b"{}"))
    forwarder, client = forwarder_of(models, max_waiting_requests=2)
    async with client:
        flood = [asyncio.create_task(client.post("/v1/x", json={"model": "slow"})) for _ in range(4)]
        await asyncio.sleep(0.1)
        assert (await client.post("/v1/x", json={"model": "other"})).status_code == 200
        replies = await asyncio.gather(*flood)
    assert sorted(reply.status_code for reply in replies) == [200, 200, 429, 429]
    assert all(reply.headers["retry-after"] for reply in replies if reply.status_code == 429)
    assert forwarder._dispatcher.queues["slow"].waiting == 0


@pytest.mark.parametrize(
    ("limits", "pieces", "part"),
    [
        ({"idle_timeout_s": 0.2}, [b"data: 1\n\n", 5.0, b"data: 2\n\n"], "idle_timeout_s"),
        ({"total_timeout_s": 0.3}, [b"data: 1\n\n", *[0.05, b"data: 2\n\n"] * 50], "total_timeout_s"),
    ],
)
async def test_a_stream_that_takes_too_long_says_so(limits: dict[str, float], pieces: list[Any], part: str) -> None:
    """With an event, and its end."""
    reply = await ask(Models(a=says(*pieces)), {"model": "a"}, **limits)
    assert part in reply.text
    assert '"code": "timeout"' in reply.text


async def test_no_first_byte_in_time_is_a_504() -> None:
    """The model is named."""
    reply = await ask(Models(a=says(5.0, b"{}")), {"model": "a"}, first_byte_timeout_s=0.1)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")


async def test_large_headers_and_climbing_paths_are_refused() -> None:
    """Before anything is sent."""
    models = Models(a=says(b"{}"))
    _, client = forwarder_of(models)
    async with client:
        large = await client.post("/v1/x", json={"model": "a"}, headers={"x-big": "x" * 40_000})
        climbing = await client.post("/%2e%2e/other/v1/x", json={"model": "a"})
    assert [reply.status_code for reply in (large, climbing)] == [431, 400]
    assert models.asked == []


async def test_a_name_that_nobody_has_leaves_nothing_behind() -> None:
    """Clients cannot fill the router's memory with names."""
    forwarder, client = forwarder_of(Models(a=says(b"{}")))
    async with client:
        for number in range(20):
            assert (await client.post("/v1/x", json={"model": f"made-up-{number}"})).status_code == 404
    assert forwarder._dispatcher.queues == {}


def test_the_time_to_wait_follows_the_measured_rate() -> None:
    """Ten waiting at two a second: five seconds."""
    now = [0.0]
    queue = ModelQueue("a", clock=lambda: now[0])
    assert queue.retry_after_s() == 5.0  # nothing is known
    for _ in range(20):
        now[0] += 0.5
        queue.answered()
    queue.waiting = 10
    assert queue.retry_after_s() == pytest.approx(5.0, rel=0.1)
