"""The router serves all models at one address.

It is a reverse proxy that understands one field of a request, `model`. Everything else passes as bytes, both ways.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any

from ray import serve
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from serve_app.access.cluster_record import joined
from serve_app.access.door import Inside, require_door, stand_behind
from serve_app.access.gate import Gate, KeyedRouter
from serve_app.access.keys import configured_keys
from serve_app.access.limiter import ActorLimiter
from serve_app.config import RouterConfig
from serve_app.errors import ConfigError, ModelNotFound, RequestError
from serve_app.ray_serve import replicas_listen_for_http
from serve_app.router.announcer import announce
from serve_app.router.console import Console, OpenConsole, RouterParts
from serve_app.router.directory import ModelDirectory
from serve_app.router.forwarder import Forwarder
from serve_app.router.metrics import RouterMetrics
from serve_app.router.model_status import ModelStatus
from serve_app.router.openapi import POST_PATHS, openapi_document
from serve_app.router.residency import Residency
from serve_app.router.upstream.addresses import ReplicaAddresses
from serve_app.router.upstream.http import HttpUpstream
from serve_app.router.upstream.protocol import HandleUpstream
from serve_app.terminal import notify
from serve_app.wire.openai_errors import error_response, route_error_response

logger = logging.getLogger("ray.serve")


class Router:
    """This is the deployment class of the router application. Its `user_config` replaces fields of the RouterConfig
    while it runs."""

    def __init__(self, config: RouterConfig, open_console: OpenConsole | None = None, is_loopback: bool = False):
        require_door()
        source = configured_keys()
        self._access = joined(source)
        metrics = RouterMetrics()
        context = serve.get_replica_context()
        own_name = context.app_name
        directory = ModelDirectory(own_name, config.discovery_interval_s, metrics.loaded)
        handles = HandleUpstream(directory, config.discovery_interval_s)
        self._config = config
        self._is_configured = False
        self._directory = directory
        self._gate = Gate(source, ActorLimiter())
        over_http = HttpUpstream(directory, handles, self._gate, ReplicaAddresses())
        upstream = over_http if replicas_listen_for_http() else handles
        self._residency = Residency()
        self._forwarder = Forwarder(config, directory, upstream, metrics, self._gate, self._residency)
        parts = RouterParts(
            own_name, context.replica_id.unique_id, directory, self._forwarder, self._gate, self._residency,
            lambda: self._forwarder.config, is_loopback,
        )  # fmt: skip
        self._console = None if open_console is None else open_console(parts)
        if self._console is not None:
            self._forwarder.observer = self._console

        def refused(status: int) -> None:
            metrics.refused(status)
            self._forwarder.observer.refused(status)

        stand_behind(Inside(self._gate, lambda: self._forwarder.config, refused=refused))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = build_app(self._forwarder, self._directory, self._gate, self._residency, self._console)
        return KeyedRouter(app, self._gate)

    async def check_health(self) -> None:
        """Checks the access to this router. Serve calls this, and replaces the replica if it raises an exception."""
        await self._access.check()

    def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Lets the fields of `user_config` replace those of `args`. Serve calls this at the start and after a change.

        A mistake at the start fails the start. A later one is only logged, because Serve would stop the router.
        """
        try:
            self._forwarder.config = RouterConfig.from_args(self._config.model_dump() | dict(user_config or {}))
        except ConfigError as error:
            if not self._is_configured:
                notify(f"the router cannot start, because its user_config is wrong: {error}")
                raise
            logger.error("The router's new user_config is wrong and was not applied: %s", error)
            notify(f"the router's new user_config is wrong and was not applied: {error}")
        for line in self._directory.hidden_by(self._forwarder.config.aliases):
            notify(line)
        self._is_configured = True


