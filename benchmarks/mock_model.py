"""A model that computes nothing: an answer at once, or a stream of chunks at a set pace, each with the time it left.

As an ASGI application it runs in a bare uvicorn (`python -m benchmarks.mock_model PORT`) and as a model's deployment.
Body fields: `chunks`, the events of a stream, and `every_ms`, the time between two of them.
"""

import asyncio
import json
import sys
import time

import uvicorn
from ray import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from serve_app.deploy.options import MAX_ONGOING_REQUESTS
from serve_app.ray_serve import MODEL_DEPLOYMENT
from serve_app.wire.asgi import HttpRequest, call_asgi


async def chat(request: Request) -> Response:
    """A chat completion of nothing."""
    body = await request.json()
    if not body.get("stream"):
        message = {"role": "assistant", "content": "ok"}
        return JSONResponse({"id": "mock", "object": "chat.completion", "choices": [{"index": 0, "message": message}]})
    return StreamingResponse(_chunks(body["chunks"], body["every_ms"] / 1000), media_type="text/event-stream")


async def _chunks(count: int, every_s: float):
    """Events at times that are set from the start, so that a late one does not put the others off."""
    start = time.monotonic()
    head = '{"id":"mock","object":"chat.completion.chunk","created":1,"model":"mock","choices":[{"index":0,"delta":'
    for number in range(count):
        await asyncio.sleep(start + number * every_s - time.monotonic())
        yield f'data: {head}{{"content":"word "}},"finish_reason":null}}],"left":{time.monotonic_ns()}}}\n\n'
    yield "data: [DONE]\n\n"


async def health(_: Request) -> Response:
    """It is up."""
    return JSONResponse({"status": "ok"})


def build() -> Starlette:
    """The application."""
    return Starlette(routes=[Route("/health", health), Route("/v1/chat/completions", chat, methods=["POST"])])


class Mock:
    """A deployment that the router takes for a model."""

    def __init__(self):
        self._app = build()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    async def http(self, request: HttpRequest):
        """As `serve_app.replica.deployment.Model` has it."""
        async for item in call_asgi(self._app, request):
            yield item


def application(at_zero: bool) -> serve.Application:
    """One replica, or none until it is asked."""
    scaling = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1} if at_zero else None
    options = {"max_ongoing_requests": 4 * MAX_ONGOING_REQUESTS, "autoscaling_config": scaling}
    deployment = serve.deployment(serve.ingress()(Mock), name=MODEL_DEPLOYMENT)
    return deployment.options(**options, ray_actor_options={"num_cpus": 0}).bind()


if __name__ == "__main__":
    print(json.dumps({"port": int(sys.argv[1])}), flush=True)
    uvicorn.run(build(), host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
