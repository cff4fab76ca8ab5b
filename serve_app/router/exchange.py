"""One request on its way through the router, as far as it has come."""

import json
import time
from dataclasses import dataclass, field

from starlette.types import Message, Send

from serve_app.errors import RequestError
from serve_app.router.metrics import RouterMetrics
from serve_app.router.suspicion import Suspect
from serve_app.wire.asgi import Headers
from serve_app.wire.openai_errors import error_object
from serve_app.wire.usage import UsageMeter

# Headers that belong to one connection, not to the message (RFC 9110, 7.6.1), and the length, which is set anew.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade host "
    b"content-length".split()
)
# What the server in front says itself, on every answer: Serve's own middleware adds the request's id.
_OURS = frozenset({b"x-request-id", b"server-timing", b"date", b"server"})


@dataclass
class Exchange:
    """What is known of it, and the way back to its client. Times are those of `time.perf_counter`, in seconds."""

    request_id: str
    path: str
    send: Send
    began: float = field(default_factory=time.perf_counter)
    read: float = 0.0
    sent: float = 0.0
    first: float = 0.0
    model: str = "unknown"
    status: int = 0
    pieces: int = 0
    retries: int = 0
    resumes: int = 0
    meter: UsageMeter = field(default_factory=UsageMeter)
    key: str | None = None
    # Whether its client wants to be told while it waits; `is_early`: the head went out with the first such comment.
    wants_progress: bool = False
    is_early: bool = False
    # What went wrong after the head was sent.
    error_status: int = 0
    error_code: str | None = None
    extra_headers: Headers = field(default_factory=list)
    suspect: Suspect = field(default_factory=Suspect)

    def head(self, status: int, headers: Headers) -> Message:
        """The start of the answer: the model's headers, and ours."""
        self.status = status
        kept = [pair for pair in headers if pair[0] not in HOP_BY_HOP | _OURS]
        kept += [pair for pair in headers if pair[0] == b"content-length"]
        kept.append((b"server-timing", self.timing().encode()))
        kept += self.extra_headers
        return {"type": "http.response.start", "status": status, "headers": kept}

    async def pass_on(self, piece: bytes) -> None:
        """One piece of the body. Returns when the client, or what is before it, has room for the next."""
        if piece:
            self.pieces += 1
            await self.send({"type": "http.response.body", "body": self.meter.feed(piece), "more_body": True})

    async def tell(self, error: RequestError) -> None:
        """An error in a stream that has begun, as an event."""
        self.error_status, self.error_code = error.status, error.code
        await self.pass_on(b"data: " + json.dumps(error_object(error)).encode() + b"\n\n")

    async def comment(self, text: str) -> None:
        """A line that readers of server-sent events skip. The first one takes the head of the stream along."""
        if not self.status:
            self.is_early = True
            await self.send(self.head(200, [(b"content-type", b"text/event-stream; charset=utf-8")]))
        await self.send({"type": "http.response.body", "body": f": {text}\n\n".encode(), "more_body": True})

    async def end(self, last: bytes = b"") -> None:
        """The end of the body."""
        await self.send({"type": "http.response.body", "body": self.meter.rest() + last, "more_body": False})

    def timing(self) -> str:
        """`server-timing`: milliseconds until the body was read, in the router's queue, and in the engine until now."""
        parts = {
            "router": _milliseconds(self.began, self.read),
            "queue": _milliseconds(self.read, self.sent),
            "engine": _milliseconds(self.sent, time.perf_counter()),
        }
        return ", ".join(f"{name};dur={milliseconds:g}" for name, milliseconds in parts.items())

    def count(self, metrics: RouterMetrics) -> None:
        """At the end, whatever it was."""
        metrics.finished(self.model, self.error_status or self.status)
        if self.first:
            streamed = time.perf_counter() - self.first
            between = streamed / (self.pieces - 1) if self.pieces > 1 else None
            metrics.timed(self.model, self.sent - self.read, self.first - self.began, between)
            metrics.used(self.model, self.meter.usage)

    def log_line(self) -> str:
        """One line of JSON. Nothing of the prompt or the answer is in it."""
        names = ("request_id", "path", "model", "status", "error_code", "key", "retries", "resumes")
        line = {name: getattr(self, name) for name in names}
        return json.dumps(line | {"ms": _milliseconds(self.began, time.perf_counter())})


def _milliseconds(since: float, until: float) -> float:
    """0 where one of the two was not reached."""
    return round(1000 * (until - since), 1) if since and until else 0.0
