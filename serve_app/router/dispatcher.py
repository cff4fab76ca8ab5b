"""Finds a replica that answers a request. It tries one after the other if replicas are lost, and other models if the
configuration names stand-ins. It also finds a replica that continues a stream whose replica was lost."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from serve_app.config import RouterConfig
from serve_app.errors import (
    DeadlineExceeded,
    HarmfulRequest,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
    RequestError,
    UnreadableAnswer,
)
from serve_app.router.comments import commented
from serve_app.router.directory import Directory
from serve_app.router.engine_loss import is_lost_status
from serve_app.router.exchange import Exchange
from serve_app.router.metrics import RouterMetrics
from serve_app.router.queues import ModelQueue, Queues
from serve_app.router.residency import Residency
from serve_app.router.resume import Resumed, resume
from serve_app.router.suspicion import Suspicion
from serve_app.router.transcript import CannotResume, Transcript
from serve_app.router.upstream.protocol import (
    Answer,
    EngineGone,
    NotOpen,
    Patience,
    ReplicaLost,
    Upstream,
    first_piece,
)
from serve_app.router.waiting_room import LOOK_AGAIN_S, WaitingRoom
from serve_app.wire.asgi import HttpRequest

logger = logging.getLogger("ray.serve")

# Seconds before the repeats. The first is for another replica, which answers at once. If there is none, Serve needs
# two or three seconds to know that the last one has died, and then the request waits as for any model that loads.
BACKOFF_S = (0.1, 0.5, 2.0)
TOO_MANY = 429

RequestTo = Callable[[str], Awaitable[HttpRequest]]


class Dispatcher:
    """Dispatches all requests of one router replica."""

    def __init__(self, directory: Directory, upstream: Upstream, metrics: RouterMetrics, residency: Residency):
        self._directory = directory
        self._upstream = upstream
        self._metrics = metrics
        self._residency = residency
        self._suspicion = Suspicion()
        self.queues = Queues()
        self._waiting_room = WaitingRoom(directory, upstream, self.queues)

    def wake(self, name: str, config: RouterConfig) -> None:
        """Starts a replica of a model that is scaled to zero, though no request waits for it. It returns at once."""
        self._waiting_room.wake(name, config.hold_timeout_s)

    async def open(
        self, exchange: Exchange, config: RouterConfig, names: Sequence[str], request_to: RequestTo
    ) -> tuple[Answer, HttpRequest]:
        """Returns the answer of the first model that takes the request, with its first piece, and what was sent to it.

        No request waits for a loading model while another is ready. Raises the first RequestError if none takes it.
        """
        failures: list[RequestError] = []
        full: dict[str, tuple[Answer, HttpRequest]] = {}  # These are full. The last becomes the answer.
        try:
            for patient in (False, True) if len(names) > 1 else (True,):
                for name in names:
                    if name in full:
                        continue
                    request = await request_to(name)
                    try:
                        answer = await self._open_one(exchange, config, name, request, patient)
                    except (ModelNotFound, ModelUnavailable, Overloaded) as error:
                        failures.append(error)
                        continue
                    if not is_lost_status(answer.status) and answer.status != TOO_MANY:
                        return answer, request
                    full[name] = answer, request
            if full:
                return full.popitem()[1]
        finally:
            for answer, _ in full.values():
                await answer.close()
        raise failures[0]

    async def go_on(
        self,
        exchange: Exchange,
        config: RouterConfig,
        request: HttpRequest,
        transcript: Transcript | None,
        lost: ReplicaLost,
    ) -> Resumed | None:
        """Returns how a lost stream continues, or None if its client has all of it. `transcript` is None for a stream
        whose text is not read.

        All losses of a stream count together, since it may be what kills the replicas. Raises HarmfulRequest, or
        ModelUnavailable if it cannot continue.
        """
        record, reason, patience = exchange.record, str(lost), Patience()
        is_away = isinstance(lost, NotOpen)  # A model that gave its memory to another one may do so many times.
        if not is_away:
            self._suspicion.lost(self._directory.application(record.model), exchange.suspect, lost.death)
        while transcript is not None and record.resume_tries < config.max_retries:
            record.resumes_again()
            await _backoff(record.resume_tries)
            try:
                resumed = await self._go_on_once(exchange, config, request, transcript)
                if is_away:
                    record.not_tried()
                elif resumed.answer is not None or resumed.last:
                    exchange.resumed()
                return resumed
            except HarmfulRequest:
                raise
            except NotOpen as closed:  # Nothing was tried, so it goes back into the waiting room.
                if not (isinstance(closed, EngineGone) and patience.has_ended()):
                    record.not_tried()
                reason = str(closed)
            except CannotResume as refusal:
                reason = f"{lost}; the stream could not be continued: {refusal}"
                break
            except (ReplicaLost, TimeoutError, RequestError) as again:
                if isinstance(again, ReplicaLost):
                    self._suspicion.lost(self._directory.application(record.model), exchange.suspect, again.death)
                reason = str(again) or type(again).__name__
                if isinstance(again, UnreadableAnswer):
                    break
            except Exception as unexpected:  # The client has half a stream, and must learn of any error.
                logger.exception("A stream could not be continued.")
                reason = f"{lost}; {type(unexpected).__name__}: {unexpected}"
                break
        if transcript is not None and transcript.done:
            return None
        raise ModelUnavailable(f"The model's replica was lost during the stream: {reason}.", retry_after_s=1.0)

    async def _go_on_once(
        self, exchange: Exchange, config: RouterConfig, request: HttpRequest, transcript: Transcript
    ) -> Resumed:
        """Makes one try with another replica. Raises TimeoutError if that gives no byte in time."""
        name = exchange.record.model
        await self._ready(exchange, config, name)
        async with asyncio.timeout(config.first_byte_timeout_s):
            return await resume(self._upstream, name, request, transcript)

    async def _ready(self, exchange: Exchange, config: RouterConfig, name: str, patient: bool = True) -> None:
        """Waits until the model is ready and it is the request's turn. Raises what the two waits raise."""
        model = await self._directory.find(name)
        exchange.record.found(name)
        await self._waiting_room.pass_through(model, exchange.downstream, config, patient)
        await self._suspicion.before_next_try(self._directory.application(name), exchange.suspect)

    async def _open_one(
        self, exchange: Exchange, config: RouterConfig, name: str, request: HttpRequest, patient: bool
    ) -> Answer:
        """Returns an answer with its first piece. The request is sent again if its replica is lost
        before that."""
        patience, retries = Patience(), 0
        while True:
            await self._ready(exchange, config, name, patient)
            answer, lost = await self._try(exchange, config, name, request)
            if answer is not None and lost is None:
                return answer
            assert lost is not None, "a try without an answer is lost"
            if isinstance(lost, NotOpen) and not (isinstance(lost, EngineGone) and patience.has_ended()):
                await asyncio.sleep(LOOK_AGAIN_S)  # Nothing was sent, so it goes back into the waiting room.
                continue
            self._suspicion.lost(self._directory.application(name), exchange.suspect, lost.death)
            if retries >= config.max_retries:
                return await self._given_up(exchange, config, name, answer, lost)
            if answer is not None:
                await answer.close()
            retries += 1
            exchange.retried()
            await _backoff(retries)

    async def _try(
        self, exchange: Exchange, config: RouterConfig, name: str, request: HttpRequest
    ) -> tuple[Answer | None, ReplicaLost | None]:
        """Returns an answer, a loss, or both if the answer says that its engine is lost."""
        seconds = config.first_byte_timeout_s
        with self._place(name, config) as queue:
            try:
                with exchange.timing.sending():
                    async with asyncio.timeout(seconds), self._waking(exchange, name):
                        answer = await first_piece(await self._upstream.send(name, request))
            except TimeoutError:
                text = f"'{name}' sent no byte within {seconds:g} s (first_byte_timeout_s)."
                raise DeadlineExceeded(text) from None
            except ReplicaLost as lost:
                return None, lost
            if is_lost_status(answer.status):
                return answer, answer.lost(f"it answered with {answer.status}")
            queue.answered()
            return answer, None

    @asynccontextmanager
    async def _waking(self, exchange: Exchange, name: str) -> AsyncIterator[None]:
        """Tells a client that asked for comments if the replica has to become resident before it answers."""
        is_told = exchange.downstream.wants_comments
        wake = self._residency.wake(self._directory.application(name)) if is_told else None
        if wake is None:
            yield
            return
        guess = " (a guess)" if wake.is_guess else ""
        text = f"waking '{name}', which takes about {wake.seconds:.1f} s{guess} once it is its turn"
        async with commented(exchange.downstream, lambda: text):
            yield

    async def _given_up(
        self, exchange: Exchange, config: RouterConfig, name: str, answer: Answer | None, lost: ReplicaLost
    ) -> Answer:
        """Ends the tries and returns an answer that says itself that its engine is lost. Raises HarmfulRequest, or
        ModelUnavailable if there is no such answer."""
        try:
            await self._suspicion.judge(self._directory.application(name), exchange.suspect)
        except BaseException:
            if answer is not None:
                await answer.close()
            raise
        if answer is not None:
            return answer
        text = f"The replica of '{name}' was lost while it answered, in {config.max_retries + 1} tries: {lost}"
        raise ModelUnavailable(text, retry_after_s=1.0) from lost

    @contextmanager
    def _place(self, name: str, config: RouterConfig) -> Iterator[ModelQueue]:
        """Takes a place in the model's queue and in the metrics."""
        queue = self.queues[name]
        try:
            with queue.place(config):
                self._metrics.waiting(name, queue.waiting)
                yield queue
        finally:
            self._metrics.waiting(name, queue.waiting)


async def _backoff(repeats: int) -> None:
    """Waits before the next try, and longer after each one."""
    await asyncio.sleep(BACKOFF_S[min(repeats, len(BACKOFF_S)) - 1])
