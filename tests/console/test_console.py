"""What the router answers below /ui."""

import asyncio
import json
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.access.door import Inside, OuterDoor
from serve_app.access.gate import Gate, KeyedRouter
from serve_app.access.keys import KeyRing
from serve_app.config import RouterConfig
from serve_app.console import cluster_watch
from serve_app.console import console as console_module
from serve_app.console.console import ServedConsole
from serve_app.console.moment import deltas_for, state_of
from serve_app.console.traffic import INTERVAL_S
from serve_app.router.console import RouterParts
from serve_app.router.deployment import build_app
from serve_app.router.residency import Residency
from serve_app.status.cluster_status import ClusterStatus, ModelView, ReplicaView
from serve_app.status.reader import Reading
from tests.fakes import AUTH, OUTSIDE, Models, ModelsFake, make_gate, open_gate, router_app, says

RESIDENCY = Residency(dict)
# Consoles begin at the start of an interval of traffic, so that none ends during a test.
BEGINS = 1_764_500_000.0


def console_app(
    gate: Gate, is_loopback: bool = True, upstream: Any = None, directory: Any = None, **config: Any
) -> tuple[ServedConsole, Any]:
    """A console in a router, behind its gate and its door. Nothing runs in its background."""
    directory = directory or ModelsFake(m="ready", other="ready")
    forwarder, _ = router_app(directory, upstream, gate, **config)
    parts = RouterParts(
        "router", "abc", directory, forwarder, gate, RESIDENCY, lambda: forwarder.config, is_loopback
    )  # fmt: skip
    begun = time.monotonic()
    console = ServedConsole(
        parts, lambda: BEGINS + time.monotonic() - begun, read_status=reads_nothing, tell=lambda now: None
    )
    forwarder.observer = console
    app = KeyedRouter(build_app(forwarder, directory, gate, RESIDENCY, console), gate)
    return console, OuterDoor(app, Inside(gate, lambda: RouterConfig(**config)))


def reads_nothing(applications: Any, records: Any, found: Any) -> Reading:
    """A cluster without nodes."""
    return Reading(ClusterStatus((), (), ()), ())


