"""The model's answer on its way back: bytes as they come, and another replica's where the first one was lost."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from serve_app.config import RouterConfig
from serve_app.errors import DeadlineExceeded, HarmfulRequest, ModelUnavailable, RequestError, UnreadableAnswer
from serve_app.router.engine_loss import is_lost_event
from serve_app.router.exchange import Exchange
from serve_app.router.metrics import RouterMetrics
from serve_app.router.resume import Resumed, resume
from serve_app.router.suspicion import Suspicion
from serve_app.router.transcript import CannotResume, Transcript, WholeEvents, may_resume
from serve_app.router.upstream.protocol import Answer, EngineGone, NotOpen, Patience, ReplicaLost, Upstream
from serve_app.wire.asgi import HttpRequest
from serve_app.wire.body_threads import beside_loop
from serve_app.wire.openai_errors import error_object

logger = logging.getLogger("ray.serve")

# Seconds before the repeats. The first is for another replica, which answers at once; where there is none, Serve needs
# two or three seconds to know that the last one has died, and then the request waits as for any model that loads.
BACKOFF_S = (0.1, 0.5, 2.0)
# Seconds in which a client must take the last of its answer.
LAST_WORDS_TIMEOUT_S = 5.0


async def backoff(repeats: int) -> None:
    """Waits before the next try."""
    await asyncio.sleep(BACKOFF_S[min(repeats, len(BACKOFF_S)) - 1])


async def last_words(*sends: Coroutine[Any, Any, None]) -> None:
    """The end of an answer. Raises DeadlineExceeded, which breaks the connection, for a reader that stands still."""
    try:
        async with asyncio.timeout(LAST_WORDS_TIMEOUT_S):
            for send in sends:
                await send
    except TimeoutError:
        raise DeadlineExceeded("The client did not take the end of its answer.") from None
    finally:
        for send in sends:
            send.close()


def _has_more_than(before: int, transcript: Transcript | None) -> bool:
    """Whether a stream has got any text since it had so many characters. A stream that is not read counts as such."""
    if transcript is None:
        return True
    transcript.read()
    return len(transcript.text) > before


class Deadline:
    """A timeout that moves on with every piece. Setting a timer costs as much as passing a piece on, so it is set anew
    once a second at most, and the idle time is exact to a second."""

    def __init__(self, ends: float, idle_s: float):
        self._ends = ends
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._set_at = self._loop.time()
        self.timeout = asyncio.timeout_at(min(ends, self._set_at + idle_s))

    def moved(self) -> None:
        """A piece has come."""
        now = self._loop.time()
        if now - self._set_at > min(1.0, self._idle_s / 4):
            self._set_at = now
            self.timeout.reschedule(min(self._ends, now + self._idle_s))


class Relay:
    """Passes one answer on. `ends` is the loop's time at which it must be over."""

    def __init__(
        self,
        exchange: Exchange,
        request: HttpRequest,
        config: RouterConfig,
        ends: float,
        loaded: Callable[[Exchange, str, RouterConfig], Awaitable[None]],
        suspicion: Suspicion,
    ):
        self._exchange = exchange
        self._suspicion = suspicion
        self._loaded = loaded
        self._request = request
        self._config = config
        self._ends = ends

    async def plain(self, answer: Answer) -> None:
        """An answer that is no stream of events. One that breaks raises, so that the client sees a broken answer."""
        try:
            async with self._in_time() as deadline:
                async for piece in answer.pieces():
                    deadline.moved()
                    self._exchange.suspect.cleared()
                    await self._exchange.pass_on(piece)
        except ReplicaLost as error:
            raise ModelUnavailable(f"The replica was lost while answering: {error}", retry_after_s=1.0) from error
        await last_words(self._exchange.end())

    async def refusal(self, answer: Answer) -> None:
        """An answer that is no stream, for a client whose stream has begun with comments: it becomes its last event."""
        pieces = []
        try:
            async with self._in_time() as deadline:
                async for piece in answer.pieces():
                    deadline.moved()
                    pieces.append(piece)
        except ReplicaLost as error:
            raise ModelUnavailable(f"The replica was lost while answering: {error}", retry_after_s=1.0) from error
        body = b"".join(pieces)
        try:
            event = await beside_loop(len(body), lambda: msgspec.json.format(body, indent=0))
        except ValueError:
            text = f"HTTP {answer.status}: {body[:500].decode(errors='replace')}"
            event = json.dumps(error_object(RequestError(text))).encode()
        self._exchange.error_status = answer.status
        await last_words(self._exchange.pass_on(b"data: %s\n\n" % event), self._exchange.end())

    async def events(self, answer: Answer, upstream: Upstream, metrics: RouterMetrics) -> None:
        """A stream of events, which ends with one that says why where it cannot go on."""
        transcript = Transcript() if may_resume(self._request.path) and answer.status == 200 else None
        current: Resumed | None = Resumed(answer, None)
        try:
            while current is not None and current.answer is not None:
                try:
                    await self._events_of(current, transcript)
                    break
                except ReplicaLost as error:
                    await current.answer.close()
                    current = await self._resumed(upstream, transcript, error, metrics)
        except RequestError as error:
            await last_words(self._exchange.tell(error), self._exchange.end())  # Its reader may be what stands still.
            return
        finally:
            if current is not None and current.answer is not None:
                await current.answer.close()
        rest = b"" if current is None else current.last
        end = self._exchange.end(f": server-timing {self._exchange.timing()}\n\n".encode())
        await last_words(self._exchange.pass_on(rest), end)

    async def _events_of(self, current: Resumed, transcript: Transcript | None) -> None:
        """Raises ReplicaLost where the stream breaks, DeadlineExceeded where it stands still."""
        assert current.answer is not None
        whole, suspect = WholeEvents(), self._exchange.suspect
        before = len(transcript.text) if transcript is not None else 0
        async with self._in_time() as deadline:
            async for piece in current.answer.pieces():
                deadline.moved()
                events = whole.feed(piece)
                if is_lost_event(events):
                    raise current.answer.lost("its engine died")
                if current.rest is not None:
                    events = current.rest.rewrite(events)
                if transcript is not None and events:
                    transcript.add(events)
                if suspect.was_lost and _has_more_than(before, transcript):
                    suspect.cleared()
                await self._exchange.pass_on(events)
        await self._exchange.pass_on(whole.rest())

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator["Deadline"]:
        """Raises DeadlineExceeded for what stands still for too long, or takes too long in all."""
        deadline = Deadline(self._ends, self._config.idle_timeout_s)
        try:
            async with deadline.timeout:
                yield deadline
        except TimeoutError:
            raise self._cut("total_timeout_s" if self._is_over() else "idle_timeout_s") from None

    def _is_over(self) -> bool:
        return asyncio.get_running_loop().time() >= self._ends

    def _cut(self, field: str) -> DeadlineExceeded:
        seconds = getattr(self._config, field)
        return DeadlineExceeded(f"The answer was cut after {seconds:g} s. The router's {field} says so.")

    async def _resumed(
        self, upstream: Upstream, transcript: Transcript | None, error: ReplicaLost, metrics: RouterMetrics
    ) -> Resumed | None:
        """How a lost stream goes on; None where it cannot, and the client was told.

        All losses of a stream count together: it may be what kills the replicas. Raises HarmfulRequest,
        and DeadlineExceeded.
        """
        exchange, reason, patience = self._exchange, str(error), Patience()
        self._suspicion.lost(exchange.model, exchange.suspect, error.death)
        while transcript is not None and exchange.resumes < self._config.max_retries:
            exchange.resumes += 1
            metrics.resumed(exchange.model)
            await backoff(exchange.resumes)
            try:
                return await self._resume(upstream, transcript)
            except (DeadlineExceeded, HarmfulRequest):
                raise
            except NotOpen as closed:  # Nothing was tried: back into the waiting room.
                if not (isinstance(closed, EngineGone) and patience.has_ended()):
                    exchange.resumes -= 1
                reason = str(closed)
            except CannotResume as refusal:
                reason = f"{error}; it was not taken up again: {refusal}"
                break
            except (ReplicaLost, TimeoutError, RequestError) as again:
                if isinstance(again, ReplicaLost):
                    self._suspicion.lost(exchange.model, exchange.suspect, again.death)
                reason = str(again) or type(again).__name__
                if isinstance(again, UnreadableAnswer):
                    break
            except Exception as unexpected:  # The client has half a stream, and must be told whatever it is.
                logger.exception("a stream could not be taken up again")
                reason = f"{error}; {type(unexpected).__name__}: {unexpected}"
                break
        if transcript is not None and transcript.done:
            return None
        lost = ModelUnavailable(f"The model's replica was lost in the stream: {reason}.", retry_after_s=1.0)
        await last_words(exchange.tell(lost))
        return None

    async def _resume(self, upstream: Upstream, transcript: Transcript) -> Resumed:
        """One try with another replica. Raises DeadlineExceeded where the time of the whole answer is over, and
        TimeoutError where the replica gives no byte in time."""
        name = self._exchange.model
        try:
            async with asyncio.timeout_at(self._ends):
                await self._loaded(self._exchange, name, self._config)
                await self._suspicion.before_next_try(name, self._exchange.suspect)
                async with asyncio.timeout(self._config.first_byte_timeout_s):
                    return await resume(upstream, name, self._request, transcript)
        except TimeoutError:
            if self._is_over():
                raise self._cut("total_timeout_s") from None
            raise
