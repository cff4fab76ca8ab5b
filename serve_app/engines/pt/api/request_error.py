"""Decides what a client sees of an error in the engine."""

from serve_app.errors import AdapterError, EngineError, ModelUnavailable, RequestError


def request_error(error: Exception) -> RequestError:
    """Returns the error that a client sees. A RequestError stays as it is. An engine that has ended, and an
    adapter whose files are gone, give 503."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineError | AdapterError):
        return ModelUnavailable(str(error), retry_after_s=5.0)
    return RequestError(f"The engine failed on this request: {type(error).__name__}: {error}")
