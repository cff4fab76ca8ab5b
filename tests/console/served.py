"""A console in a router, and a client that reads its stream."""

import asyncio
import json
import time
from typing import Any

import httpx

from serve_app.access.door import Inside, OuterDoor
from serve_app.access.gate import Gate, KeyedRouter
from serve_app.config import RouterConfig
from serve_app.console.console import ServedConsole
from serve_app.router.console import RouterParts
from serve_app.router.deployment import build_app
from serve_app.router.residency import Residency
from serve_app.status.cluster_status import ClusterStatus
from serve_app.status.reader import Reading
from tests.fakes import ModelsFake, router_app

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


async def status_of(app: Any, headers: dict[str, str]) -> int:
    """What the state answers."""
    async with client(app) as http:
        return (await http.get("/ui/api/state", headers=headers)).status_code
