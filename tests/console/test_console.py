"""What the router answers below /ui."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.access.door import Inside, OuterDoor
from serve_app.access.gate import Gate, KeyedRouter
from serve_app.config import RouterConfig
from serve_app.console.console import ServedConsole
from serve_app.router.console import RouterParts
from serve_app.router.deployment import build_app
from serve_app.router.residency import Residency
from serve_app.status.cluster_status import ClusterStatus
from serve_app.status.reader import Reading
from tests.fakes import AUTH, ModelsFake, make_gate, open_gate, router_app

RESIDENCY = Residency(dict)


def console_app(gate: Gate, is_loopback: bool = True, upstream: Any = None, **config: Any) -> tuple[ServedConsole, Any]:
    """A console in a router, behind its gate and its door."""
    directory = ModelsFake(m="ready", other="ready")
    forwarder, _ = router_app(directory, upstream, gate, **config)  # type: ignore[arg-type]
    parts = RouterParts(
        "router", "abc", directory, forwarder, gate, RESIDENCY, lambda: forwarder.config, is_loopback  # type: ignore[arg-type]
    )  # fmt: skip
    console = ServedConsole(parts, read_status=reads_nothing, tell=lambda now: None)
    app = KeyedRouter(build_app(forwarder, directory, gate, None, console), gate)  # type: ignore[arg-type]
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
            "keys": True, "key": "a", "is_admin": False, "keeps_prompts": False,
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
    ],
)
async def test_pages_of_other_sites_read_nothing_where_no_key_is_needed(
    host: str, headers: dict[str, str], status: int
) -> None:
    """Neither by a request of their own nor by a name that was made to resolve to this machine."""
    _, app = console_app(open_gate())
    async with client(app, host) as http:
        answer = await http.get("/ui/api/state", headers=headers)
        assert answer.status_code == status, answer.text


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
                assert "console: true" in state.json()["error"]["message"]
