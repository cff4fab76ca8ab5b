"""Gives an answer for every error of an endpoint of pt, and says whose request it is."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serve_app.engines.pt.api.request_error import request_error
from serve_app.errors import RequestError
from serve_app.wire.asgi import KEY_NAME_HEADER
from serve_app.wire.headers import header
from serve_app.wire.openai_errors import error_response, route_error_response

logger = logging.getLogger("ray.serve")

Endpoint = Callable[[Request], Awaitable[Response]]


def key_name(request: Request) -> str | None:
    """Returns the name of the key that the request came with."""
    name = header(request.scope["headers"], KEY_NAME_HEADER)
    return None if name is None else name.decode("latin-1")


def guarded(endpoint: Endpoint) -> Endpoint:
    """Gives the endpoint an answer for every error.

    Starlette raises an unexpected error again once its handler has answered, and the server then cuts the connection
    under the client's next request.
    """

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:
            if not isinstance(error, RequestError):
                logger.exception("A request failed.")
            return error_response(request_error(error))

    return answer


async def _refused(_: Request, error: Exception) -> Response:
    return error_response(request_error(error))


async def _unexpected(_: Request, error: Exception) -> Response:
    """Answers in JSON. Serve answers in plain text in a replica's place, and the router would then ask another
    replica."""
    return error_response(RequestError(f"The pt engine failed: {type(error).__name__}: {error}"))


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return route_error_response(error, f"{request.method} {request.url.path}: {error.detail}.")


# These are for an application of Starlette.
EXCEPTION_HANDLERS: Mapping[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    RequestError: _refused,
    HTTPException: _no_such_route,
    Exception: _unexpected,
}
