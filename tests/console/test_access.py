"""Who may see the console, and what of it."""

import asyncio
import json
from pathlib import Path

import pytest

from serve_app.access.keys import KeyRing
from serve_app.config import RouterConfig
from tests.console.served import Stream, ask, client, console_app, status_of
from tests.fakes import AUTH, OUTSIDE, Models, make_gate, open_gate, says


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
