"""Sends the answer back to the client: its head, the pieces of the body, and what went wrong on the way."""

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any

from starlette.types import Message, Send

from serve_app.access.gate import refusal
from serve_app.errors import ClientGone, DeadlineExceeded, RequestError
from serve_app.router.timing import Timing
from serve_app.wire.body_threads import beside_loop
from serve_app.wire.error_events import error_event, refusal_event
from serve_app.wire.headers import Headers
from serve_app.wire.usage import UsageMeter

# These headers belong to a connection and not to the message (RFC 9110, 7.6.1), and the length is set anew.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade host "
    b"content-length".split()
)
# The server in front puts these on every answer itself. Serve's own middleware adds the request's id.
_OURS = frozenset({b"x-request-id", b"server-timing", b"date", b"server"})
# A client must take the end of its answer within this many seconds.
LAST_WORDS_TIMEOUT_S = 5.0


class Downstream:
    """This is the answer to one client, as far as it has been sent.

    `status` is 0 until the head is sent. `error_status` and `error_code` say what went wrong, even after the head.
    `has_left` says that the client was gone before the end. `pieces` counts the pieces of the body. `wants_comments`
    means that the client asked for comments while it waits, and `is_early` that the head was sent with the first such
    comment.
    """

    def __init__(self, send: Send, timing: Timing, path: str = ""):
        self._send = send
        self._path = path
        self._timing = timing
        self._extra_headers: Headers = ()
        self.meter = UsageMeter()
        self.wants_comments = False
        self.is_early = self.has_left = False
        self.status = self.error_status = self.pieces = 0
        self.error_code: str | None = None

    def admitted(self, headers: Headers) -> None:
        """Keeps the headers that admission puts onto the answer."""
        self._extra_headers = headers

    def metered_by(self, meter: UsageMeter) -> None:
        """Sets the meter that reads the answer and decides what the client sees of its usage."""
        self.meter = meter

    async def begin(self, status: int, headers: Headers) -> None:
        """Sends the head with the model's headers and ours."""
        self.status = status
        kept = [pair for pair in headers if pair[0] not in HOP_BY_HOP | _OURS]
        kept += [pair for pair in headers if pair[0] == b"content-length"]
        kept.append((b"server-timing", self._timing.header().encode()))
        kept += self._extra_headers
        await self._send({"type": "http.response.start", "status": status, "headers": kept})

    async def pass_on(self, piece: bytes) -> None:
        """Sends one piece of the body. Returns when the client, or the proxy before it, has room for the next one."""
        if piece:
            self.pieces += 1
            body = await beside_loop(len(piece), partial(self.meter.feed, piece))
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def comment(self, text: str) -> None:
        """Sends a line that readers of server-sent events skip. The first one also sends the head of the stream."""
        if not self.status:
            self.is_early = True
            await self.begin(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
        await self._send({"type": "http.response.body", "body": f": {text}\n\n".encode(), "more_body": True})

    async def end(self) -> None:
        """Ends the answer. Raises DeadlineExceeded, which breaks the connection, if the client does not read."""
        await _last_words(self._end())

    async def end_stream(self, events: bytes = b"") -> None:
        """Ends a stream with these events, and with its times as a comment. Raises DeadlineExceeded as `end` does."""
        await _last_words(self.pass_on(events), self._end(self._times()))

    async def end_with_error(self, error: RequestError, sequence_number: int = 0) -> None:
        """Ends a stream with an event that says what went wrong, and with its times if a model has begun it.

        `sequence_number` is the event's number in an API that numbers them. Raises DeadlineExceeded as `end` does.
        """
        self.error_status, self.error_code = error.status, error.code
        event = error_event(self._path, error, sequence_number)
        await _last_words(self.pass_on(event), self._end(self._times() if self._timing.first else b""))

    async def end_with_refusal(self, status: int, text: bytes) -> None:
        """Ends a stream that has only comments with the model's refusal as its event. Raises DeadlineExceeded."""
        self.error_status = status
        await _last_words(self.pass_on(refusal_event(self._path, status, text)), self._end())

    async def fail(self, error: RequestError) -> None:
        """Reports an error in the way that is left: as an answer before the head, and as an event if the head was sent
        with comments. Later it raises the error, so that the client sees a broken connection."""
        if isinstance(error, ClientGone):
            self.has_left, self.status = True, error.status
            return
        if self.is_early and not self.pieces:
            await self.end_with_error(error)
            return
        self.error_code = error.code
        if self.status:
            self.error_status = error.status
            raise error
        self.status = error.status
        response = refusal(error)
        for name, value in self._extra_headers:
            response.headers[name.decode("latin-1")] = value.decode("latin-1")
        await response({"type": "http"}, _never, self._send)

    def left(self) -> None:
        """Notes that the client has gone, or that Serve has abandoned its request."""
        self.has_left, self.status = True, self.status or ClientGone.status

    def _times(self) -> bytes:
        return f": server-timing {self._timing.header()}\n\n".encode()

    async def _end(self, last: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": self.meter.rest() + last, "more_body": False})


async def _last_words(*sends: Coroutine[Any, Any, None]) -> None:
    try:
        async with asyncio.timeout(LAST_WORDS_TIMEOUT_S):
            for send in sends:
                await send
    except TimeoutError:
        raise DeadlineExceeded("The client did not take the end of its answer.") from None
    finally:
        for send in sends:
            send.close()


async def _never() -> Message:
    raise AssertionError("a refusal reads nothing")
