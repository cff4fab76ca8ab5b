"""A model's own route takes a body only when it is whole, small enough and in time: engines read without a limit."""

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.config import ModelConfig
from serve_app.errors import ClientGone, RequestError
from serve_app.wire.body import read_body, replayed
from serve_app.wire.openai_errors import error_response

METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class WholeBody:
    """An application behind the limits of `config`. It gets the body in one piece."""

    def __init__(self, app: ASGIApp, config: ModelConfig):
        self._app = app
        self._config = config
        for name in ("routes", "router"):  # Serve names the routes in its metrics by these, where there are any.
            if hasattr(app, name):
                setattr(self, name, getattr(app, name))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] not in METHODS_WITH_BODY:
            await self._app(scope, receive, send)
            return
        try:
            body = await read_body(scope["headers"], receive, self._config)
        except ClientGone:
            return
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, replayed(body, receive), send)