def build_app(
    forwarder: Forwarder,
    directory: ModelDirectory,
    gate: Gate,
    residency: Residency,
    console: Console | None = None,
) -> Starlette:
    """Returns the router's application. Its lifespan shows on the terminal how the models come up."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await gate.start()
        await forwarder.start()
        tasks = [
            asyncio.create_task(directory.keep_fresh()),
            asyncio.create_task(residency.keep_fresh()),
            asyncio.create_task(announce(directory, gate.source.is_open)),
        ]
        if console is not None:
            await console.start()
        yield
        if console is not None:
            await console.close()
        for task in tasks:
            task.cancel()
        await forwarder.close()

    endpoints = _Endpoints(forwarder, directory, residency, console)
    return Starlette(
        routes=[
            Route("/health", endpoints.health),
            Route("/ready", endpoints.ready),
            Route("/openapi.json", endpoints.openapi),
            Route("/v1/models", endpoints.list_models),
            Route("/v1/models/{name:path}", endpoints.show_model),
            *(() if console is None else console.routes()),
            Route("/{path:path}", forwarder, methods=["POST"]),
        ],
        exception_handlers={RequestError: _refused, HTTPException: _no_such_route, Exception: _unexpected},
        lifespan=lifespan,
    )


class _Endpoints:
    def __init__(self, forwarder: Forwarder, directory: ModelDirectory, residency: Residency, console: Console | None):
        self._console = console
        self._forwarder = forwarder
        self._directory = directory
        self._created = int(time.time())
        self._residency = residency

    async def health(self, _: Request) -> Response:
        """GET /health answers 200 while the process is up."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """GET /ready says which models serve, and how many requests wait for each of them in this router.

        It answers 200 as soon as one serves, so that one broken model does not make the others unreachable.
        """
        models = await self._directory.models()
        residency = self._residency.states()
        ready = [model for model in models.values() if model.is_open]
        body = {
            "status": "ready" if len(ready) == len(models) > 0 else "degraded" if ready else "unavailable",
            "models": {
                model.name: {
                    "status": model.state,
                    "replicas": model.replicas,
                    "message": model.message,
                    **({"parent": model.parent} if model.parent else {}),
                    **({"residency": residency[model.name]} if model.name in residency else {}),
                    **self._forwarder.queued(model.name),
                }
                for model in map(self._directory.seen_from_outside, models.values())
            },
        }
        return JSONResponse(body, status_code=200 if ready else 503)

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json answers with the OpenAPI document, which names the models of this moment."""
        config = self._forwarder.config
        names = {*await self._directory.models(), *config.aliases}
        added = None if self._console is None else self._console.openapi()
        return JSONResponse(openapi_document(names, config.default_model is None, added))

    async def list_models(self, _: Request) -> Response:
        """GET /v1/models answers with OpenAI's list. The field `status` is our own."""
        models = await self._directory.models()
        data = [self._model_object(model) for model in models.values()]
        aliases = self._forwarder.config.aliases
        for alias, name in aliases.items():
            with suppress(ModelNotFound):
                data.append(self._model_object(await self._directory.find(name), alias))
        return JSONResponse({"object": "list", "data": data})

    async def show_model(self, request: Request) -> Response:
        """GET /v1/models/NAME answers with one entry of OpenAI's list."""
        name = request.path_params["name"]
        model = await self._directory.find(self._forwarder.config.aliases.get(name, name))
        return JSONResponse(self._model_object(model, name))

    def _model_object(self, model: ModelStatus, name: str | None = None) -> dict[str, Any]:
        """Returns a model's entry. `root` is its own name, which differs from `id` if an alias or MODEL:ADAPTER was
        asked for. An adapter has its model as `parent`."""
        return {
            "id": name or model.name,
            "root": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "serve-app",
            **({"parent": model.parent} if model.parent else {}),
            "status": self._directory.seen_from_outside(model).state,
        }


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _unexpected(_: Request, error: Exception) -> Response:
    return error_response(RequestError(f"The router failed: {type(error).__name__}: {error}"))


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED and (
        _is_endpoint(request) or request.method not in ("GET", "HEAD")
    ):
        allowed = (error.headers or {}).get("Allow", "POST")
        return route_error_response(error, f"{where}: {error.detail}. This path takes {allowed}.")
    # Every path takes POST, with a model's name. A browser gets 404 for an unknown address all the same.
    text = (
        f"{where}: Not Found. Reach endpoints without 'model' in a JSON body by the model's own route, /models/NAME/…"
    )
    return route_error_response(HTTPException(HTTPStatus.NOT_FOUND), text)


def _is_endpoint(request: Request) -> bool:
    """Returns whether the OpenAPI document has the path, if it is one of those that go to models."""
    path = request.path_params.get("path")
    return path is None or f"/{path}" in POST_PATHS
