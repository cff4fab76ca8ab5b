"""Decides which requests may enter, how much they may use, and settles what they used.

`Gate` decides for one request; the router asks it by name. `KeyedApp` puts it around a model's own route.
"""

import hmac
from collections.abc import Callable, Collection
from functools import partial

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.access.identity import known_identity
from serve_app.access.keys import ApiKey, KeySource
from serve_app.access.limiter import router_token
from serve_app.access.limits import KeyLimits, Limiter, Verdict, duration
from serve_app.access.origin import require_own_page
from serve_app.config import ModelConfig, RouterConfig
from serve_app.errors import InvalidRequest, ModelNotFound, RateLimited, RequestError, TokensLimited, Unauthorized
from serve_app.wire.arrival import read_or_refused, with_body
from serve_app.wire.asgi import KEY_NAME_HEADER, endpoint, show_routes
from serve_app.wire.asked_model import Asked, asked_of
from serve_app.wire.body import Peek, RequestBody
from serve_app.wire.body_threads import beside_loop
from serve_app.wire.headers import Headers, header
from serve_app.wire.openai_errors import error_response
from serve_app.wire.usage import UsageMeter, estimate_tokens, metered

# The router shows this header to models' own routes.
ROUTER_HEADER = b"x-serve-app-router"

# These limits of a body apply unless a model sets others.
DEFAULT_LIMITS = RouterConfig()

# These methods make no model work. They need a key, but cost nothing of its limits.
FREE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# Clients look their model up in this list, so a key for an adapter alone may read it by the route of the model.
LIST = "/v1/models"


