"""Takes a request through the router: reads it, admits it, sends it to a model by name, and passes the answer back.

Its law is that nothing is lost silently. A request without a first byte is sent again if its replica is lost
(`dispatcher`), and a stream of text is continued (`relay`, `resume`). If neither is possible, the answer ends with an
error that the client can read.
"""

import asyncio
import logging
import uuid
from collections.abc import Mapping
from functools import partial

from starlette.types import Receive, Scope, Send

from serve_app.access.gate import ROUTER_HEADER, Gate, metered_for, with_key_name
from serve_app.access.keys import ApiKey
from serve_app.config import RouterConfig
from serve_app.errors import DeadlineExceeded, Forbidden, RateLimited, RequestError, Unauthorized
from serve_app.router.directory import Directory
from serve_app.router.dispatcher import Dispatcher, RequestTo
from serve_app.router.downstream import HOP_BY_HOP
from serve_app.router.exchange import Exchange
from serve_app.router.metrics import RouterMetrics
from serve_app.router.names import meant_by, stand_ins
from serve_app.router.observer import Nobody, Observer
from serve_app.router.relay import Relay
from serve_app.router.residency import Residency
from serve_app.router.upstream.protocol import Upstream
from serve_app.wire.arrival import MOST_ID_BYTES, read_body, require_plain_path, require_small_headers
from serve_app.wire.asgi import HttpRequest, endpoint, unless_gone
from serve_app.wire.asked_model import Asked
from serve_app.wire.body import RequestBody
from serve_app.wire.body_threads import beside_loop
from serve_app.wire.headers import header
from serve_app.wire.possible import require_possible
from serve_app.wire.usage import estimate_tokens

logger = logging.getLogger("ray.serve")

# The body was read as JSON, whatever type curl gives it by default, and vLLM insists on this type.
JSON = (b"content-type", b"application/json")
REPLACED = HOP_BY_HOP | {JSON[0], b"x-request-id", ROUTER_HEADER}
# A client that streams and sends this header gets comments that say how long its model still loads.
PROGRESS_HEADER = b"x-serve-app-progress"


