"""Takes a body by a model's own route only if it is whole, small enough and in time, since engines read without a
limit."""

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.config import ModelConfig
from serve_app.wire.arrival import read_or_refused, with_body
from serve_app.wire.asgi import show_routes

METHODS_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS"})


class WholeBody:
    """Puts the limits of `config` in front of an application, which gets the body in one piece and in the scope."""

    def __init__(self, app: ASGIApp, config: ModelConfig):
        self._app = app
        self._config = config
        show_routes(self, app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        if scope["type"] != "http" or scope["method"] in METHODS_WITHOUT_BODY:
            await self._app(scope, receive, send)
            return
        body = await read_or_refused(scope, receive, send, self._config)
        if body is not None:
            await self._app(*with_body(scope, receive, body), send)
