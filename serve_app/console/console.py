"""Puts the parts of the console together: what it answers to, what it does in the background, and who may ask."""

import asyncio
import logging
import time
from collections.abc import Sequence

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.console.events import EventLog
from serve_app.console.feed import Feed, send_events
from serve_app.console.guard import require_on, visitor_of
from serve_app.console.page import INDEX, Page
from serve_app.console.snapshot import state_of
from serve_app.console.view import View
from serve_app.router.console import RouterParts
from serve_app.router.exchange import Exchange
from serve_app.wire.body import RequestBody
from serve_app.wire.openai_errors import route_error_response

logger = logging.getLogger("ray.serve")

JSON_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
# Open pages are told what is new at this interval in seconds.
TICK_S = 1.0


def open_console(parts: RouterParts) -> "ServedConsole":
    """Returns the console of a router replica."""
    return ServedConsole(parts)


class ServedConsole:
    """Watches the requests of one router replica, and answers below /ui."""

    def __init__(self, parts: RouterParts):
        self.parts = parts
        self.events = EventLog()
        self._feed: Feed[View] = Feed()
        self._page = Page()

    def routes(self) -> Sequence[BaseRoute]:
        """Returns what it answers to."""
        return [
            Route("/ui", self._redirect),
            Route("/ui/", self._index),
            Route("/ui/assets/{name:path}", self._asset),
            Route("/ui/api/state", self._state),
            Route("/ui/api/stream", _Asgi(self._stream), methods=["GET"]),
        ]

    async def start(self) -> None:
        """Begins its work in the background."""

    async def close(self) -> None:
        """Ends its work and all open streams."""
        self._feed.close()

    def began(self, exchange: Exchange) -> None:
        """Notes a request."""

    async def admitted(self, exchange: Exchange, body: RequestBody) -> None:
        """Notes a request's body."""

    def retried(self, exchange: Exchange) -> None:
        """Notes that a request is sent again."""

    def resumed(self, exchange: Exchange) -> None:
        """Notes that another replica continues a stream."""

    def ended(self, exchange: Exchange) -> None:
        """Notes that a request is over."""

    def refused(self, status: int) -> None:
        """Notes a request that the door refused."""

    def require_on(self) -> None:
        """Raises ConsoleOff if it is switched off."""
        require_on(self.parts.config(), self.parts.is_loopback, self.parts.gate.source.is_open)

    def view_of(self, scope: Scope) -> View:
        """Returns what the sender of a request sees. Raises ConsoleOff, Unauthorized and ForeignPage."""
        self.require_on()
        visitor = visitor_of(self.parts.gate, scope)
        return View(visitor.key, visitor.is_admin)

    async def _redirect(self, _: Request) -> Response:
        self.require_on()
        return RedirectResponse("ui/", status_code=307)

    async def _index(self, request: Request) -> Response:
        return self._file(request, INDEX)

    async def _asset(self, request: Request) -> Response:
        return self._file(request, request.path_params["name"])

    def _file(self, request: Request, name: str) -> Response:
        self.require_on()
        answer = self._page.answer(request, name)
        if answer is None:
            return _no_such_file(request)
        return answer

    async def _state(self, request: Request) -> Response:
        view = self.view_of(request.scope)
        return Response(await self._whole(view), headers=JSON_HEADERS, media_type="application/json")

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._feed.opened(self.view_of(scope)) as page:
            await send_events(page.events(self._state_event), scope, receive, send)

    async def _state_event(self, view: View) -> bytes:
        return b"event: state\ndata: " + await self._whole(view) + b"\n\n"

    async def _whole(self, view: View) -> bytes:
        await asyncio.sleep(0)
        state = state_of(
            view, self.parts.replica, time.time(), self.parts.config().console_keeps_prompts, self.events.since()
        )
        return msgspec.json.encode(state)


class _Asgi:
    """Is an endpoint that gets a request as it comes, which Starlette tells from a function by its type."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _no_such_file(request: Request) -> Response:
    return route_error_response(HTTPException(404), f"{request.method} {request.url.path}: The page has no such file.")
