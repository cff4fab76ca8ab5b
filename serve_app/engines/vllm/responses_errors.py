"""Ends streams of vLLM's Responses API that break.

vLLM writes no event for an error in such a stream, as for an output format that cannot be followed or an engine that
dies: the error leaves its application, and the connection breaks. So the last event is written here. It says whether
the request is wrong, or has the code by which the router knows that another replica can answer.
"""

import logging
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import InvalidRequest, ModelUnavailable, RequestError
from serve_app.wire.asgi import endpoint
from serve_app.wire.error_events import EventCount, error_event
from serve_app.wire.headers import header
from serve_app.wire.responses.chat_request import PATH

logger = logging.getLogger("ray.serve")


def with_responses_errors(
    app: ASGIApp, death: Callable[[], Awaitable[str]], refusal: Callable[[BaseException], str | None]
) -> ASGIApp:
    """Returns the application with streams that end by an event. `death` returns why the engine is dead, or an empty
    text while it lives, and `refusal` why vLLM refuses the request by this error, or None for another error."""

    async def error_of(error: Exception) -> RequestError:
        if reason := await death():
            return ModelUnavailable(f"vLLM's engine has died: {reason}", retry_after_s=5.0)
        if (refused := refusal(error)) is not None:
            return InvalidRequest(refused)
        return RequestError(f"vLLM failed on this request ({type(error).__name__}).")

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or endpoint(scope).removesuffix("/") != PATH:
            await app(scope, receive, send)
            return
        stream = _Stream(send)
        try:
            await app(scope, receive, stream.send)
        except OSError:  # The client has left.
            raise
        except Exception as error:
            if not stream.is_open:
                raise
            logger.warning("A stream of vLLM's Responses API ends by an error.", exc_info=error)
            event = error_event(PATH, await error_of(error), stream.events.count)
            await send({"type": "http.response.body", "body": event, "more_body": False})

    return wrapped


class _Stream:
    """Passes an answer on. `is_open` says that it is a stream that has begun and has not ended."""

    def __init__(self, send: Send):
        self.events = EventCount()
        self.is_open = False
        self._send = send

    async def send(self, message: Message) -> None:
        """Passes a message on."""
        await self._send(message)
        if message["type"] == "http.response.start":
            kind = header(message.get("headers", ()), b"content-type") or b""
            self.is_open = kind.startswith(b"text/event-stream")
        elif self.is_open:
            self.events.feed(message.get("body", b""))
            self.is_open = message.get("more_body", False)
