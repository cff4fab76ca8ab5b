"""Defines every error that this project raises on purpose.

ServeAppError                 it says what went wrong, where, and what to do
├── ConfigError               the config file says something that cannot be meant
├── PlacementError            the cluster cannot hold a model
├── EngineError               an engine could not load, or it died
├── AdapterError              an adapter cannot be served, which concerns no other one
└── RequestError              it is an answer with an HTTP status and the type and code of OpenAI's error object
    ├── InvalidRequest        400
    │   └── ContextTooLong    400
    ├── Unauthorized          401, with www-authenticate
    ├── Forbidden             403
    │   └── AdminOnly         403
    ├── ConsoleOff            404
    ├── ForeignPage           403, for a web page of another site if no key is needed
    ├── Forwarded             403, for what a proxy sends to the console if no key is needed
    ├── ModelNotFound         404
    ├── RequestTimeout        408
    ├── Conflict              409, when what is asked for has no meaning now
    ├── RequestTooLarge       413
    ├── HeadersTooLarge       431
    ├── ClientGone            499, which only the metrics show
    ├── HarmfulRequest        422, when replicas die of the request
    ├── OutOfDeviceMemory     500, when the request alone is too big for the device
    ├── RateLimited           429, with retry-after
    │   └── TokensLimited     429
    ├── Overloaded            429, with retry-after
    ├── UnreadableAnswer      502
    ├── ModelUnavailable      503, with retry-after
    │   └── EngineAway        503, when the engine gave its memory to another model
    └── DeadlineExceeded      504
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class ServeAppError(Exception):
    """This is an error with one message of one or two lines that says what, where and what to do."""


class ConfigError(ServeAppError):
    """The config names something that does not exist or cannot be combined."""


class PlacementError(ServeAppError):
    """No node of the cluster can hold a replica of the model."""


class EngineError(ServeAppError):
    """An engine could not load its model, or is not running any more."""


class AdapterError(ServeAppError):
    """An adapter cannot be read, or its engine cannot serve it. The model and its other adapters are well."""


class StillTooLarge(EngineError):
    """The sequences that run hold more than may stand still while the engine is parked. The engine is as before."""


class RequestError(ServeAppError):
    """This is a refusal that the client sees as OpenAI's error object.

    `param` names the field of the request that is to blame, and `retry_after_s` becomes the header `retry-after`.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(RequestError):
    """The request cannot be honoured as it is."""

    status = 400
    type = "invalid_request_error"


class ContextTooLong(InvalidRequest):
    """Prompt and output together are over the model's context."""

    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    """No model of that name is configured."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RequestTooLarge(RequestError):
    """The body is over the router's limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class RequestTimeout(RequestError):
    """The client was too slow with its request."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class HeadersTooLarge(RequestError):
    """The headers are over the router's limit."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class ClientGone(RequestError):
    """The client has closed its connection, so no answer is read. The status is nginx's and is used for the metrics."""

    status = 499
    code = "client_closed_request"


class DeadlineExceeded(RequestError):
    """The model did not answer in the time that the router's limits give it."""

    status = 504
    code = "timeout"


class OutOfDeviceMemory(RequestError):
    """The device has no memory for the request, even with nothing else in the batch."""

    code = "out_of_memory"


class HarmfulRequest(RequestError):
    """Replicas died while they worked on the request. The status is below 500, so that clients do not send it again."""

    status = 422
    type = "invalid_request_error"
    code = "request_may_be_harmful"


class UnreadableAnswer(RequestError):
    """A replica's answer is not HTTP as it is understood here. Another replica would give the same answer."""

    status = 502
    code = "unreadable_answer"


class Overloaded(RequestError):
    """The model's queue is full."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"


class ModelUnavailable(RequestError):
    """The model is loading, has failed, or has lost its replicas."""

    status = 503
    type = "server_error"
    code = "model_unavailable"


class EngineAway(ModelUnavailable):
    """The engine of the model gave its memory to another model while the request ran. It will be back, so the router
    sends the request or the rest of it again, and does not count this as the loss of a replica."""

    code = "engine_away"


class Unauthorized(RequestError):
    """The request has no API key, or one that is not known here. `headers` go onto the answer (RFC 9110, 11.6.1)."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    headers: ClassVar[tuple[tuple[str, str], ...]] = (("www-authenticate", "Bearer"),)


class Forbidden(RequestError):
    """The API key is known, but it may not use the model."""

    status = 403
    type = "invalid_request_error"
    code = "model_not_allowed"


class AdminOnly(Forbidden):
    """The API key may look at the console, but not change anything."""

    code = "admin_only"


class Conflict(RequestError):
    """The request is right, but it cannot be done in the state that the model or the cluster is in."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class ConsoleOff(RequestError):
    """The console is switched off at this router."""

    status = 404
    type = "invalid_request_error"
    code = "console_off"


class ForeignPage(RequestError):
    """A web page of another site uses a server that needs no key."""

    status = 403
    type = "invalid_request_error"
    code = "origin_not_allowed"


class Forwarded(RequestError):
    """A proxy sends a request to the console of a server that needs no key, so its sender may be anybody."""

    status = 403
    type = "invalid_request_error"
    code = "proxy_not_allowed"


class RateLimited(RequestError):
    """The API key has used up its requests. `type` names the limit as OpenAI's does, and `headers` say what is left."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float, headers: Iterable[tuple[str, str]] = ()):
        super().__init__(message, retry_after_s=retry_after_s)
        self.headers = tuple(headers)


class TokensLimited(RateLimited):
    """The API key has used up its tokens."""

    type = "tokens"


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the known name that is nearest to `name`, or an empty text."""
    match = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""
