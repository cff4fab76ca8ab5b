"""One request's way through the router: read, admitted, sent to a model by name, and its answer passed back as bytes.

Laws: nothing is lost in silence. A request without a first byte is sent again when its replica is lost; a stream of
text is taken up again (`relay`, `resume`); what cannot be ends with an error that the client can read.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

from starlette.types import Message, Receive, Scope, Send

from serve_app.access.gate import ROUTER_HEADER, Gate, metered_for, refusal, with_key_name
from serve_app.config import RouterConfig
from serve_app.errors import (
    ClientGone,
    DeadlineExceeded,
    Forbidden,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
    RateLimited,
    RequestError,
    Unauthorized,
)
from serve_app.router.directory import ModelDirectory
from serve_app.router.engine_loss import is_lost_status
from serve_app.router.exchange import HOP_BY_HOP, Exchange
from serve_app.router.metrics import RouterMetrics
from serve_app.router.names import candidates
from serve_app.router.queues import ModelQueue, Queues
from serve_app.router.relay import Relay, backoff, last_words
from serve_app.router.suspicion import Suspicion
from serve_app.router.upstream.protocol import (
    Answer,
    EngineGone,
    NotOpen,
    Patience,
    ReplicaLost,
    Upstream,
    first_piece,
    is_stream,
)
from serve_app.router.waiting_room import LOOK_AGAIN_S, WaitingRoom
from serve_app.wire.asgi import Headers, HttpRequest, endpoint, unless_gone
from serve_app.wire.body import (
    MOST_ID_BYTES,
    header,
    peek,
    read_body,
    require_plain_path,
    require_small_headers,
    with_model,
)
from serve_app.wire.body_threads import beside_loop
from serve_app.wire.usage import estimate_tokens

logger = logging.getLogger("ray.serve")

# The body was read as JSON, whatever curl calls it by default; vLLM insists on the name.
JSON = (b"content-type", b"application/json")
REPLACED = HOP_BY_HOP | {JSON[0], b"x-request-id", ROUTER_HEADER}
# A client that streams and sends it is told, in comments, how long its model still loads.
PROGRESS_HEADER = b"x-serve-app-progress"


class Forwarder:
    """The router's endpoint for everything that names a model in its body. `config` may be replaced while it runs."""

    def __init__(
        self,
        config: RouterConfig,
        directory: ModelDirectory,
        upstream: Upstream,
        metrics: RouterMetrics,
        gate: Gate,
    ):
        self.config = config
        self._gate = gate
        self._upstream = upstream
        self._metrics = metrics
        self._queues = Queues()
        self._waiting_room = WaitingRoom(directory, upstream, self._queues)
        self._suspicion = Suspicion()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application for one kind of request: POST with a JSON body."""
        headers: Headers = scope["headers"]
        given = (header(headers, b"x-request-id") or b"")[:MOST_ID_BYTES].decode("latin-1")
        path = endpoint(scope)
        exchange = Exchange(given or uuid.uuid4().hex, path, send)
        try:
            require_small_headers(headers, self.config)
            require_plain_path(path)
            body = await read_body(headers, receive, self.config)
            exchange.read = time.perf_counter()
            await unless_gone(self._answer(exchange, scope, body), receive)
        except RequestError as error:
            if isinstance(error, Unauthorized | Forbidden | RateLimited):
                self._metrics.key_refused(error.status)
            await _refuse(exchange, error)
        except asyncio.CancelledError:
            exchange.status = exchange.status or ClientGone.status
            raise
        except Exception as error:  # Ours, or a library's. Whoever waits must not wait for a broken connection.
            logger.exception("a request failed in the router")
            await _refuse(exchange, RequestError(f"The router failed: {type(error).__name__}: {error}"))
        finally:
            exchange.suspect.cleared()
            exchange.count(self._metrics)
            logger.info(exchange.log_line())

    def queued(self, name: str) -> dict[str, int]:
        """Requests that wait for the model's first byte, and for the model to load."""
        queue = self._queues.get(name)
        return {"waiting": queue.waiting if queue else 0, "held": queue.held if queue else 0}

    async def start(self) -> None:
        """The router begins. What it calls later belongs to this event loop."""
        await self._upstream.start()

    async def close(self) -> None:
        """The router ends."""
        await self._upstream.close()

    async def _answer(self, exchange: Exchange, scope: Scope, body: bytes) -> None:
        seen = await beside_loop(len(body), partial(peek, body))
        exchange.wants_progress = seen.stream is True and header(scope["headers"], PROGRESS_HEADER) is not None
        names = self._allowed(candidates(self.config, seen.model), scope["headers"])
        estimate = estimate_tokens(len(body), seen.token_limit, seen.answers)
        admission = await self._gate.admit(scope["headers"], names[0], estimate)
        exchange.key, exchange.extra_headers = admission.key_name, admission.headers
        if admission.counts_tokens:
            body, exchange.meter = await metered_for(admission, exchange.path, seen, body)
        is_refused = False
        try:
            await self._answer_of(names, seen.model, exchange, scope, body)
        except RequestError as error:
            is_refused = not exchange.first and not isinstance(error, DeadlineExceeded)
            raise
        finally:  # What was refused used no tokens. An engine that was sent it works until its client leaves, or does
            # not take the answer, or until a deadline: then the estimate stands, if the answer tells no more.
            failed = exchange.error_status or exchange.status
            is_error = failed >= 400 and failed != DeadlineExceeded.status and exchange.pieces <= 1
            is_free = is_refused or is_error or not exchange.sent
            await admission.release(0 if is_free else exchange.meter.total_tokens(estimate))

    def _allowed(self, names: list[str], headers: Headers) -> list[str]:
        """Stand-ins that the key does not open are left out; the model that was meant is refused by the gate."""
        key = self._gate.identify(headers)
        return names if key is None else [names[0], *(name for name in names[1:] if key.may_use(name))]

    async def _answer_of(
        self, names: list[str], asked: str | None, exchange: Exchange, scope: Scope, body: bytes
    ) -> None:
        named = header(scope["headers"], b"connection") or b""  # Headers of this connection alone (RFC 9110, 7.6.1).
        dropped = REPLACED | {part.strip().lower() for part in named.split(b",")}
        headers = with_key_name([pair for pair in scope["headers"] if pair[0] not in dropped], exchange.key)
        headers += [JSON, (b"x-request-id", exchange.request_id.encode("latin-1"))]

        bodies = {asked: body}

        async def request_to(name: str) -> HttpRequest:
            if name not in bodies:
                bodies[name] = await beside_loop(len(body), partial(with_model, body, name))
            return HttpRequest(scope["method"], exchange.path, scope["query_string"], headers, bodies[name])

        ends = asyncio.get_running_loop().time() + self.config.total_timeout_s
        try:
            async with asyncio.timeout_at(ends):
                answer, request = await self._open(exchange, names, request_to)
        except TimeoutError:
            raise DeadlineExceeded(f"No answer within {self.config.total_timeout_s:g} s (total_timeout_s).") from None
        relay = Relay(exchange, request, self.config, ends, self._waiting_room.pass_through, self._suspicion)
        try:
            if not exchange.is_early:
                await exchange.send(exchange.head(answer.status, answer.headers))
            exchange.first = time.perf_counter()
            if is_stream(answer):
                await relay.events(answer, self._upstream, self._metrics)
            elif exchange.is_early:
                await relay.refusal(answer)
            else:
                await relay.plain(answer)
        finally:
            await answer.close()

    async def _open(
        self, exchange: Exchange, names: list[str], request_to: Callable[[str], Awaitable[HttpRequest]]
    ) -> tuple[Answer, HttpRequest]:
        """The first model that takes the request: none waits for a loading one while another is ready."""
        failures: list[RequestError] = []
        full: dict[str, tuple[Answer, HttpRequest]] = {}  # Those that said so. The last of them is the answer then.
        try:
            for patient in (False, True) if len(names) > 1 else (True,):
                for name in names:
                    if name in full:
                        continue
                    request = await request_to(name)
                    try:
                        answer = await self._open_one(exchange, name, request, patient)
                    except (ModelNotFound, ModelUnavailable, Overloaded) as error:
                        failures.append(error)
                        continue
                    if not is_lost_status(answer.status) and answer.status != 429:
                        return answer, request
                    full[name] = answer, request
            if full:
                return full.popitem()[1]
        finally:
            for answer, _ in full.values():
                await answer.close()
        raise failures[0]

    async def _open_one(self, exchange: Exchange, name: str, request: HttpRequest, patient: bool) -> Answer:
        """An answer of which the first piece is there. Sent again when its replica is lost before that."""
        config, suspect, patience = self.config, exchange.suspect, Patience()
        retries = 0
        while True:
            await self._waiting_room.pass_through(exchange, name, config, patient)
            await self._suspicion.before_next_try(name, suspect)
            answer, lost = await self._try(exchange, name, request)
            if answer is not None and lost is None:
                return answer
            assert lost is not None, "a try without an answer is lost"
            if isinstance(lost, NotOpen) and not (isinstance(lost, EngineGone) and patience.has_ended()):
                await asyncio.sleep(LOOK_AGAIN_S)  # And back into the waiting room: nothing was sent.
                continue
            self._suspicion.lost(name, suspect, lost.death)
            if retries >= config.max_retries:
                return await self._given_up(exchange, name, answer, lost)
            if answer is not None:
                await answer.close()
            retries += 1
            exchange.retries += 1
            self._metrics.retried(name)
            await backoff(retries)

    async def _try(
        self, exchange: Exchange, name: str, request: HttpRequest
    ) -> tuple[Answer | None, ReplicaLost | None]:
        """An answer, a loss, or both where the answer says that its engine is lost."""
        seconds = self.config.first_byte_timeout_s
        with self._place(name) as queue:
            exchange.sent = time.perf_counter()
            try:
                async with asyncio.timeout(seconds):
                    answer = await first_piece(await self._upstream.send(name, request))
            except TimeoutError:
                text = f"'{name}' gave no byte within {seconds:g} s (first_byte_timeout_s)."
                raise DeadlineExceeded(text) from None
            except ReplicaLost as lost:
                return None, lost
            if is_lost_status(answer.status):
                return answer, answer.lost(f"it answered with {answer.status}")
            queue.answered()
            return answer, None

    async def _given_up(self, exchange: Exchange, name: str, answer: Answer | None, lost: ReplicaLost) -> Answer:
        """After the last try: the answer that says so itself. Raises HarmfulRequest, or ModelUnavailable."""
        try:
            await self._suspicion.judge(name, exchange.suspect)
        except BaseException:
            if answer is not None:
                await answer.close()
            raise
        if answer is not None:
            return answer
        text = f"The replica of '{name}' was lost while answering ({self.config.max_retries + 1} tries): {lost}"
        raise ModelUnavailable(text, retry_after_s=1.0) from lost

    @contextmanager
    def _place(self, name: str) -> Iterator[ModelQueue]:
        """A place in the model's queue, and in the metrics."""
        queue = self._queues[name]
        try:
            with queue.place(self.config):
                self._metrics.waiting(name, queue.waiting)
                yield queue
        finally:
            self._metrics.waiting(name, queue.waiting)


async def _refuse(exchange: Exchange, error: RequestError) -> None:
    """An error before the first byte is an answer, and an event where the head went ahead with comments. Later the
    connection is broken, so that the client sees it."""
    if isinstance(error, ClientGone):
        exchange.status = error.status
        return
    if exchange.is_early and not exchange.pieces:
        await last_words(exchange.tell(error), exchange.end())
        return
    exchange.error_code = error.code
    if exchange.status:
        exchange.error_status = error.status
        raise error
    exchange.status = error.status
    response = refusal(error)
    for name, value in exchange.extra_headers:
        response.headers[name.decode("latin-1")] = value.decode("latin-1")
    await response({"type": "http"}, _never, exchange.send)


async def _never() -> Message:
    raise AssertionError("a refusal reads nothing")
