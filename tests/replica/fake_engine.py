"""A small engine with adapters: it answers with the name that it was asked for, and holds its adapters in memory."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve_app.engines.lost_adapter import LostAdapter
from serve_app.errors import AdapterError


async def _nothing() -> None: ...


class AdapterEngine:
    """Of the interface `Engine`, the part that concerns adapters, and an application.

    `running` counts the requests of each adapter. An adapter is removed when it has none.
    """

    def __init__(self, base: str = "qwen"):
        self.base = base
        self.adapters: dict[str, Path] = {}
        self.calls: list[str] = []
        self.running: dict[str, int] = {}
        self.slow: asyncio.Event | None = None
        self.bodies: list[bytes] = []
        self.lost: LostAdapter = lambda *_: None
        self.before: Callable[[], Awaitable[None]] = _nothing

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Keeps the folder. A name that begins with "bad" is refused, as an engine refuses what files do not show."""
        self.calls.append(f"load {name}")
        if self.slow is not None:
            await self.slow.wait()
        if name.startswith("bad"):
            raise AdapterError("the engine does not like it")
        if name.startswith("bug"):
            raise ZeroDivisionError("a mistake")
        self.adapters[name] = folder

    def watch_adapters(self, lost: LostAdapter) -> None:
        """Keeps it for tests to call."""
        self.lost = lost

    async def unload_adapter(self, name: str) -> None:
        """Drops it once its requests have ended. Another version may have come by then."""
        self.calls.append(f"unload {name}")
        folder = self.adapters.get(name)
        await self._ended(name)
        if self.adapters.get(name) is folder:
            self.adapters.pop(name, None)

    async def _ended(self, name: str) -> None:
        while self.running.get(name):  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    def app(self) -> Starlette:
        """Every POST answers with what the engine has read of the body, by Python's own JSON, as vLLM reads it."""

        async def answer(request: Request) -> Response:
            self.bodies.append(await request.body())
            await self.before()
            try:
                asked = json.loads(self.bodies[-1]).get("model")
            except ValueError:
                return JSONResponse({"error": "no JSON"}, status_code=400)
            if asked not in (None, self.base, *self.adapters):
                return JSONResponse({"error": f"no model {asked}"}, status_code=404)
            return JSONResponse({"asked": asked or self.base})

        async def shown(_: Request) -> Response:
            return JSONResponse({"data": [self.base, *self.adapters]})

        return Starlette(
            routes=[
                Route("/health", shown),
                Route("/v1/models", shown),
                Route("/metrics", shown),
                Route("/{path:path}", answer, methods=["POST"]),
            ]
        )
