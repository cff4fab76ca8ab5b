"""Holds requests while an engine is away, and counts those that wait and those that run."""

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import EngineAway, EngineError, ModelUnavailable, RequestError
from serve_app.wire.asgi import endpoint
from serve_app.wire.error_events import EventCount, error_event
from serve_app.wire.openai_errors import error_response

# These methods ask about the engine and need none of its memory.
METHODS_WITHOUT_WORK = frozenset({"GET", "HEAD", "OPTIONS"})
# These are seconds: between two comments to a stream that stands still, and until an engine must have let go of
# requests that were cut.
COMMENT_EVERY_S, CUT_TIMEOUT_S = 15.0, 30.0


class HeldRequests:
    """Is an ASGI application in front of an engine's. `changed` is called with every change of the counts.

    At most `most_running` requests are in the engine at one time, which is what it takes, and none is refused because
    many have gathered while the engine was away. Requests go in by the order in which they came.
    """

    def __init__(
        self,
        name: str,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        most_running: float = math.inf,
    ):
        self._name, self._changed, self._clock, self._most = name, changed, clock, most_running
        self._line: deque[asyncio.Future[None]] = deque()
        self._inside = 0  # Those that were let in and have not ended.
        self._app: ASGIApp | None = None
        self._app_for_questions: ASGIApp | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._numbers = itertools.count()
        self._waiting: dict[int, float] = {}
        self._running: dict[int, asyncio.Task[None]] = {}
        self._cuts: dict[int, _Cut] = {}
        self._comments: asyncio.Task[None] | None = None
        self._still_since: float | None = None
        self._failure = ""
        self.last_used = clock()

    @property
    def waiting(self) -> int:
        """Returns how many requests wait, with those that stand still in an engine that is parked."""
        return len(self._waiting) + (0 if self._still_since is None else len(self._running))

    @property
    def oldest_age_s(self) -> float:
        """Returns the seconds for which the oldest of them waits."""
        begun = [*self._waiting.values()]
        if self._still_since is not None and self._running:
            begun.append(self._still_since)
        return self._clock() - min(begun, default=self._clock())

    @property
    def running(self) -> int:
        """Returns how many requests run in the engine."""
        return len(self._running) if self._still_since is None else 0

    @property
    def idle_s(self) -> float:
        """Returns the seconds since a request ran, or since the beginning, which is 0 if one runs."""
        return 0.0 if self.running else self._clock() - self.last_used

    def open(self, app: ASGIApp) -> None:
        """Lets all requests through to this application, and those go on that stood still."""
        self._app = self._app_for_questions = app
        self._still_since = None
        if self._comments is not None:
            self._comments.cancel()
        self._let_in()
        self._changed()

    def close(self) -> None:
        """Holds requests from now on. Those that run go on."""
        self._app = None
        self._changed()

    def stand_still(self) -> None:
        """Says that the engine is parked. Its application still answers questions that need no memory, and clients of
        streams that stand still get comments, so that nobody takes the silence for an end."""
        self._still_since = self._clock()
        self._comments = asyncio.create_task(self._comment())
        self._changed()

    def end(self) -> None:
        """Says that there is no engine any more, so that nothing of it is kept."""
        self._app = self._app_for_questions = None
        self._changed()

    async def drained(self, timeout_s: float) -> bool:
        """Returns whether all requests that run have ended within the time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def cut(self) -> None:
        """Ends all requests that run as those of a lost engine, which the router sends or continues again."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=CUT_TIMEOUT_S)
            if left:
                raise EngineError(f"{len(left)} requests did not end within {CUT_TIMEOUT_S:g} s")

    def fail(self, reason: str) -> None:
        """Refuses all that wait and all that come, because the engine does not come back."""
        self._failure = reason
        self._let_in()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        if scope["type"] != "http":
            if self._app is not None:
                await self._app(scope, receive, send)
        elif scope["method"] not in METHODS_WITHOUT_WORK:
            await self._run(scope, receive, send)
        elif self._app_for_questions is not None:
            await self._app_for_questions(scope, receive, send)
        else:  # A question brings no model back, since some are asked every few seconds.
            text = f"'{self._name}' is stopped, and a POST request to one of its endpoints brings it back."
            await _refuse(ModelUnavailable(text, retry_after_s=1.0), scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        number = next(self._numbers)
        await self._enter(number)
        try:
            await self._run_inside(number, scope, receive, send)
        finally:
            self._inside -= 1
            self._let_in()

    async def _run_inside(self, number: int, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None:
            await _refuse(self._unavailable(), scope, receive, send)
            return
        cut = self._cuts[number] = _Cut(send, EngineAway(f"'{self._name}' gave its memory to another model."))
        task = asyncio.ensure_future(_awaited(self._app(scope, receive, cut.send)))
        self._running[number] = task
        self._idle.clear()
        self._changed()
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():  # The client has left.
                task.cancel()
                await asyncio.wait({task})
                raise
            await cut.end(scope, receive)
        finally:
            self._running.pop(number, None)
            self._cuts.pop(number, None)
            self.last_used = self._clock()
            if not self._running:
                self._idle.set()
            self._changed()

    async def _enter(self, number: int) -> None:
        """Returns once the request is inside. The engine is there then, unless it does not come back."""
        if self._may_enter and not self._line:
            self._inside += 1
            return
        self._waiting[number] = self._clock()
        self._changed()
        try:
            while True:
                await self._turn()
                if self._app is not None or self._failure:
                    return
                self._inside -= 1  # It has left again before this request has run.
        finally:
            del self._waiting[number]
            self._changed()

    async def _turn(self) -> None:
        """Waits in the line, at whose end the request is inside."""
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # It was let in at the same moment.
                self._inside -= 1
            raise

    @property
    def _may_enter(self) -> bool:
        return bool(self._failure) or (self._app is not None and self._inside < self._most)

    def _let_in(self) -> None:
        while self._line and self._may_enter:
            if not (turn := self._line.popleft()).done():  # The client of another one has left.
                self._inside += 1
                turn.set_result(None)

    async def _comment(self) -> None:
        while True:
            await asyncio.sleep(COMMENT_EVERY_S)
            for cut in list(self._cuts.values()):
                with suppress(Exception):  # Its client may have left.
                    await cut.comment()

    def _unavailable(self) -> ModelUnavailable:
        return ModelUnavailable(f"'{self._name}' cannot answer: {self._failure}.", retry_after_s=1.0)


class _Cut:
    """Passes an answer on, and ends it with an error by which the router knows that its engine is away."""

    def __init__(self, send: Send, error: EngineAway):
        self._send, self._error = send, error
        self._is_stream, self._has_head = False, False
        self._events = EventCount()

    async def send(self, message: Message) -> None:
        """Passes a message on."""
        if message["type"] == "http.response.start":
            self._has_head = True
            headers = {bytes(name).lower(): bytes(value) for name, value in message.get("headers", [])}
            self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        elif self._is_stream:
            self._events.feed(message.get("body", b""))
        await self._send(message)

    async def comment(self) -> None:
        """Sends a comment, which readers of events skip, if the answer is a stream that has begun. The engine must
        stand still, so that no event is broken."""
        if self._is_stream:
            await self._send({"type": "http.response.body", "body": b": parked\n\n", "more_body": True})

    async def end(self, scope: Scope, receive: Receive) -> None:
        """Ends the answer. Raises RuntimeError if only a broken connection can say that it is not whole."""
        if not self._has_head:
            await _refuse(self._error, scope, receive, self._send)
        elif self._is_stream:
            event = error_event(endpoint(scope), self._error, self._events.count)
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            raise RuntimeError(self._error.message)


async def _awaited(work: Awaitable[None]) -> None:
    await work


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    await error_response(error)(scope, receive, send)
