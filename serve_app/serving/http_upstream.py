"""The way to a model over plain HTTP, back through this node's HAProxy. It costs half the CPU of a handle.

HAProxy chooses the replica (least connections, health checks), and its fallback, Serve's Python proxy, holds a request
for a model without replicas until one is there. What this way cannot do goes over the handle: a model whose route
HAProxy does not know yet, and a node without HAProxy.
"""

import logging
import time
from collections.abc import AsyncIterator
from urllib.parse import quote

import aiohttp
import ray
from multidict import CIMultiDict
from yarl import URL

from serve_app.errors import ModelUnavailable
from serve_app.serving.asgi import Headers, HttpRequest
from serve_app.serving.directory import CONTROLLER, NAMESPACE, ModelDirectory
from serve_app.serving.gate import ROUTER_HEADER, Gate
from serve_app.serving.limiter_actor import router_token
from serve_app.serving.upstream import Answer, HandleUpstream, ReplicaLost, require_open

logger = logging.getLogger("ray.serve")

# Marks a request of the router, so that it refuses one that comes back to itself.
HOP_HEADER = b"x-serve-app-hop"
# A table of routes is read again for a name that is not in it, at most this often.
ROUTES_AGE_S = 0.5
# And for the others: two models may have changed places.
MOST_ROUTES_AGE_S = 10.0
# Made by HAProxy, which has no request id, or by Serve's proxy behind it, as plain text; a replica's own answers have
# an id, and are JSON.
PROXY_ERRORS = frozenset({500, 502, 503, 504})


class HttpUpstream:
    """Sends to a model's own route. One for each router replica."""

    def __init__(self, directory: ModelDirectory, handles: HandleUpstream, gate: Gate):
        self._directory = directory
        self._handles = handles
        self._gate = gate
        self._base = ""
        self._session: aiohttp.ClientSession | None = None
        self._routes: dict[str, str] = {}
        self._routes_read_at = float("-inf")

    async def send(self, name: str, request: HttpRequest) -> Answer:
        """As in `Upstream`."""
        await require_open(self._directory, name)
        route = await self._route(name)
        if route is None:
            return await self._handles.send(name, request)
        assert self._session is not None
        query = f"?{request.query.decode('latin-1')}" if request.query else ""
        url = URL(f"{self._base}{route}{quote(request.path)}{query}", encoded=True)
        try:
            reply = await self._session.request(
                request.method, url, data=request.body, headers=self._headers(request), allow_redirects=False
            )
        except aiohttp.ClientConnectorError:
            return await self._handles.send(name, request)  # No HAProxy on this node, or not yet.
        except aiohttp.ClientError as error:
            raise ReplicaLost(f"{type(error).__name__}: {error}") from error
        if reply.status in PROXY_ERRORS | {404}:
            self._routes.pop(name, None)  # It may have moved.
        if reply.status in PROXY_ERRORS and ("x-request-id" not in reply.headers or reply.content_type == "text/plain"):
            reason = (await _text(reply))[:200]
            if "failed to deploy" in reason:
                raise ModelUnavailable(f"The model '{name}' has failed: {reason}", param="model")
            raise ReplicaLost(reason or f"HTTP {reply.status}")
        return HttpAnswer(reply)

    async def close(self) -> None:
        """Closes its connections."""
        if self._session is not None:
            await self._session.close()

    def _headers(self, request: HttpRequest) -> CIMultiDict[str]:
        headers = CIMultiDict((key.decode("latin-1"), value.decode("latin-1")) for key, value in request.headers)
        headers[HOP_HEADER.decode()] = "1"
        if not self._gate.source.is_open:
            headers[ROUTER_HEADER.decode()] = router_token().decode()
        return headers

    async def _route(self, name: str) -> str | None:
        """The prefix of a model's route, None where HAProxy has none for it."""
        age_s = time.monotonic() - self._routes_read_at
        if age_s > (ROUTES_AGE_S if name not in self._routes else MOST_ROUTES_AGE_S):
            self._routes_read_at = time.monotonic()
            try:
                await self._read_routes()
            except (aiohttp.ClientError, ValueError, ray.exceptions.RayError, OSError) as error:
                logger.warning("No routes from HAProxy; requests go over handles: %s", error)
        return self._routes.get(name)

    async def _read_routes(self) -> None:
        if self._session is None:
            controller = ray.get_actor(CONTROLLER, namespace=NAMESPACE)
            config = await controller.get_http_config.remote()
            host = "127.0.0.1" if config.host in ("0.0.0.0", "localhost", "::") else config.host  # noqa: S104
            self._base = f"http://{host}:{config.port}"
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                auto_decompress=False,
                skip_auto_headers=("user-agent", "accept", "accept-encoding"),
                read_bufsize=2**17,
            )
        async with self._session.get(f"{self._base}/-/routes") as reply:
            routes = await reply.json(content_type=None)
        self._routes = {name: prefix.rstrip("/") for prefix, name in routes.items() if prefix != "/"}


class HttpAnswer:
    """An answer over HTTP. Reading it slowly slows the replica down: TCP holds it back."""

    def __init__(self, reply: aiohttp.ClientResponse):
        self.status = reply.status
        self.headers: Headers = [(name.lower(), value) for name, value in reply.raw_headers]
        self._reply = reply

    async def pieces(self) -> AsyncIterator[bytes]:
        """All that has arrived, as one piece; nothing waits for more."""
        try:
            async for piece in self._reply.content.iter_any():
                yield piece
        except aiohttp.ClientError as error:
            raise ReplicaLost(f"{type(error).__name__}: {error}") from error

    async def close(self) -> None:
        """An answer that was not read to its end takes its connection along, and so the engine's work ends."""
        self._reply.close()


async def _text(reply: aiohttp.ClientResponse) -> str:
    try:
        return " ".join((await reply.text(errors="replace")).split())
    except aiohttp.ClientError:
        return ""
    finally:
        reply.close()
