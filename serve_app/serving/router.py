"""The router: one address for all models.

A reverse proxy that understands one field of a request, `model`. Everything else passes as bytes, both ways.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from serve_app.config import RouterConfig
from serve_app.engines.openai_errors import error_object, error_response, read_json
from serve_app.errors import InvalidRequest, ModelUnavailable, Overloaded, RequestError, RequestTooLarge
from serve_app.serving.announcer import announce
from serve_app.serving.asgi import Headers, HttpRequest, decode_head
from serve_app.serving.directory import ModelDirectory, ModelStatus

# Headers that belong to one connection, not to the message (RFC 9110, 7.6.1), and the length, which is set anew.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade host "
    b"content-length".split()
)

# The body was read as JSON, whatever curl calls it by default; vLLM insists on the name.
JSON = (b"content-type", b"application/json")
REPLACED = HOP_BY_HOP | {JSON[0]}


class Router:
    """The deployment class of the router application."""

    def __init__(self, config: RouterConfig):
        self._config = config
        self._directory = ModelDirectory(serve.get_replica_context().app_name, config.discovery_interval_s)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return build_app(self._config, self._directory)


def build_app(config: RouterConfig, directory: ModelDirectory) -> Starlette:
    """The router's application. Its lifespan tells the terminal how the models come up."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(directory.keep_fresh()), asyncio.create_task(announce(directory))]
        yield
        for task in tasks:
            task.cancel()

    endpoints = _Endpoints(config, directory)
    return Starlette(
        routes=[
            Route("/health", endpoints.health),
            Route("/ready", endpoints.ready),
            Route("/v1/models", endpoints.list_models),
            Route("/v1/models/{name:path}", endpoints.show_model),
            Route("/{path:path}", endpoints.dispatch, methods=["POST"]),
        ],
        exception_handlers={RequestError: _refuse, HTTPException: _no_such_route, Exception: _unexpected},
        lifespan=lifespan,
    )


class _Endpoints:
    def __init__(self, config: RouterConfig, directory: ModelDirectory):
        self._config = config
        self._directory = directory
        self._created = int(time.time())

    async def health(self, _: Request) -> Response:
        """The process is up."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Which models serve. 200 as soon as one does, so that one broken model does not take the others away."""
        models = await self._directory.models()
        ready = [model for model in models.values() if model.state == "ready"]
        body = {
            "status": "ready" if len(ready) == len(models) > 0 else "degraded" if ready else "unavailable",
            "models": {
                model.name: {"status": model.state, "replicas": model.replicas, "message": model.message}
                for model in models.values()
            },
        }
        return JSONResponse(body, status_code=200 if ready else 503)

    async def list_models(self, _: Request) -> Response:
        """OpenAI's list; `status` is ours."""
        models = await self._directory.models()
        return JSONResponse({"object": "list", "data": [self._model_object(model) for model in models.values()]})

    async def show_model(self, request: Request) -> Response:
        """One entry of OpenAI's list."""
        return JSONResponse(self._model_object(await self._directory.find(request.path_params["name"])))

    async def dispatch(self, request: Request) -> Response:
        """Passes a request on to the model that its body names."""
        body = await _read_body(request, self._config.max_body_bytes)
        name = model_of(body)
        handle = await self._directory.handle(name)
        passed_on = HttpRequest(
            method=request.method,
            path="/" + request.path_params["path"],
            query=request.scope["query_string"],
            headers=[pair for pair in request.headers.raw if pair[0] not in REPLACED] + [JSON],
            body=body,
        )
        items = handle.remote(passed_on)
        try:
            status, headers = decode_head(await self._first(items, name))
        except (RayError, RayServeException, StopAsyncIteration) as error:
            raise _engine_failure(error) from error
        except (asyncio.CancelledError, RequestError):  # The client or the model has left before the first byte.
            items.cancel()
            raise
        return _proxied(status, headers, items)

    async def _first(self, items: Any, name: str) -> bytes:
        """The first item. A handle waits for a replica for ever, so the model is looked at meanwhile.

        Raises ModelNotFound or ModelUnavailable when the model was removed or has failed for good.
        """
        first = asyncio.ensure_future(anext(items))
        try:
            while not (await asyncio.wait({first}, timeout=self._config.discovery_interval_s))[0]:
                self._directory.require_hope(await self._directory.find(name))
            item: bytes = await first
            return item
        finally:
            first.cancel()

    def _model_object(self, model: ModelStatus) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "serve-app",
            "status": model.state,
        }


def model_of(body: bytes) -> str:
    """The value of `model` in a JSON body. Raises InvalidRequest that says what is wrong with it."""
    try:
        document = read_json(body)
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    if not isinstance(document, dict):
        raise InvalidRequest("The body must be a JSON object.")
    model = document.get("model")
    if model is None:
        raise InvalidRequest("The field 'model' is missing. GET /v1/models lists the models.", param="model")
    if not isinstance(model, str):
        raise InvalidRequest(f"The field 'model' must be a string, not {type(model).__name__}.", param="model")
    return model


async def _read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises RequestTooLarge as soon as it is known to be over `limit` bytes."""
    if int(request.headers.get("content-length") or 0) > limit:
        raise _too_large(limit)
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        pieces.append(piece)
    return b"".join(pieces)


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body is over the limit of {limit} bytes. The router's max_body_bytes sets it.")


def _proxied(status: int, headers: Headers, items: Any) -> Response:
    """The model's response, passed through as it comes."""
    content_type = dict(headers).get(b"content-type", b"")
    response = StreamingResponse(_body(items, content_type.startswith(b"text/event-stream")), status_code=status)
    response.raw_headers = [pair for pair in headers if pair[0].lower() not in HOP_BY_HOP]
    length = dict(headers).get(b"content-length")
    if length is not None:
        response.raw_headers.append((b"content-length", length))
    return response


async def _body(items: Any, is_event_stream: bool) -> AsyncIterator[bytes]:
    """The pieces of the body. A stream of events that breaks ends with an error event, never in silence."""
    try:
        async for piece in items:
            yield piece
    except (RayError, RayServeException) as error:
        if not is_event_stream:
            raise
        yield b"data: " + json.dumps(error_object(_engine_failure(error))).encode() + b"\n\n"
    finally:
        items.cancel()


def _engine_failure(error: Exception) -> RequestError:
    if isinstance(error, BackPressureError):
        return Overloaded("The model's queue is full. Try again later.", retry_after_s=1.0)
    reason = str(error).strip().splitlines()
    return ModelUnavailable(
        f"The model's replica failed while answering: {reason[-1] if reason else type(error).__name__}",
        retry_after_s=1.0,
    )


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _unexpected(_: Request, error: Exception) -> Response:
    return error_response(RequestError(f"The router failed: {type(error).__name__}: {error}"))


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = InvalidRequest(
        f"{request.method} {request.url.path}: {error.detail}. Endpoints without 'model' in a JSON body are reached "
        "by the model's own route, /models/NAME/…"
    )
    response = error_response(refusal)
    # Only POST goes to models, so for a browser an unknown address is unknown, not a wrong method.
    response.status_code = 404 if request.method in ("GET", "HEAD") else error.status_code
    return response