class Forwarder:
    """This is the router's endpoint for everything that names a model in its body. `config` may be replaced while it
    runs. `observer` is told of all requests."""

    def __init__(
        self,
        config: RouterConfig,
        directory: Directory,
        upstream: Upstream,
        metrics: RouterMetrics,
        gate: Gate,
        residency: Residency,
    ):
        self.config = config
        self.observer: Observer = Nobody()
        self._gate = gate
        self._directory = directory
        self._upstream = upstream
        self._metrics = metrics
        self._dispatcher = Dispatcher(directory, upstream, metrics, residency)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one kind of request, POST with a JSON body, as an ASGI application."""
        given = (header(scope["headers"], b"x-request-id") or b"")[:MOST_ID_BYTES].decode("latin-1")
        path = endpoint(scope)
        exchange = Exchange.begin(given or uuid.uuid4().hex, path, send, self._metrics, self.observer)
        try:
            require_small_headers(scope["headers"], self.config)
            require_plain_path(path)
            key = self._gate.identity_of(scope)
            exchange.record.came_with(None if key is None else key.name)
            body = await read_body(scope, receive, self.config)
            exchange.timing.was_read()
            await unless_gone(self._answer(exchange, scope, key, body), receive)
        except RequestError as error:
            if isinstance(error, Unauthorized | Forbidden | RateLimited):
                self._metrics.key_refused(error.status)
            await exchange.downstream.fail(error)
        except asyncio.CancelledError:
            exchange.downstream.left()
            raise
        except Exception as error:  # The mistake is ours or a library's, and the waiting client must get an answer.
            logger.exception("A request failed in the router.")
            await exchange.downstream.fail(RequestError(f"The router failed: {type(error).__name__}: {error}"))
        finally:
            exchange.ended()
            logger.info(exchange.record.log_line())

    def queued(self, name: str) -> dict[str, int]:
        """Returns how many requests wait for the model's first byte, and how many wait for it to load."""
        queue = self._dispatcher.queues.get(name)
        return {"waiting": queue.waiting if queue else 0, "held": queue.held if queue else 0}

    def wake(self, name: str) -> None:
        """Starts a replica of a model that is scaled to zero, as a request for it would. It returns at once."""
        self._dispatcher.wake(name, self.config)

    async def start(self) -> None:
        """Opens the way to the replicas. It belongs to the event loop that calls this."""
        await self._upstream.start()

    async def close(self) -> None:
        """Closes the way to the replicas when the router ends."""
        await self._upstream.close()

    async def _answer(self, exchange: Exchange, scope: Scope, key: ApiKey | None, body: RequestBody) -> None:
        """Admits the request, has it answered, and settles what it cost."""
        size, downstream = len(body.content), exchange.downstream
        seen = await beside_loop(size, body.peek)
        downstream.wants_comments = seen.stream is True and header(scope["headers"], PROGRESS_HEADER) is not None
        asked = await self._asked(seen.model)
        if key is not None:
            key.require(next(iter(asked.values())))
        estimate = estimate_tokens(size, seen.token_limit, seen.answers)
        admission = await self._gate.admit(key, estimate)
        downstream.admitted(admission.headers)
        if self.config.console_keeps_prompts:
            await self.observer.admitted(exchange, body)
        if admission.counts_tokens:
            body, meter = await metered_for(admission, exchange.record.path, seen, body)
            downstream.metered_by(meter)
        is_refused = False
        try:
            await beside_loop(size, partial(require_possible, exchange.record.path, body))
            request_to = _requests(exchange, scope, seen.model, asked, body)
            await self._answer_of(_allowed(asked, key), exchange, request_to)
        except RequestError as error:
            is_refused = not exchange.timing.first and not isinstance(error, DeadlineExceeded)
            raise
        finally:
            await admission.release(exchange.record.tokens_used(estimate, is_refused))

    async def _asked(self, written: str | None) -> dict[str, Asked]:
        """Returns what may answer for the name that a client wrote, by the names that the directory has for that: what
        is meant, then what stands in for it. An unknown name is a model's. Raises InvalidRequest."""
        config = self.config
        first = await self._look_up(meant_by(config, written))
        default = config.default_model if written is None else written
        name, what = first
        others = stand_ins(config, default, name, what.qualified, what.name)
        return dict([first, *[await self._look_up(other) for other in others]])

    async def _look_up(self, name: str) -> tuple[str, Asked]:
        model = await self._directory.look_up(name)
        return (name, Asked(name)) if model is None else (model.name, model.asked)

    async def _answer_of(self, names: list[str], exchange: Exchange, request_to: RequestTo) -> None:
        config = self.config
        ends = asyncio.get_running_loop().time() + config.total_timeout_s
        try:
            async with asyncio.timeout_at(ends):
                answer, request = await self._dispatcher.open(exchange, config, names, request_to)
        except TimeoutError:
            raise DeadlineExceeded(f"No answer came within {config.total_timeout_s:g} s (total_timeout_s).") from None
        try:
            await Relay(exchange, request, config, ends, self._dispatcher).pass_back(answer)
        finally:
            await answer.close()


def _allowed(asked: Mapping[str, Asked], key: ApiKey | None) -> list[str]:
    """Returns the names without stand-ins that the key may not use. The model itself was checked already."""
    return [name for name, what in asked.items() if key is None or key.may_use(what)]


def _requests(
    exchange: Exchange, scope: Scope, written: str | None, asked: Mapping[str, Asked], body: RequestBody
) -> RequestTo:
    """Returns a function that makes the request to a model by its name, because an engine refuses a name that is not
    its own. The body has the name `written`, and `asked` says what each name means."""
    named = header(scope["headers"], b"connection") or b""  # It names this connection's headers (RFC 9110, 7.6.1).
    dropped = REPLACED | {part.strip().lower() for part in named.split(b",")}
    kept = [pair for pair in scope["headers"] if pair[0] not in dropped]
    headers = with_key_name(kept, exchange.record.key)
    headers += [JSON, (b"x-request-id", exchange.record.request_id.encode("latin-1"))]
    bodies = {written: body.content}

    async def request_to(name: str) -> HttpRequest:
        own = asked[name].name
        if own not in bodies:
            bodies[own] = (await beside_loop(len(body.content), partial(body.with_fields, model=own))).content
        return HttpRequest(scope["method"], exchange.record.path, scope["query_string"], headers, bodies[own])

    return request_to
