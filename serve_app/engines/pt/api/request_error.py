"""What a client is told of an error in the engine."""

from serve_app.errors import EngineError, ModelUnavailable, RequestError


def request_error(error: Exception) -> RequestError:
    """The error that a client sees: its own as it is, and 503 for an engine that has ended."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineError):
        return ModelUnavailable(str(error), retry_after_s=5.0)
    return RequestError(f"The engine failed on this request: {type(error).__name__}: {error}")
