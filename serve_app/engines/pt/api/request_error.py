"""Decides what a client sees of an error in the engine, and under which names."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from serve_app.errors import AdapterError, EngineError, InvalidRequest, ModelUnavailable, RequestError

# A message names a field or a value in quotes, or begins with a field.
NAMED = re.compile(r"(?:(?<=')|^)[a-z_]+(?=['\[.:]|$)")


def request_error(error: Exception) -> RequestError:
    """Returns the error that a client sees. A RequestError stays as it is. An engine that has ended, and an
    adapter whose files are gone, give 503."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineError | AdapterError):
        return ModelUnavailable(str(error), retry_after_s=5.0)
    return RequestError(f"The engine failed on this request: {type(error).__name__}: {error}")


@contextmanager
def named_as(names: Mapping[str, str]) -> Iterator[None]:
    """Gives the fields of an InvalidRequest of the block the names that they have in another API."""
    try:
        yield
    except InvalidRequest as error:
        raise renamed(error, names) from error


def renamed(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """Returns an InvalidRequest with the names that its fields have in another API. Other errors stay as they are."""
    if not isinstance(error, InvalidRequest):
        return error
    message = NAMED.sub(lambda found: names.get(found[0], found[0]), error.message)
    param = None if error.param is None else names.get(error.param, error.param)
    return type(error)(message, param=param, retry_after_s=error.retry_after_s)
