"""Checks every HTTP request before Ray Serve sees it, in each process that listens.

Serve calls `middlewares` (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH) wherever it starts an HTTP server: in every
replica, on whose own port HAProxy, the router and other nodes call, and in its Python proxies, if the variable reaches
those.
It has to be before Serve, since Serve

- reads the whole body into memory while the request waits for its turn, without a bound and whoever sends it, so the
  key is checked first, and the body is read here, within its limits and within a budget over all bodies;
- obeys headers of the client that switch off its own cancellation and time limit, or choose among its replicas;
- answers 500 in plain text to a header that is not UTF-8.

The key and the body go along in the scope (`identity`, `wire/arrival`), so that no later layer looks them up or reads
them again. The gates behind the door (`gate`) look the key up if the scope has none, because a handle leads past
this door.
"""

import json
import logging
import os
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ray import serve
from ray.serve.exceptions import RayServeException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.access.body_budget import BodyBudget, Held, NoBody
from serve_app.access.gate import Gate, asks_for_console, is_admitted, is_console_page, refusal, websocket
from serve_app.access.identity import with_identity
from serve_app.access.keys import KeySource, configured_keys
from serve_app.access.limiter import ActorLimiter
from serve_app.config import MAX_BODIES_BYTES, ModelConfig, RouterConfig
from serve_app.errors import ClientGone, ConfigError, Forbidden, InvalidRequest, RequestError, Unauthorized
from serve_app.ray_serve import MIDDLEWARES_VARIABLE, session_header
from serve_app.wire.anthropic.errors import in_messages_form
from serve_app.wire.arrival import MOST_ID_BYTES, read_body, with_body
from serve_app.wire.asgi import endpoint
from serve_app.wire.body import RequestBody
from serve_app.wire.headers import Headers, declared_bytes, header

logger = logging.getLogger("ray.serve")