class Admission:
    """This is one request that may go on. `headers` belong onto its response, and `key_name` is None if no key is
    needed.

    `counts_tokens` means that the key has a limit of tokens. `release` has to be called when the response has ended, in
    whatever way.
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
        """Ends the request with the tokens of prompt and answer together. None keeps the estimate.

        A second call does nothing. It awaits nothing, so it works within a `finally` of a cancelled task.
        """
        lease, self._lease = self._lease, None
        if lease is not None and self._limiter is not None and self.key_name is not None:
            self._limiter.settle(self.key_name, lease, tokens_used)


class Gate:
    """Checks keys and their limits for one process."""

    def __init__(self, source: KeySource, limiter: Limiter):
        self.source = source
        self._limiter = limiter

    async def start(self) -> None:
        """Prepares the limiter if a key has limits. Without this call, the first request does so."""
        if any(key.limits for key in self.source.ring.keys):
            await self._limiter.warm_up()

    def identify(self, headers: Headers, asked: Asked | None = None) -> ApiKey | None:
        """Returns the key of a request without charging it, or None if no key is needed.

        Raises Unauthorized, and Forbidden if the key may not use what is asked for. If no key is needed, raises
        ForeignPage.
        """
        if self.source.is_open:
            require_own_page(headers)
            return None
        ring = self.source.refresh()
        return _opens(ring.find(header(headers, b"authorization"), header(headers, b"x-api-key")), asked)

    def identity_of(self, scope: Scope, asked: Asked | None = None) -> ApiKey | None:
        """Returns the key that the door of this process has found, or else that of `identify`, which says
        what it raises."""
        identity = known_identity(scope)
        if identity is None or (identity.key is None and not self.source.is_open):
            return self.identify(scope["headers"], asked)
        return _opens(identity.key, asked)

    async def admit(self, key: ApiKey | None, estimated_tokens: int) -> Admission:
        """Lets one request in and charges it to its key. Raises RateLimited if that key has used up a limit."""
        if key is None:
            return Admission()
        limits = key.limits
        if not limits:
            return Admission(key.name)
        verdict = await self._limiter.take(key.name, limits, estimated_tokens)
        if not verdict.allowed:
            raise _rate_limited(key.name, limits, verdict)
        return Admission(key.name, verdict, self._limiter, limits.tokens_per_minute is not None)


def _opens(key: ApiKey | None, asked: Asked | None) -> ApiKey | None:
    if key is not None and asked is not None:
        key.require(asked)
    return key


def _rate_limited(key: str, limits: KeyLimits, verdict: Verdict) -> RateLimited:
    wait_s = verdict.retry_after_s or 0.0
    what = {
        "requests": f"{limits.requests_per_minute} requests a minute",
        "tokens": f"{limits.tokens_per_minute} tokens a minute",
        "concurrent": f"{limits.max_concurrent_requests} requests at once",
    }[verdict.reason or "requests"]
    kind = TokensLimited if verdict.reason == "tokens" else RateLimited
    return kind(
        f"The rate limit is reached: the API key '{key}' has {what}. Try again in {duration(wait_s)}.",
        retry_after_s=wait_s,
        headers=[(name.decode(), value.decode()) for name, value in verdict.headers],
    )


def refusal(error: RequestError) -> Response:
    """Returns OpenAI's error object with the headers that the error brings: www-authenticate, x-ratelimit-…,
    retry-after."""
    response = error_response(error)
    if isinstance(error, Unauthorized | RateLimited):
        for name, value in error.headers:
            response.headers[name] = value
    return response


async def metered_for(admission: Admission, path: str, seen: Peek, body: RequestBody) -> tuple[RequestBody, UsageMeter]:
    """Does what `metered` does beside the event loop. A request that ends here has used nothing of its key. Raises
    InvalidRequest."""
    try:
        return await beside_loop(len(body.content), partial(metered, path, seen, body))
    except BaseException:  # A field may be nested too deep to be written, or the client may have left.
        await admission.release(0)
        raise


class KeyedRouter:
    """This is the router's application behind a gate. Everything but GET /health and the files of the console's page
    needs a key. What a request may use, and how much, is decided later, when its model is known."""

    def __init__(self, app: ASGIApp, gate: Gate):
        self._app = app
        self._gate = gate
        show_routes(self, app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI call."""
        if scope["type"] == "http" and not _is_health(scope) and not is_console_page(scope):
            try:
                self._gate.identity_of(scope)
            except RequestError as error:
                await refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class KeyedApp:
    """This is an application behind a gate. Every HTTP request but GET /health needs a key that may use `model_name`.

    This includes paths that do not exist, documentation and metrics. Websockets are refused, because nothing would
    count them. The body is read within `limits` once the key is known. Its length and the limit of its answers give the
    estimate of tokens, which the response corrects.

    `adapters` returns the names of the model's adapters, and is None if it has none. A body then says what is asked
    for, and the key must be allowed that. A key that is allowed adapters only gets nothing without a body but the list
    of models.
    """

    def __init__(
        self,
        app: ASGIApp,
        gate: Gate,
        model_name: str,
        limits: RouterConfig | ModelConfig = DEFAULT_LIMITS,
        adapters: Callable[[], Collection[str]] | None = None,
    ):
        self._limits = limits
        self._adapters = adapters
        self._app = app
        self._gate = gate
        self._model_name = model_name
        show_routes(self, app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI call."""
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
            self._gate.identity_of(scope)
        except RequestError as error:
            await refusal(error)(scope, receive, send)
            return
        await self._app({**scope, "headers": with_key_name(scope["headers"], None)}, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        meter, estimate = UsageMeter(), 0
        try:
            key = self._gate.identity_of(scope)
            is_free = scope["method"] in FREE_METHODS
            self._require_entry(key, is_free and endpoint(scope) != LIST)
            admission = Admission(None if key is None else key.name)
            if not is_free:
                body = await read_or_refused(scope, receive, send, self._limits)
                if body is None:
                    return
                size = len(body.content)
                seen = await beside_loop(size, partial(self._seen, body, key))
                estimate = estimate_tokens(size, seen.token_limit, seen.answers)
                admission = await self._gate.admit(key, estimate)
                if admission.counts_tokens:
                    body, meter = await metered_for(admission, endpoint(scope), seen, body)
                    scope = {**scope, "headers": of_length(scope["headers"], len(body.content))}
                scope, receive = with_body(scope, receive, body)
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
                given = message.get("body", b"")  # It may repeat a whole request.
                piece = await beside_loop(len(given), partial(meter.feed, given))
                message = {**message, "body": piece if message.get("more_body", False) else piece + meter.rest()}
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:  # A refused request used no tokens.
            await admission.release(0 if status >= 400 else meter.total_tokens(estimate))

    def _require_entry(self, key: ApiKey | None, is_of_model: bool) -> None:
        """Raises Forbidden for a key with which nothing here may be asked, or not the model itself if it is asked."""
        if key is None:
            return
        if self._adapters is None or is_of_model:
            key.require(Asked(self._model_name))
        key.require_any_of(self._model_name, () if self._adapters is None else self._adapters())

    def _seen(self, body: RequestBody, key: ApiKey | None) -> Peek:
        """Returns what matters of a body, which takes time with a large one. Raises Forbidden and ModelNotFound, and
        InvalidRequest for a body that does not say what is asked for, if that matters for the key."""
        adapters = self._adapters
        try:
            seen = body.peek()
        except InvalidRequest:
            if key is not None and adapters is not None and not key.may_use_all_of(self._model_name):
                raise
            return Peek()  # The engine reports what is wrong with it.
        if key is not None and adapters is not None:
            key.require(require_asked(self._model_name, adapters(), seen.model))
        return seen


def require_asked(model: str, adapters: Collection[str], name: str | None) -> Asked:
    """Returns what a name means by a model's own route. Raises ModelNotFound."""
    asked = asked_of(model, adapters, name)
    if asked is None:
        text = f"The model '{name}' does not exist at this route, which serves '{model}' and its adapters."
        raise ModelNotFound(text, param="model")
    return asked


def with_key_name(headers: Headers, name: str | None) -> list[tuple[bytes, bytes]]:
    """Returns the headers with the name of the request's key, for engines, and without what the client put there."""
    kept = [pair for pair in headers if pair[0] != KEY_NAME_HEADER]
    return kept if name is None else [*kept, (KEY_NAME_HEADER, name.encode())]


def of_length(headers: Headers, length: int) -> list[tuple[bytes, bytes]]:
    """Returns the headers with this length of the body."""
    kept = [pair for pair in headers if pair[0] != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]


async def websocket(gate: Gate, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> bool:
    """Lets a websocket in if no key is needed and no page of another site asks. Returns whether it was let in.

    A close before the websocket is accepted becomes 403.
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
    """Returns whether the router has admitted the request already."""
    if scope["type"] != "http":
        return False
    shown = header(scope["headers"], ROUTER_HEADER) or b""
    return bool(shown) and hmac.compare_digest(shown, router_token())


def is_console_page(scope: Scope) -> bool:
    """Returns whether this asks the router for a file of the console's page, which has no data in it. A browser cannot
    send a key with it."""
    if scope["method"] not in ("GET", "HEAD"):
        return False
    path = endpoint(scope)
    return path in ("/ui", "/ui/") or path.startswith("/ui/assets/")


def asks_for_console(scope: Scope) -> bool:
    """Returns whether this asks for the console's data and shows no key at all, as the page does to learn whether its
    reader has to sign in."""
    shown = any(header(scope["headers"], name) is not None for name in (b"authorization", b"x-api-key"))
    return endpoint(scope).startswith("/ui/api/") and not shown


def _is_health(scope: Scope) -> bool:
    """Returns whether this is GET /health below the route's prefix, which is `root_path` and is part of the path."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    return str(scope["path"]) == str(scope.get("root_path", "")) + "/health"
