"""The door: who may enter, how much, and what came of it.

`Gate` decides for one request; the router asks it by name. `KeyedApp` puts it around a model's own route.
"""

import hmac
from collections.abc import Iterable
from functools import partial
from typing import NoReturn

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.access.keys import ApiKey, KeySource
from serve_app.access.limiter import router_token
from serve_app.access.limits import KeyLimits, Limiter, Verdict, duration
from serve_app.access.origin import require_own_page
from serve_app.config import ModelConfig, RouterConfig
from serve_app.errors import InvalidRequest, RateLimited, RequestError, TokensLimited, Unauthorized
from serve_app.wire.asgi import KEY_NAME_HEADER, endpoint, show_routes
from serve_app.wire.body import Peek, peek, read_or_refused, replayed
from serve_app.wire.body_threads import beside_loop
from serve_app.wire.openai_errors import error_response
from serve_app.wire.usage import UsageMeter, estimate_tokens, metered

Headers = Iterable[tuple[bytes, bytes]]

# What the router shows to models' own routes.
ROUTER_HEADER = b"x-serve-app-router"

# Those of a body, where no model says others.
DEFAULT_LIMITS = RouterConfig()

# Methods that make no model work. They need a key, and cost nothing of its limits.
FREE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Admission:
    """One request that may go on. `headers` belong onto its response; `key_name` is None where nobody needs a key.

    `counts_tokens`: the key has a limit of them. `release` has to be called when the response has ended, in any way.
    """

    def __init__(
        self,
        key_name: str | None = None,
        verdict: Verdict | None = None,
        limiter: Limiter | None = None,
        counts_tokens: bool = False,
    ):
        self.key_name = key_name
        self.counts_tokens = counts_tokens
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

        Header names are lower-case. Raises Unauthorized, and Forbidden for a `model` that the key does not open; where
        nobody needs a key, ForeignPage.
        """
        if self.source.is_open:
            require_own_page(headers)
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
        return Admission(key.name, verdict, self._limiter, limits.tokens_per_minute is not None)


def _refuse(key: str, limits: KeyLimits, verdict: Verdict) -> NoReturn:
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


async def metered_for(admission: Admission, path: str, seen: Peek, body: bytes) -> tuple[bytes, UsageMeter]:
    """As `metered`, beside the event loop. What ends here has used nothing of its key. Raises InvalidRequest."""
    try:
        return await beside_loop(len(body), partial(metered, path, seen, body))
    except BaseException:  # A field's name that is no UTF-8, say, or the client has left.
        await admission.release(0)
        raise


class KeyedRouter:
    """The router's application behind a gate: everything but GET /health needs a key. What a request may use, and how
    much, is decided where its model is known."""

    def __init__(self, app: ASGIApp, gate: Gate):
        self._app = app
        self._gate = gate
        show_routes(self, app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and not _is_health(scope):
            try:
                self._gate.identify(scope["headers"])
            except RequestError as error:
                await refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class KeyedApp:
    """An application behind a gate: every HTTP request but GET /health needs a key that opens `model_name`.

    That holds for paths that do not exist too, for documentation and for metrics. Websockets are refused, as nothing
    would count them. The body is read within `limits` once the key is known, and its length and what its answers may
    have are the estimate; what the response says corrects it.
    """

    def __init__(self, app: ASGIApp, gate: Gate, model_name: str, limits: RouterConfig | ModelConfig = DEFAULT_LIMITS):
        self._limits = limits
        self._app = app
        self._gate = gate
        self._model_name = model_name
        show_routes(self, app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan" or _is_health(scope) or is_admitted(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await websocket(self._gate, self._app, scope, receive, send)
        elif self._gate.source.is_open:
            await self._without_key(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _without_key(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            require_own_page(scope["headers"])
        except RequestError as error:
            await refusal(error)(scope, receive, send)
            return
        await self._app({**scope, "headers": with_key_name(scope["headers"], None)}, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        meter, estimate = UsageMeter(), 0
        try:
            key = self._gate.identify(scope["headers"], self._model_name)
            admission = Admission(None if key is None else key.name)
            if scope["method"] not in FREE_METHODS:
                body = await read_or_refused(scope, receive, send, self._limits)
                if body is None:
                    return
                seen = await beside_loop(len(body), partial(_seen, body))
                estimate = estimate_tokens(len(body), seen.token_limit, seen.answers)
                admission = await self._gate.admit(scope["headers"], self._model_name, estimate)
                if admission.counts_tokens:
                    body, meter = await metered_for(admission, endpoint(scope), seen, body)
                    scope = {**scope, "headers": _of_length(scope["headers"], len(body))}
                receive = replayed(body, receive)
            scope = {**scope, "headers": with_key_name(scope["headers"], admission.key_name)}
        except RequestError as error:
            await refusal(error)(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *admission.headers]}
            elif message["type"] == "http.response.body":
                piece = meter.feed(message.get("body", b""))
                message = {**message, "body": piece if message.get("more_body", False) else piece + meter.rest()}
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:  # A refused request used none.
            await admission.release(0 if status >= 400 else meter.total_tokens(estimate))


def with_key_name(headers: Headers, name: str | None) -> list[tuple[bytes, bytes]]:
    """The headers that tell an engine whose request it is; a client's own word of that is left out."""
    kept = [pair for pair in headers if pair[0] != KEY_NAME_HEADER]
    return kept if name is None else [*kept, (KEY_NAME_HEADER, name.encode())]


def _seen(body: bytes) -> Peek:
    try:
        return peek(body)
    except InvalidRequest:  # The engine says what is wrong with it.
        return Peek()


def _of_length(headers: Headers, length: int) -> list[tuple[bytes, bytes]]:
    kept = [pair for pair in headers if pair[0] != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]


async def websocket(gate: Gate, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> bool:
    """Lets a websocket in where nobody needs a key and no page of another site asks. Returns whether it was let in.

    A close before it is accepted becomes 403.
    """
    reason = "Use HTTP: websockets take no API key."
    if gate.source.is_open:
        try:
            require_own_page(scope["headers"])
        except RequestError:
            reason = "Web pages of other sites may not use this server."
        else:
            await app(scope, receive, send)
            return True
    await receive()  # "websocket.connect"
    await send({"type": "websocket.close", "code": 1008, "reason": reason})
    return False


def is_admitted(scope: Scope) -> bool:
    """Whether the router has admitted the request already."""
    if scope["type"] != "http":
        return False
    shown = next((value for name, value in scope["headers"] if name == ROUTER_HEADER), b"")
    return bool(shown) and hmac.compare_digest(shown, router_token())


def _is_health(scope: Scope) -> bool:
    """GET /health, below the route's prefix. The path is whole under Serve's proxy, the prefix is `root_path`."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    return str(scope["path"]) == str(scope.get("root_path", "")) + "/health"
