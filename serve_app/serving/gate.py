"""The door: who may enter, how much, and what came of it.

`Gate` decides for one request; the router asks it by name. `KeyedApp` puts it around a model's own route.
"""

import hmac
import re
from collections.abc import Iterable
from typing import NoReturn

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import ModelConfig, RouterConfig
from serve_app.engines.openai_errors import error_response
from serve_app.errors import ClientGone, InvalidRequest, RateLimited, RequestError, TokensLimited, Unauthorized
from serve_app.serving.incoming import peek, read_body, replayed
from serve_app.serving.keys import ApiKey, KeySource
from serve_app.serving.limiter_actor import router_token
from serve_app.serving.limits import Limiter, Limits, Verdict, duration

Headers = Iterable[tuple[bytes, bytes]]

# Bytes of a token on the average, for an estimate before the request; English is at four to five.
BYTES_PER_TOKEN = 4

# What the router shows to models' own routes.
ROUTER_HEADER = b"x-serve-app-router"

# The bytes at the end of a response in which its usage is looked for.
TAIL_BYTES = 2048

# Text that a model or a client wrote cannot look like this: inside a JSON string the quotes are escaped.
TOTAL_TOKENS = re.compile(rb'"total_tokens"\s*:\s*(\d{1,12})')

# Those of a body, where no model says others.
DEFAULT_LIMITS = RouterConfig()

# Methods that make no model work. They need a key, and cost nothing of its limits.
FREE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Admission:
    """One request that may go on. `headers` belong onto its response; `key_name` is None where nobody needs a key.

    `release` has to be called when the response has ended, in whatever way.
    """

    def __init__(self, key_name: str | None = None, verdict: Verdict | None = None, limiter: Limiter | None = None):
        self.key_name = key_name
        self.headers: list[tuple[bytes, bytes]] = list(verdict.headers) if verdict else []
        self._lease = verdict.lease if verdict else None
        self._limiter = limiter

    async def release(self, tokens_used: int | None) -> None:
        """Ends the request, with the tokens of prompt and answer together; None keeps the estimate.

        A second call does nothing. It awaits nothing, so it works within a `finally` of a cancelled task.
        """
        lease, self._lease = self._lease, None
        if lease is not None and self._limiter is not None and self.key_name is not None:
            self._limiter.settle(self.key_name, lease, tokens_used)


class Gate:
    """Keys and their limits, for one process."""

    def __init__(self, source: KeySource, limiter: Limiter):
        self.source = source
        self._limiter = limiter

    async def start(self) -> None:
        """Gets the limiter ready where a key has limits. It may be left out: the first request does it else."""
        if any(key.limits for key in self.source.ring.keys):
            await self._limiter.warm_up()

    def identify(self, headers: Headers, model: str | None = None) -> ApiKey | None:
        """The key of a request, without a charge: for what makes no model work. None where nobody needs a key.

        Header names are lower-case. Raises Unauthorized, and Forbidden for a `model` that the key does not open.
        """
        if self.source.is_open:
            return None
        ring = self.source.refresh()
        first: dict[bytes, bytes] = {}
        for name, value in headers:
            first.setdefault(name, value)
        key = ring.find(first.get(b"authorization"), first.get(b"x-api-key"))
        if model is not None:
            ring.allows(key, model)
        return key

    async def admit(self, headers: Headers, model: str | None, estimated_tokens: int) -> Admission:
        """Lets one request in and charges it to its key.

        Raises Unauthorized, Forbidden, and RateLimited where the key has used up one of its limits.
        """
        key = self.identify(headers, model)
        if key is None:
            return Admission()
        limits = key.limits
        if not limits:
            return Admission(key.name)
        verdict = await self._limiter.take(key.name, limits, estimated_tokens)
        if not verdict.allowed:
            _refuse(key.name, limits, verdict)
        return Admission(key.name, verdict, self._limiter)


def _refuse(key: str, limits: Limits, verdict: Verdict) -> NoReturn:
    wait_s = verdict.retry_after_s or 0.0
    what = {
        "requests": f"{limits.requests_per_minute} requests a minute",
        "tokens": f"{limits.tokens_per_minute} tokens a minute",
        "concurrent": f"{limits.max_concurrent_requests} requests at once",
    }[verdict.reason or "requests"]
    kind = TokensLimited if verdict.reason == "tokens" else RateLimited
    raise kind(
        f"Rate limit reached: the API key '{key}' has {what}. Try again in {duration(wait_s)}.",
        retry_after_s=wait_s,
        headers=[(name.decode(), value.decode()) for name, value in verdict.headers],
    )