REQUEST_ID = b"x-request-id"
# A client may not steer Serve with these headers. Serve reads "_" as "-" in some of them.
SERVES_OWN = frozenset({b"x-request-disconnect-disabled", b"x-request-timeout-seconds", b"serve-multiplexed-model-id"})
# Serve decodes their values as UTF-8 and does not expect that to fail.
READ_BY_SERVE = frozenset({REQUEST_ID, b"traceparent", b"tracestate", session_header()})
# These paths are Serve's own, and HAProxy asks for them all the time.
WITHOUT_KEY = frozenset({"/-/healthz", "/-/routes"})
# Serve's proxy does not know for which model a body is, so only the budget of the process bounds it.
LIMITS_OF_PROXY = RouterConfig(max_body_bytes=MAX_BODIES_BYTES // 2)


@dataclass(frozen=True)
class Inside:
    """Describes what is behind the door of this process. `model` is None if there are several models. `adapters`
    returns the names of its adapters, and is None if it has none; whether a key may use the one that a body names is
    decided behind the door.

    `limits` returns the current limits, and `refused` is called with the status of each refused request. `wakes` means
    that Serve starts a replica for a request that comes in here and finds none.
    """

    gate: Gate | None
    limits: Callable[[], RouterConfig | ModelConfig]
    model: str | None = None
    refused: Callable[[int], None] = lambda status: None
    wakes: bool = False
    adapters: Callable[[], Collection[str]] | None = None


_of_this_process: Inside | None = None


def stand_behind(inside: Inside) -> None:
    """Is called by the replica of this process before Serve starts its HTTP server."""
    global _of_this_process
    _of_this_process = inside


def require_door(environment: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError in a replica whose process does not name the door to Serve, as its HTTP server would have
    none.

    An application without a `runtime_env` runs in whatever environment its node's Ray was started with.
    """
    if not environment.get(MIDDLEWARES_VARIABLE):
        raise ConfigError(
            f"{MIDDLEWARES_VARIABLE} is not set on this node, though it is where the application was built. Restart "
            'Ray on this node with Serve\'s settings: eval "$(serve-app node-env)", then `ray start`.'
        )


def middlewares() -> list[Middleware]:
    """Returns the door as a middleware. Serve calls this once for each HTTP server of the process."""
    return [Middleware(OuterDoor, inside=_of_this_process or _of_others())]


def _of_others() -> Inside:
    """Returns what is behind Serve's own proxy, which needs a key so that nobody else wakes a model, or behind another
    application's replica, which needs none."""
    try:
        serve.get_replica_context()
    except RayServeException:
        return Inside(Gate(_keys_of_proxy(), ActorLimiter()), lambda: LIMITS_OF_PROXY, wakes=True)
    return Inside(None, lambda: LIMITS_OF_PROXY)


def _keys_of_proxy() -> KeySource:
    try:
        return configured_keys()
    except ConfigError as error:
        logger.error("Serve's proxy on this node refuses every request, because it cannot read its API keys. %s", error)
        source = KeySource(None, {})
        source.shut()
        return source


class OuterDoor:
    """Puts the door in front of an ASGI application."""

    def __init__(self, app: ASGIApp, inside: Inside):
        self._app = app
        self._inside = inside
        self._budget = BodyBudget(lambda: getattr(inside.limits(), "max_bodies_bytes", MAX_BODIES_BYTES))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI call."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket({**scope, "headers": _passed_on(scope["headers"])}, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._inside.gate is None:
            await self._app(scope, receive, send)
        elif not await websocket(self._inside.gate, self._app, scope, receive, send):
            self._inside.refused(Forbidden.status)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = {**scope, "headers": _passed_on(scope["headers"])}
        send = in_messages_form(scope, send)  # Layers behind the door, Serve among them, write errors in other forms.
        try:
            _require_readable(scope["headers"])
            scope, held = self._entered(scope)
        except RequestError as error:
            await self._refuse(error, scope, receive, send)
            return
        try:
            body = await self._read(scope, receive, send, held)
            if body is not None:
                await self._app(*with_body(scope, receive, body), send)
        finally:
            held.release()

    async def _read(self, scope: Scope, receive: Receive, send: Send, held: Held) -> RequestBody | None:
        """Returns the whole body, or None if it was refused or its client has left."""
        try:
            return await read_body(scope, receive, self._inside.limits(), held.grow)
        except ClientGone as error:
            self._inside.refused(error.status)
        except RequestError as error:
            held.release()
            await self._refuse(error, scope, receive, send)
        return None

    def _entered(self, scope: Scope) -> tuple[Scope, Held]:
        """Returns the scope with the request's key, if it needs one, and the account of its body under that key.

        Raises Unauthorized, Forbidden and RequestTooLarge.
        """
        gate, path = self._inside.gate, endpoint(scope)
        if gate is None or is_admitted(scope):
            return scope, self._budget.hold()
        # A model's health check would wake it, so only the router's needs no key there. Elsewhere the gate decides.
        is_free = path == "/health" if self._inside.wakes else path.endswith("/health")
        is_page = self._inside.model is None and is_console_page(scope)
        if path in WITHOUT_KEY or is_page or (scope["method"] == "GET" and is_free):
            held = NoBody()
            held.grow(declared_bytes(scope["headers"]))
            return scope, held
        key, model = gate.identify(scope["headers"]), self._inside.model
        if key is not None and model is not None:
            key.require_any_of(model, () if self._inside.adapters is None else self._inside.adapters())
        return with_identity(scope, key), self._budget.hold(None if key is None else key.name)

    async def _refuse(self, error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with the error, and adds an id, counts and logs it, because Serve and the router never see it. The
        first request of the console's page is no refusal that anybody should look into, so it does not count."""
        given = header(scope["headers"], REQUEST_ID) or b""
        request_id = given.decode("ascii") if given.isascii() and given else uuid.uuid4().hex
        if not (isinstance(error, Unauthorized) and self._inside.model is None and asks_for_console(scope)):
            self._inside.refused(error.status)
        line = {"request_id": request_id, "path": scope["path"], "status": error.status, "error_code": error.code}
        logger.info(json.dumps(line))
        response = refusal(error)
        response.headers["x-request-id"] = request_id
        await response(scope, receive, send)


def _passed_on(headers: Headers) -> Headers:
    """Returns the headers without those that steer Serve, and without an id that is too long, which Serve replaces."""
    return [
        (name, value)
        for name, value in headers
        if name.replace(b"_", b"-") not in SERVES_OWN and not (name == REQUEST_ID and len(value) > MOST_ID_BYTES)
    ]


def _require_readable(headers: Headers) -> None:
    for name, value in headers:
        if name in READ_BY_SERVE and not value.isascii():
            try:
                value.decode()
            except UnicodeDecodeError:
                raise InvalidRequest(f"The header '{name.decode()}' is not text in UTF-8.") from None
