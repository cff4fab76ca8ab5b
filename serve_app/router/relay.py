"""Passes the model's answer back: its bytes as they come, and another replica's if the first one was lost."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import msgspec

from serve_app.config import RouterConfig
from serve_app.errors import DeadlineExceeded, ModelUnavailable, RequestError, UnreadableAnswer
from serve_app.router.dispatcher import Dispatcher
from serve_app.router.engine_loss import is_away, is_lost_event
from serve_app.router.exchange import Exchange
from serve_app.router.resume import Resumed, transcript_of
from serve_app.router.transcript import UNKNOWN_FORM, Continued, Transcript, WholeEvents
from serve_app.router.upstream.protocol import Answer, NotOpen, ReplicaLost, is_stream
from serve_app.wire.asgi import HttpRequest
from serve_app.wire.body_threads import beside_loop
from serve_app.wire.openai_errors import error_object


class Deadline:
    """This is a timeout that every piece extends. Setting a timer costs as much as passing a piece on, so it is set
    anew once a second at most, and the idle time is exact to a second."""

    def __init__(self, ends: float, idle_s: float):
        self._ends = ends
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._set_at = self._loop.time()
        self.timeout = asyncio.timeout_at(min(ends, self._set_at + idle_s))

    def moved(self) -> None:
        """Notes that a piece has come, and moves the timeout on."""
        now = self._loop.time()
        if now - self._set_at > min(1.0, self._idle_s / 4):
            self._set_at = now
            self.timeout.reschedule(min(self._ends, now + self._idle_s))


class Relay:
    """Passes one answer on. `ends` is the loop's time at which it must be over."""

    def __init__(
        self, exchange: Exchange, request: HttpRequest, config: RouterConfig, ends: float, dispatcher: Dispatcher
    ):
        self._exchange = exchange
        self._downstream = exchange.downstream
        self._request = request
        self._config = config
        self._ends = ends
        self._dispatcher = dispatcher

    async def pass_back(self, answer: Answer) -> None:
        """Passes the whole answer to its client. Raises RequestError if it breaks and the client must see that."""
        if not self._downstream.is_early:
            await self._downstream.begin(answer.status, answer.headers)
        self._exchange.timing.was_answered()
        if is_stream(answer):
            await self._events(answer)
        elif self._downstream.is_early:
            await self._refusal(answer)
        else:
            await self._plain(answer)

    async def _plain(self, answer: Answer) -> None:
        """Passes on an answer that is not a stream of events. Raises if it breaks, so that the client sees that."""
        async with self._whole() as deadline:
            async for piece in answer.pieces():
                deadline.moved()
                self._exchange.suspect.cleared()
                await self._downstream.pass_on(piece)
        await self._downstream.end()

    async def _refusal(self, answer: Answer) -> None:
        """Sends an answer that is not a stream as the last event of a client's stream that has begun with comments."""
        pieces = []
        async with self._whole() as deadline:
            async for piece in answer.pieces():
                deadline.moved()
                pieces.append(piece)
        body = b"".join(pieces)
        try:
            event = await beside_loop(len(body), lambda: msgspec.json.format(body, indent=0))
        except ValueError:
            text = f"HTTP {answer.status}: {body[:500].decode(errors='replace')}"
            event = json.dumps(error_object(RequestError(text))).encode()
        await self._downstream.end_with_refusal(answer.status, event)

    async def _events(self, answer: Answer) -> None:
        """Passes on a stream of events. If it cannot continue, its last event says why."""
        transcript = transcript_of(self._request.path) if answer.status == 200 else None
        current: Resumed | None = Resumed(answer, None)
        try:
            while current is not None and current.answer is not None:
                try:
                    await self._events_of(current, transcript)
                    break
                except ReplicaLost as error:
                    await current.answer.close()
                    current = await self._resumed(transcript, error)
        except RequestError as error:
            if transcript is not None:
                await beside_loop(transcript.unread_bytes, transcript.read)
            sequence = 0 if transcript is None else transcript.sequence
            await self._downstream.end_with_error(error, sequence)  # The client may be the one that does not read.
            return
        finally:
            if current is not None and current.answer is not None:
                await current.answer.close()
        await self._downstream.end_stream(b"" if current is None else current.last)

    async def _events_of(self, current: Resumed, transcript: Transcript | None) -> None:
        """Passes on one replica's events. Raises ReplicaLost if the stream breaks, or DeadlineExceeded if it stalls."""
        assert current.answer is not None
        whole, suspect = WholeEvents(), self._exchange.suspect
        before = transcript.length if transcript is not None else 0
        async with self._in_time() as deadline:
            async for piece in current.answer.pieces():
                deadline.moved()
                events = whole.feed(piece)
                size = len(events)  # One event may repeat a whole request.
                if await beside_loop(size, partial(is_lost_event, events)):
                    away = NotOpen("its engine gave its memory to another model")
                    raise away if is_away(events) else current.answer.lost("its engine died")
                if current.rest is not None:
                    events = await beside_loop(size, partial(_rewritten, current.rest, events))
                if transcript is not None and events:
                    transcript.add(events)
                    if transcript.is_full or suspect.was_lost:
                        await beside_loop(transcript.unread_bytes, transcript.read)
                if suspect.was_lost and (transcript is None or transcript.length > before):
                    suspect.cleared()
                await self._downstream.pass_on(events)
        await self._downstream.pass_on(whole.rest())

    async def _resumed(self, transcript: Transcript | None, error: ReplicaLost) -> Resumed | None:
        """Continues as `Dispatcher.go_on` does. Raises DeadlineExceeded if the time of the whole answer is over."""
        try:
            async with asyncio.timeout_at(self._ends):
                return await self._dispatcher.go_on(self._exchange, self._config, self._request, transcript, error)
        except TimeoutError:
            raise self._cut("total_timeout_s") from None

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[Deadline]:
        """Raises DeadlineExceeded for an answer that stalls for too long, or takes too long in total."""
        deadline = Deadline(self._ends, self._config.idle_timeout_s)
        try:
            async with deadline.timeout:
                yield deadline
        except TimeoutError:
            is_over = asyncio.get_running_loop().time() >= self._ends
            raise self._cut("total_timeout_s" if is_over else "idle_timeout_s") from None

    @asynccontextmanager
    async def _whole(self) -> AsyncIterator[Deadline]:
        """Is `_in_time` for an answer that nothing can continue. Raises ModelUnavailable if its replica is lost."""
        try:
            async with self._in_time() as deadline:
                yield deadline
        except ReplicaLost as error:
            raise ModelUnavailable(f"The replica was lost while it answered: {error}", retry_after_s=1.0) from error

    def _cut(self, field: str) -> DeadlineExceeded:
        seconds = getattr(self._config, field)
        return DeadlineExceeded(f"The answer was cut off after {seconds:g} s, which is the router's {field}.")


def _rewritten(rest: Continued, events: bytes) -> bytes:
    """Returns another replica's events as those of the first stream. Raises UnreadableAnswer for another form."""
    try:
        return rest.rewrite(events)
    except UNKNOWN_FORM as error:
        raise UnreadableAnswer(
            f"The stream's continuation has an event of a form that is not known here: {type(error).__name__}: {error}."
        ) from error
