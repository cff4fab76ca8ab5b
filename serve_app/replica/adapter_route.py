"""Puts a model's adapters in front of its engine: a body names the model or an adapter in any spelling, and the engine
gets its own.

The engine gets a body that was written here. So what a body asks for is what was read here, where keys are checked,
however an engine would read what the client wrote, such as another encoding or a field that is written twice.
"""

from collections.abc import Callable
from functools import partial

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.access.gate import of_length
from serve_app.errors import InvalidRequest, ModelNotFound, ModelUnavailable, RequestError
from serve_app.replica.whole_body import METHODS_WITHOUT_BODY
from serve_app.wire.arrival import known_body, with_body
from serve_app.wire.asgi import show_routes
from serve_app.wire.asked_model import Asked
from serve_app.wire.body import RequestBody
from serve_app.wire.body_threads import beside_loop
from serve_app.wire.openai_errors import error_response


class AdapterRoute:
    """Is the application of an engine with adapters. `require` returns what a name means, or raises RequestError."""

    def __init__(self, app: ASGIApp, require: Callable[[str | None], Asked]):
        self._app, self._require = app, require
        show_routes(self, app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection, whose body was read before."""
        if scope["type"] != "http" or scope["method"] in METHODS_WITHOUT_BODY:
            await self._app(scope, receive, send)
            return
        body = known_body(scope)
        assert body is not None, "WholeBody is in front of this"
        try:
            written, name = await beside_loop(len(body.content), partial(self._written, body))
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        if written is not body:
            scope = {**scope, "headers": of_length(scope["headers"], len(written.content))}
        await self._app(*with_body(scope, receive, written), self._unless_lost(name, scope, receive, send))

    def _written(self, body: RequestBody) -> tuple[RequestBody, str | None]:
        """Returns the body with the engine's own name, and the name that the client has written. One that is no JSON
        object is the engine's to refuse or to read. Raises ModelNotFound, ModelUnavailable, and InvalidRequest for a
        body that cannot be written."""
        try:
            name = body.peek().model
        except InvalidRequest:
            return body, None
        asked = self._require(name)
        return (body.with_fields() if name is None else body.with_fields(model=asked.name)), name

    def _unless_lost(self, name: str | None, scope: Scope, receive: Receive, send: Send) -> Send:
        """Returns `send` for the answer of the engine. A 404 of an engine that has lost the adapter meanwhile, as one
        of a pool may have while the request waited for it, becomes what is said of the adapter now."""
        is_replaced = False

        async def checked(message: Message) -> None:
            nonlocal is_replaced
            if message["type"] == "http.response.start" and message["status"] == ModelNotFound.status:
                try:
                    self._require(name)
                except ModelUnavailable as error:
                    is_replaced = True
                    await error_response(error)(scope, receive, send)
                except ModelNotFound:
                    pass  # The engine's own answer says so too.
            if not is_replaced:
                await send(message)

        return checked
