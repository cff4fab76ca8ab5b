"""Applications that answer with how often their process has looked a key up, behind our own doors and gates.

They are built as the router and a model are, and `serve run` deploys them beside the real ones.
"""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.access.door import Inside, stand_behind
from serve_app.access.gate import Gate, KeyedApp, KeyedRouter
from serve_app.access.identity import known_identity
from serve_app.access.keys import KeyRing, configured_keys
from serve_app.access.limiter import ActorLimiter
from serve_app.config import ModelConfig, RouterConfig
from serve_app.deploy.options import OUTER_DOOR
from serve_app.replica.whole_body import WholeBody
from serve_app.wire.arrival import known_body

CONFIG = ModelConfig.from_args({"model": "serve-app/demo", "infer_backend": "pt", "device": "cpu"})
MODEL = "counted"
ROUTER_PREFIX, MODEL_PREFIX = "/counted", f"/models/{MODEL}"


class Counting:
    """The deployment. `name` is the model's, or None for the router."""

    async def __init__(self, name: str | None):  # type: ignore[misc]  # Serve awaits it
        self._name = name
        self._gate = Gate(await asyncio.to_thread(configured_keys), ActorLimiter())
        self._lookups = 0
        find = KeyRing.find

        def counted(*args: Any) -> Any:
            self._lookups += 1
            return find(*args)

        KeyRing.find = counted  # type: ignore[method-assign]
        stand_behind(Inside(self._gate, RouterConfig, name))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        if self._name is None:
            return KeyedRouter(self._tell, self._gate)
        return KeyedApp(WholeBody(self._tell, CONFIG), self._gate, self._name, CONFIG)

    async def _tell(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # The lifespan.
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        known, seen = known_body(scope), known_identity(scope)
        body = await Request(scope, receive).body()
        told = {
            "lookups": self._lookups,
            "has_identity": seen is not None,
            "same_body": known is not None and known.content == body,
            "bytes": len(body),
        }
        self._lookups = 0
        await JSONResponse(told)(scope, receive, send)


def build(args: dict[str, Any]) -> serve.Application:
    """Called by Serve."""
    deployment = serve.deployment(serve.ingress()(Counting), name="Model" if args.get("name") else "Router")
    options = {"num_cpus": 0, "runtime_env": {"env_vars": OUTER_DOOR}}
    return deployment.options(ray_actor_options=options).bind(args.get("name"))


def applications() -> list[dict[str, Any]]:
    """One in the place of a router and one in the place of a model, for a config file."""
    build_path = f"{__name__}:build"
    return [
        {"name": "counted-router", "route_prefix": ROUTER_PREFIX, "import_path": build_path, "args": {}},
        {"name": MODEL, "route_prefix": MODEL_PREFIX, "import_path": build_path, "args": {"name": MODEL}},
    ]


def importable(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a Serve that is to find this module."""
    return {**environment, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{environment.get('PYTHONPATH', '')}"}
