"""Every error that this project raises on purpose.

ServeAppError                 what went wrong, where, and what to do
├── ConfigError               the config file says something that cannot be meant
├── PlacementError            the cluster cannot hold a model
├── EngineError               an engine could not load, or died
└── RequestError              an answer to the client: HTTP status, type and code of OpenAI's error object
    ├── InvalidRequest        400
    │   └── ContextTooLong    400
    ├── ModelNotFound         404
    ├── RequestTooLarge       413
    ├── OutOfDeviceMemory     500, the request alone is too big for the device
    ├── Overloaded            429, with retry-after
    └── ModelUnavailable      503, with retry-after
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class ServeAppError(Exception):
    """An error with one message of one or two lines that says what, where and what to do."""


class ConfigError(ServeAppError):
    """The config names something that does not exist or cannot be combined."""


class PlacementError(ServeAppError):
    """No node of the cluster can hold a replica of the model."""


class EngineError(ServeAppError):
    """An engine could not load its model, or is not running any more."""


class RequestError(ServeAppError):
    """A refusal that the client sees as OpenAI's error object.

    `param` names the field of the request that is to blame; `retry_after_s` becomes the header `retry-after`.
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
    """The request cannot be honoured as it stands."""

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


class OutOfDeviceMemory(RequestError):
    """The device has no memory for the request, even with nothing else in the batch."""

    code = "out_of_memory"


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


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name nearest to `name`, or an empty string."""
    match = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""