def refusal(error: RequestError) -> Response:
    """OpenAI's error object with the headers that the error brings: www-authenticate, x-ratelimit-…, retry-after."""
    response = error_response(error)
    if isinstance(error, Unauthorized | RateLimited):
        for name, value in error.headers:
            response.headers[name] = value
    return response


def estimate_tokens(body_bytes: int, max_tokens: int | None = None) -> int:
    """Tokens that a request may take, before it runs: its body's length in tokens, and what it asks for at most."""
    return body_bytes // BYTES_PER_TOKEN + max(0, max_tokens or 0)


def total_tokens(tail: bytes) -> int | None:
    """The last `total_tokens` in the end of a response. None where there is none, as without `include_usage`."""
    found = TOTAL_TOKENS.findall(tail)
    return int(found[-1]) if found else None


class UsageTail:
    """The last bytes of a response, in which its `usage` stands."""

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, piece: bytes) -> None:
        """Takes the next piece of the body."""
        self._tail = (self._tail + piece[-TAIL_BYTES:])[-TAIL_BYTES:]

    def total_tokens(self) -> int | None:
        """Of the last bytes."""
        return total_tokens(self._tail)


class KeyedRouter:
    """The router's application behind a gate: everything but GET /health needs a key. What a request may use, and how
    much, is decided where its model is known."""

    def __init__(self, app: ASGIApp, gate: Gate):
        self._app = app
        self._gate = gate
        for name in ("routes", "router"):
            if hasattr(app, name):
                setattr(self, name, getattr(app, name))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and not self._gate.source.is_open and not _is_health(scope):
            try:
                self._gate.identify(scope["headers"])
            except RequestError as error:
                await refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class KeyedApp:
    """An application behind a gate: every HTTP request but GET /health needs a key that opens `model_name`.

    That holds for paths that do not exist too, for documentation and for metrics. Websockets are refused, as nothing
    would count them. The body is read within `limits` once the key is known, and its length and `max_tokens` are the
    estimate; what the response says corrects it.
    """

    def __init__(self, app: ASGIApp, gate: Gate, model_name: str, limits: RouterConfig | ModelConfig = DEFAULT_LIMITS):
        self._limits = limits
        self._app = app
        self._gate = gate
        self._model_name = model_name
        for name in ("routes", "router"):  # Serve names the routes in its metrics by these, where there are any.
            if hasattr(app, name):
                setattr(self, name, getattr(app, name))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Where nobody needs a key it costs one look at an attribute."""
        if self._gate.source.is_open or scope["type"] == "lifespan" or _is_health(scope) or self._is_admitted(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await receive()  # "websocket.connect"; a close before it is accepted becomes 403.
            await send({"type": "websocket.close", "code": 1008, "reason": "Use HTTP: websockets take no API key."})

    def _is_admitted(self, scope: Scope) -> bool:
        """Whether the router has admitted the request already."""
        if scope["type"] != "http":
            return False
        shown = next((value for name, value in scope["headers"] if name == ROUTER_HEADER), b"")
        return bool(shown) and hmac.compare_digest(shown, router_token())

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            key = self._gate.identify(scope["headers"], self._model_name)
            if scope["method"] in FREE_METHODS:
                admission = Admission(None if key is None else key.name)
            else:
                body = await read_body(scope["headers"], receive, self._limits)
                admission = await self._gate.admit(scope["headers"], self._model_name, _estimate(body))
                receive = replayed(body, receive)
        except ClientGone:
            return
        except RequestError as error:
            await refusal(error)(scope, receive, send)
            return
        tail = UsageTail()
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *admission.headers]}
            elif message["type"] == "http.response.body":
                tail.feed(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            await admission.release(0 if status >= 400 else tail.total_tokens())  # A refused request used none.


def _estimate(body: bytes) -> int:
    try:
        return estimate_tokens(len(body), peek(body).token_limit)
    except InvalidRequest:  # The engine says what is wrong with it.
        return estimate_tokens(len(body))


def _is_health(scope: Scope) -> bool:
    """GET /health, below the route's prefix. The path is whole under Serve's proxy, the prefix is `root_path`."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    return path == prefix + "/health"