def client(app: Any, host: str = "127.0.0.1:8000") -> httpx.AsyncClient:
    """A client that asks by this address."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=f"http://{host}")


async def test_the_page_needs_no_key_and_the_state_does(tmp_path: Path) -> None:
    """Where keys are set."""
    _, app = console_app(make_gate(tmp_path)[0])
    async with client(app) as http:
        page = await http.get("/ui/")
        assert page.status_code == 200
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert (await http.get("/ui/", headers={"if-none-match": page.headers["etag"]})).status_code == 304
        assert (await http.get("/ui")).headers["location"] == "ui/"
        assert (await http.get("/ui/assets/missing.js")).status_code == 404
        assert (await http.get("/ui/api/state")).status_code == 401
        assert (await http.get("/ui/api/stream")).status_code == 401
        assert (await http.get("/ui/api/state", headers=AUTH)).json()["access"] == {
            "keys": True, "key": "a", "is_admin": False, "may_plan": False, "may_reload": False,
            "keeps_prompts": False,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("127.0.0.1:8000", {}, 200),
        ("localhost:8000", {"sec-fetch-site": "same-origin"}, 200),
        ("[::1]:8000", {"sec-fetch-site": "none"}, 200),
        ("10.0.0.5:8000", {"origin": "http://10.0.0.5:8000"}, 200),
        ("evil.example:8000", {}, 403),
        ("evil.example:8000", {"origin": "http://evil.example:8000"}, 403),
        ("127.0.0.1:8000", {"origin": "https://evil.example"}, 403),
        ("127.0.0.1:8000", {"sec-fetch-site": "cross-site"}, 403),
        ("127.0.0.1:8000", {"sec-fetch-site": "same-site"}, 403),
        ("10.0.0.5:8000", {"origin": "http://10.0.0.6:8000"}, 403),
        ("127.0.0.1:8000", {"x-forwarded-proto": "http", "x-request-id": "1", "x-haproxy-reload-id": "2"}, 200),
        ("127.0.0.1:8000", {"forwarded": "for=10.0.0.9"}, 403),
        ("127.0.0.1:8000", {"x-forwarded-for": "10.0.0.9"}, 403),
        ("127.0.0.1:8000", {"x-forwarded-host": "models.example"}, 403),
        ("127.0.0.1:8000", {"x-real-ip": "10.0.0.9"}, 403),
        ("127.0.0.1:8000", {"via": "1.1 proxy"}, 403),
    ],
)
async def test_pages_of_other_sites_read_nothing_where_no_key_is_needed(
    host: str, headers: dict[str, str], status: int
) -> None:
    """Neither by a request of their own nor by a name that was made to resolve to this machine, nor by a proxy."""
    _, app = console_app(open_gate())
    async with client(app, host) as http:
        answer = await http.get("/ui/api/state", headers=headers)
        assert answer.status_code == status, answer.text


async def test_a_proxy_may_forward_what_has_a_key(tmp_path: Path) -> None:
    """The key says who asks. Without one, the page itself comes and its data does not, and the reason is said."""
    with_keys, without = console_app(make_gate(tmp_path)[0])[1], console_app(open_gate())[1]
    forwarded = {"x-forwarded-for": "10.0.0.9"}
    async with client(with_keys) as http:
        assert (await http.get("/ui/api/state", headers=AUTH | forwarded)).status_code == 200
    async with client(without) as http:
        assert (await http.get("/ui/", headers=forwarded)).status_code == 200
        for answer in (
            await http.get("/ui/api/state", headers=forwarded),
            await http.get("/ui/api/stream", headers=forwarded),
            await http.post("/ui/api/models/m/park", headers=forwarded),
            await http.post("/ui/api/plan", headers=forwarded, json={"model": "m"}),
        ):
            assert answer.status_code == 403
            error = answer.json()["error"]
            assert error["code"] == "proxy_not_allowed"
            assert "it has sent 'x-forwarded-for'" in error["message"]
            assert "set API keys" in error["message"]


async def test_it_is_off_where_others_could_look_without_a_key(tmp_path: Path) -> None:
    """Unless it is switched on."""
    off = console_app(open_gate(), is_loopback=False)[1]
    for app, status in (
        (off, 404),
        (console_app(open_gate(), console=False)[1], 404),
        (console_app(open_gate(), is_loopback=False, console=True)[1], 200),
        (console_app(make_gate(tmp_path)[0], is_loopback=False)[1], 200),
    ):
        async with client(app) as http:
            assert (await http.get("/ui/")).status_code == status
            state = await http.get("/ui/api/state", headers=AUTH)
            assert state.status_code == status
            if status == 404:
                told = state.json()["error"]["message"]
                assert "console: true" in told
                assert ("set API keys" in told) == (app is off)  # Against an explicit false, keys do not help.


class Stream:
    """A stream of a console, as a page reads it. httpx's transport gives an answer only once it has ended."""

    def __init__(self, app: Any, headers: dict[str, str] | None = None):
        self._left, self._pieces = asyncio.Event(), asyncio.Queue[bytes]()
        given = {"host": "127.0.0.1:8000", **(headers or {})}
        scope = {
            "type": "http", "method": "GET", "path": "/ui/api/stream", "raw_path": b"/ui/api/stream", "root_path": "",
            "query_string": b"", "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }  # fmt: skip
        self._has_body = False
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._has_body:
            self._has_body = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            await self._pieces.put(message["body"])

    async def next(self) -> tuple[str, Any]:
        """The name and the content of the next event. Of several that are pushed together, it is the last one, since
        the others have the ends of intervals alone."""
        async with asyncio.timeout(10):
            piece = await self._pieces.get()
        *ended, last = piece.decode().strip().split("\n\n")
        assert all(json.loads(event.partition("data: ")[2]).keys() <= {"time", "traffic"} for event in ended)
        name, data = last.split("\n")
        return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    async def all_of_the_next(self) -> list[Any]:
        """The content of all events that come together."""
        async with asyncio.timeout(10):
            piece = await self._pieces.get()
        return [json.loads(event.split("\ndata: ")[1]) for event in piece.decode().strip().split("\n\n")]

    async def leave(self) -> None:
        """Closes the connection."""
        self._left.set()
        await self.task


async def ask(app: Any, headers: dict[str, str], model: str = "m") -> None:
    """A chat request to a model."""
    async with client(app) as http:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        await http.post("/v1/chat/completions", json=body, headers=headers)


@pytest.mark.parametrize(
    ("method", "path", "status", "told"),
    [
        ("POST", "/ui/api/state", 405, "This path takes GET, HEAD"),
        ("POST", "/ui/api/stream", 405, "This path takes GET, HEAD"),
        ("POST", "/ui/", 405, "This path takes GET, HEAD"),
        ("GET", "/ui/api/models/m/wake", 405, "This path takes POST"),
        ("DELETE", "/ui/api/reload", 405, "This path takes POST"),
        ("POST", "/ui/api/models/m/explode", 404, "The console has no such endpoint"),
        ("POST", "/ui/api/nope", 404, "The console has no such endpoint"),
        ("GET", "/ui/api/nope", 404, "The console has no such endpoint"),
    ],
)
async def test_what_the_console_does_not_answer_goes_to_no_model(
    method: str, path: str, status: int, told: str
) -> None:
    """A path below /ui names none. Where the console is off, that is what is said."""
    console, app = console_app(open_gate())
    async with client(app) as http:
        answer = await http.request(method, path)
        assert answer.status_code == status
        assert told in answer.json()["error"]["message"]
        if status == 405:
            assert answer.headers["allow"] == told.removeprefix("This path takes ")
    assert [row.path for row in console.ledger.rows_since()] == []
    async with client(console_app(open_gate(), console=False)[1]) as http:
        assert (await http.request("POST", "/ui/api/nope")).json()["error"]["code"] == "console_off"


async def test_a_stream_tells_the_state_and_then_what_is_new() -> None:
    """A request is told once it has begun or changed, and an event exactly once."""
    models = Models(m=says(b"{}"), other=says(b"{}"))
    console, app = console_app(open_gate(), upstream=models, directory=models)
    stream = Stream(app)
    name, state = await stream.next()
    assert (name, state["requests"], state["router"]) == ("state", [], "abc")
    await ask(app, {})
    console.ledger.own("config", "m", "Something changed.")
    await console.tick()
    name, delta = await stream.next()
    assert name == "delta"
    assert [(row["model"], row["outcome"]) for row in delta["requests"]] == [("m", "ok")]
    assert [event["text"] for event in delta["events"]] == ["Something changed."]
    assert delta["traffic"]["models"]["m"]["requests"] == 1
    second = Stream(app)
    assert [event["text"] for event in (await second.next())[1]["events"]] == ["Something changed."]
    await console.tick()
    assert not {"nodes", "models", "events", "requests"} & set((await stream.next())[1])
    assert "events" not in (await second.next())[1]
    await stream.leave()
    await second.leave()
    assert len(console._feed) == 0


async def test_a_page_that_opens_between_two_ticks_is_told_each_event_once() -> None:
    """In its state or in the next delta."""
    console, app = console_app(open_gate())
    first = Stream(app)
    await first.next()
    console.ledger.own("config", "m", "Something changed.")
    late = Stream(app)
    told = [event["text"] for event in (await late.next())[1]["events"]]
    await console.tick()
    told += [event["text"] for event in (await late.next())[1].get("events", ())]
    assert told == ["Something changed."]
    for stream in (first, late):
        await stream.leave()


async def test_a_page_is_told_of_earlier_intervals_that_have_changed() -> None:
    """An answer that comes whole has made its tokens in all of its time. They are told once."""
    models = Models(m=says(b'{"usage":{"prompt_tokens":1,"completion_tokens":30,"total_tokens":31}}'))
    console, app = console_app(open_gate(), upstream=models, directory=models)
    now = BEGINS
    console._clock = console.ledger._clock = console.ledger.requests._clock = lambda: now
    stream = Stream(app)
    (_, state) = await stream.next()
    exchanges: list[Any] = []
    ended = console.ended
    console.ended = exchanges.append  # type: ignore[method-assign]
    await ask(app, {})
    now += 12.0
    await console.tick()
    await stream.next()
    now += 0.5
    ended(*exchanges)
    await console.tick()
    told = [delta["traffic"] for delta in await stream.all_of_the_next()]
    slot = state["traffic"]["slot"]
    assert [(each["slot"], each["models"]["m"]["tokens_per_s"]) for each in told] == [
        (slot, 2.4), (slot + 1, 2.4), (slot + 2, 2.4),
    ]  # fmt: skip
    await console.tick()
    assert len(await stream.all_of_the_next()) == 1
    await stream.leave()


async def test_a_late_page_ends_with_the_same_models_as_an_early_one() -> None:
    """Also if a model is again what the early page was told, after it was something else when the late page opened."""
    directory = ModelsFake(m="ready", other="ready")
    console, app = console_app(open_gate(), directory=directory)
    first = Stream(app)
    pages = [(first, {model["name"]: model["state"] for model in (await first.next())[1]["models"]})]
    await console.tick()
    await first.next()
    directory.states["m"] = "loading"
    await console.ledger.tick()
    late = Stream(app)
    pages.append((late, {model["name"]: model["state"] for model in (await late.next())[1]["models"]}))
    for states in ({"m": "ready", "other": "ready"}, {"m": "failed", "new": "ready"}, {"m": "failed"}):
        directory.states = states
        await console.tick()
        for stream, models in pages:
            delta = (await stream.next())[1]
            models |= {model["name"]: model["state"] for model in delta.get("models", ())}
            for name in delta.get("gone_models", ()):
                del models[name]
            assert models == states
    for stream, _ in pages:
        await stream.leave()


async def test_a_page_that_opens_after_nobody_looked_is_told_what_is_there_now() -> None:
    """And not what the last page before it was told."""
    directory = ModelsFake(m="ready", other="ready")
    console, app = console_app(open_gate(), directory=directory)
    stream = Stream(app)
    await stream.next()
    await stream.leave()
    directory.states = {"m": "loading"}
    await console._idle_tick()
    stream = Stream(app)
    assert [(model["name"], model["state"]) for model in (await stream.next())[1]["models"]] == [("m", "loading")]
    await stream.leave()


async def test_making_what_pages_are_told_does_not_hold_up_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in another thread, and what takes long is made less often."""
    console, app = console_app(open_gate())
    stream = Stream(app)
    await stream.next()
    may_go_on = threading.Event()

    def slow(*arguments: Any) -> Any:
        assert may_go_on.wait(10)
        return replace(deltas_for(*arguments), cpu_s=0.05)

    monkeypatch.setattr(console_module, "deltas_for", slow)
    tick = asyncio.create_task(console.tick())
    await asyncio.sleep(0.1)
    assert not tick.done()
    may_go_on.set()
    await tick
    assert console._pause_s == pytest.approx(2.5)
    await stream.leave()


async def test_many_who_ask_for_the_state_have_it_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each view, and anew after a moment."""
    console, app = console_app(make_gate(tmp_path)[0])
    made: list[str] = []

    def counted(moment: Any, view: Any, *more: Any) -> Any:
        made.append(view.key.name)
        return state_of(moment, view, *more)

    monkeypatch.setattr(console_module, "state_of", counted)
    now = 1000.0
    monkeypatch.setattr(console, "_clock", lambda: now)
    assert await asyncio.gather(*(status_of(app, AUTH) for _ in range(20)), status_of(app, OUTSIDE)) == [200] * 21
    assert sorted(Counter(made).values()) == [1, 1]
    now += 0.6
    assert await status_of(app, AUTH) == 200
    assert made[0] in made[2:]
    assert len(console._states) == 1


async def test_one_key_cannot_take_the_streams_of_all(tmp_path: Path) -> None:
    """The next one is told so, and other keys still have one."""
    _, app = console_app(make_gate(tmp_path)[0])
    streams = [Stream(app, AUTH) for _ in range(8)]
    for stream in streams:
        await stream.next()
    async with client(app) as http:
        answer = await http.get("/ui/api/stream", headers=AUTH)
        assert (answer.status_code, "limit for a key" in answer.text) == (503, True)
        assert answer.headers["retry-after"]
    streams.append(Stream(app, OUTSIDE))
    assert (await streams[-1].next())[0] == "state"
    for stream in streams:
        await stream.leave()


async def test_a_key_is_sent_nothing_of_other_models(tmp_path: Path) -> None:
    """In no byte of the state or of a stream."""
    models = Models(m=says(b"{}"), other=says(b"{}"))
    console, app = console_app(make_gate(tmp_path)[0], upstream=models, directory=models)
    stream = Stream(app, AUTH)
    texts = [json.dumps(await stream.next())]
    for headers, model in ((AUTH, "m"), (OUTSIDE, "other"), (AUTH, "other")):
        await ask(app, headers, model)
    console.ledger.own("lost", "other", "A replica of other was lost.")
    console.ledger.own("failed", "m", "m has failed: its name is also that of other")
    await console.tick()
    texts.append(json.dumps(await stream.next()))
    async with client(app) as http:
        texts.append((await http.get("/ui/api/state", headers=AUTH)).text)
        outside = (await http.get("/ui/api/state", headers=OUTSIDE)).json()
    for text in texts:
        assert "other" not in text
    requests = json.loads(texts[-1])["requests"]
    assert [(row["key"], row["model"], row["status"]) for row in requests] == [("a", "m", 200), ("a", "unknown", 403)]
    assert [model["name"] for model in outside["models"]] == ["other"]
    assert list(outside["traffic"]["models"]) == ["other"]
    await stream.leave()


async def test_a_key_sees_its_own_requests_that_were_refused(tmp_path: Path) -> None:
    """Before their model was found: by a limit of the key, or because of their body. Another key does not see them."""
    models = Models(m=says(b"{}"), other=says(b"{}"))
    gate = make_gate(tmp_path, "requests_per_minute: 1")[0]
    _, app = console_app(gate, upstream=models, directory=models)
    async with client(app) as http:
        statuses = [
            (await http.post("/v1/completions", content=body, headers=AUTH)).status_code
            for body in (b'{"model": "m", "prompt": ""}', b'{"model": "m", "prompt": ""}', b"{", b'{"model": "other"}')
        ]
        assert statuses == [200, 429, 400, 403]
        seen = (await http.get("/ui/api/state", headers=AUTH)).json()["requests"]
        assert [(row["status"], row["key"], row["model"]) for row in seen] == [
            (200, "a", "m"), (429, "a", "unknown"), (400, "a", "unknown"), (403, "a", "unknown"),
        ]  # fmt: skip
        assert (await http.get("/ui/api/state", headers=OUTSIDE)).json()["requests"] == []


async def test_the_stream_of_a_key_that_is_gone_ends(tmp_path: Path) -> None:
    """Also if the key may use other models now, because its page then asks again."""
    gate, _ = make_gate(tmp_path)
    console, app = console_app(gate)
    stream = Stream(app, AUTH)
    await stream.next()
    gate.source.ring = KeyRing([key for key in gate.source.ring.keys if key.name != "a"])
    await console.tick()
    async with asyncio.timeout(5):
        await stream.task
    assert (await status_of(app, AUTH)) == 401


async def status_of(app: Any, headers: dict[str, str]) -> int:
    """What the state answers."""
    async with client(app) as http:
        return (await http.get("/ui/api/state", headers=headers)).status_code


async def test_streams_end_when_the_router_stops() -> None:
    """They would hold up Serve, which waits for all requests of a replica."""
    console, app = console_app(open_gate())
    stream = Stream(app)
    await stream.next()
    directory: Any = console.parts.directory
    directory.applications["router"] = {
        "deployments": {"Router": {"replicas": [{"replica_id": "abc", "state": "STOPPING"}]}}
    }
    console.watch._read_at = 0.0
    await console.tick()
    async with asyncio.timeout(5):
        await stream.task
    again = Stream(app)
    async with asyncio.timeout(5):
        await again.task
    assert len(console._feed) == 0


async def test_a_cluster_that_cannot_be_read_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The state has what is known, and the log has one line."""

    def fails(*_: Any) -> Reading:
        raise RuntimeError("Ray's head does not answer")

    console, app = console_app(open_gate())
    console.watch._read_status = fails
    for _ in range(3):
        console.watch._read_at = 0.0
        assert await status_of(app, {}) == 200
    assert sum("Ray's head does not answer" in record.message for record in caplog.records) == 1


async def test_a_mistake_of_the_console_breaks_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is logged alone."""
    models = Models(m=says(b"{}"))
    console, app = console_app(open_gate(), upstream=models, directory=models)
    monkeypatch.setattr(console.ledger, "began", lambda exchange: 1 / 0)
    monkeypatch.setattr(console.ledger, "ended", lambda exchange: 1 / 0)
    async with client(app) as http:
        reply = await http.post("/v1/chat/completions", json={"model": "m", "messages": []})
    assert reply.status_code == 200


async def test_a_head_of_ray_that_is_gone_holds_up_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray waits for it for a minute and more, in one thread."""
    monkeypatch.setattr(cluster_watch, "READ_TIMEOUT_S", 0.05)
    go_on, calls = threading.Event(), 0

    def hangs(*_: Any) -> Reading:
        nonlocal calls
        calls += 1
        go_on.wait(10)
        return Reading(ClusterStatus((), (), ()), ())

    console, app = console_app(open_gate())
    console.watch._read_status = hangs
    for _ in range(3):
        console.watch._read_at = 0.0
        assert await status_of(app, {}) == 200
    assert calls == 1
    go_on.set()
    await asyncio.sleep(0.1)
    console.watch._read_at = 0.0
    await console.watch.read()
    assert console.watch.snapshot is not None


async def test_a_slow_reading_holds_up_neither_requests_nor_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told beside it, and so is each interval of the traffic that has ended meanwhile."""
    monkeypatch.setattr(console_module, "READ_WAIT_S", 0.05)
    models = Models(m=says(b"{}"))
    console, app = console_app(open_gate(), upstream=models, directory=models)
    stream = Stream(app)
    _, state = await stream.next()
    go_on = threading.Event()

    def hangs(*_: Any) -> Reading:
        go_on.wait(10)
        return Reading(ClusterStatus((), (), ()), ())

    console.watch._read_status, console.watch._read_at = hangs, 0.0
    await ask(app, {})
    console.ledger.own("config", "m", "Something changed.")
    passed = 4 * INTERVAL_S
    monkeypatch.setattr(console, "_clock", lambda: state["time"] + passed)
    await asyncio.wait_for(console.tick(), 5)
    deltas = await stream.all_of_the_next()
    assert [delta["traffic"]["slot"] - state["traffic"]["slot"] for delta in deltas] == [0, 1, 2, 3, 4]
    assert [event["text"] for event in deltas[-1]["events"]] == ["Something changed."]
    assert [row["model"] for row in deltas[-1]["requests"]] == ["m"]
    assert sum(delta["traffic"]["models"]["m"]["requests"] for delta in deltas) == 1
    passed += 1000 * INTERVAL_S
    await asyncio.wait_for(console.tick(), 5)
    assert len(await stream.all_of_the_next()) == 120
    go_on.set()
    await console.close()
    await stream.leave()


async def test_what_happened_while_nobody_looked_is_not_told_as_if_it_were_new() -> None:
    """The first page would see old losses with the time of its opening."""
    now = 1000.0
    here = [ReplicaView("r0", "RUNNING", "a", 1, None), ReplicaView("r1", "RUNNING", "a", 2, None)]
    readings: list[list[ReplicaView]] = [here, here[:1], here, here[:1]]

    def reads(*_: Any) -> Reading:
        model = ModelView("m", "ready", 2, 2, readings.pop(0), "", "")
        return Reading(ClusterStatus((), (), (model,)), ())

    console, _ = console_app(open_gate())
    console.watch._clock = lambda: now
    console.watch._read_status = reads
    told = []
    for passed in (0.0, 3600.0, 1.0, 1.0):
        now += passed
        await console.watch.read()
        told.append([event.kind for event in console.ledger.events.since()])
    assert told == [[], [], ["started"], ["started", "lost"]]


async def test_streams_end_when_the_console_is_switched_off() -> None:
    """Which `user_config` does while the router runs."""
    console, app = console_app(open_gate())
    stream = Stream(app)
    await stream.next()
    console.parts.forwarder.config = RouterConfig(console=False)
    await console.tick()
    async with asyncio.timeout(5):
        await stream.task
    assert await status_of(app, {}) == 404


async def test_when_a_model_is_ready_is_not_told_once_the_estimate_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients are told to wait the least time then, which is no estimate."""
    directory = ModelsFake(m="loading")
    console, _ = console_app(open_gate(), directory=directory)
    await console.ledger.tick()
    await console.watch.read()
    for left_s, told in ((12.34, 12.3), (None, None)):
        monkeypatch.setattr(directory, "time_left_s", lambda _, left_s=left_s: left_s)
        snapshot = console.watch.now()
        assert snapshot is not None
        assert snapshot.ready_in_s["m"] == told
