"""Answers what changes the cluster, and what plans for it: the endpoints that need an admin."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.config import RouterConfig
from serve_app.console.actions import Actions, require_all_models
from serve_app.console.guard import Visitor
from serve_app.console.what_if import WhatIf
from serve_app.errors import InvalidRequest
from serve_app.wire.arrival import read_body
from serve_app.wire.asgi import unless_gone

JSON_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}

VisitorOf = Callable[[Scope], Visitor]


class AdminEndpoints:
    """Answers for one router replica. `visitor_of` raises a RequestError for who may not look at the console at all,
    and `config` returns the router's."""

    def __init__(self, visitor_of: VisitorOf, config: Callable[[], RouterConfig], actions: Actions, what_if: WhatIf):
        self._visitor_of, self._config = visitor_of, config
        self._actions, self._what_if = actions, what_if

    def routes(self) -> Sequence[Route]:
        """Returns what it answers to."""
        return [
            Route("/ui/api/plan", AsgiEndpoint(self._plan), methods=["POST"]),
            Route("/ui/api/reload", AsgiEndpoint(self._reload), methods=["POST"]),
            Route("/ui/api/models/{name:path}/wake", AsgiEndpoint(self._wake), methods=["POST"]),
            Route("/ui/api/models/{name:path}/park", AsgiEndpoint(self._park), methods=["POST"]),
        ]

    async def _plan(self, scope: Scope, receive: Receive, send: Send) -> None:
        visitor = self._visitor_of(scope)
        require_all_models(visitor)
        body = await read_body(scope, receive, self._config())

        async def answer() -> None:
            made = await self._what_if.answer(body.content)
            await Response(made, headers=JSON_HEADERS, media_type="application/json")(scope, receive, send)

        await unless_gone(answer(), receive)

    async def _reload(self, scope: Scope, receive: Receive, send: Send) -> None:
        visitor = await self._acting(scope, receive)
        await _done(200, self._actions.reload(visitor), scope, receive, send)

    async def _wake(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._act(self._actions.wake, scope, receive, send)

    async def _park(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._act(self._actions.park, scope, receive, send)

    async def _act(
        self, action: Callable[[Visitor, str], Awaitable[Any]], scope: Scope, receive: Receive, send: Send
    ) -> None:
        visitor = await self._acting(scope, receive)
        done = await action(visitor, Request(scope).path_params["name"])
        await _json(done.status, done.to_json())(scope, receive, send)

    async def _acting(self, scope: Scope, receive: Receive) -> Visitor:
        """Returns who acts. Raises InvalidRequest for a body, because an action takes none and would ignore it."""
        visitor = self._visitor_of(scope)
        body = await read_body(scope, receive, self._config())
        if body.content.strip() not in (b"", b"{}"):
            raise InvalidRequest("This takes no body. Send the request without one.")
        return visitor


class AsgiEndpoint:
    """Is an endpoint that gets a request as it comes, which Starlette tells from a function by its type."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        await self._app(scope, receive, send)


async def _done(status: int, work: Awaitable[Any], scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with what the work returns, which is cancelled if the client leaves."""

    async def answer() -> None:
        await _json(status, await work)(scope, receive, send)

    await unless_gone(answer(), receive)


def _json(status: int, body: Any) -> Response:
    return Response(msgspec.json.encode(body), status, headers=JSON_HEADERS, media_type="application/json")
