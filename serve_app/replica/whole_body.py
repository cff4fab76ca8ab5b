"""Takes a body by a model's own route only if it is whole, small enough and in time, since engines read without a
limit."""

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.config import ModelConfig
from serve_app.wire.asgi import show_routes
from serve_app.wire.body import read_or_refused, replayed

METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class WholeBody:
    """An application behind the limits of `config`. It gets the body in one piece."""

    def __init__(self, app: ASGIApp, config: ModelConfig):
        self._app = app
        self._config = config
        show_routes(self, app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        if scope["type"] != "http" or scope["method"] not in METHODS_WITH_BODY:
            await self._app(scope, receive, send)
            return
        body = await read_or_refused(scope, receive, send, self._config)
        if body is not None:
            await self._app(scope, replayed(body, receive), send)
