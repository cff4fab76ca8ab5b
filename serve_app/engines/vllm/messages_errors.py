"""Mends the errors of vLLM's Messages API.

vLLM answers 500 in it if its engine has died, as for an error of the request alone, and in a stream it sends the error
of a check of its own events. So what happened is asked of the engine here: if that has died, the answer is a 503, or an
event with its code, by which the router knows that another replica can answer.
"""

import re
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import InvalidRequest, ModelUnavailable, RequestError
from serve_app.wire.anthropic.errors import MessagesErrors, is_messages_path
from serve_app.wire.error_events import error_event
from serve_app.wire.openai_errors import error_response

ERROR_EVENT = b"event: error\n"
FAILED = 500
# vLLM shows the end of the chat's error in that of its check. The status tells a refusal of the request.
_REFUSED = re.compile(rb"'code': 4\d\d\}\}")


def with_messages_errors(app: ASGIApp, death: Callable[[], Awaitable[str]]) -> ASGIApp:
    """Returns the application with errors as Anthropic's API has them. `death` returns why the engine is dead, or an
    empty text while it lives."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        mending = scope["type"] == "http" and is_messages_path(scope["path"])
        await app(scope, receive, _Mender(scope, receive, send, death).send if mending else send)

    return MessagesErrors(wrapped)


class _Mender:
    def __init__(self, scope: Scope, receive: Receive, send: Send, death: Callable[[], Awaitable[str]]):
        self._scope, self._receive, self._send = scope, receive, send
        self._death = death
        self._has_ended = False

    async def send(self, message: Message) -> None:
        """Passes a message on, or what has to be said in its place."""
        if self._has_ended:
            return
        if message["type"] == "http.response.start" and message["status"] == FAILED:
            error = await self._error()
            if isinstance(error, ModelUnavailable):
                self._has_ended = True
                await error_response(error)(self._scope, self._receive, self._send)
                return
        elif message.get("body", b"").startswith(ERROR_EVENT):  # vLLM sends each event in a message of its own.
            error = await self._error(is_refusal=_REFUSED.search(message["body"]) is not None)
            message = {**message, "body": error_event(self._scope["path"], error)}
        await self._send(message)

    async def _error(self, is_refusal: bool = False) -> RequestError:
        reason = await self._death()
        if reason:
            return ModelUnavailable(f"vLLM's engine has died: {reason}", retry_after_s=5.0)
        if is_refusal:
            return InvalidRequest(
                "vLLM refuses this request, but does not say why in a stream. Send it without 'stream' to read the "
                "reason. It may be a tool's schema or an output format."
            )
        return RequestError("vLLM failed on this request.")
