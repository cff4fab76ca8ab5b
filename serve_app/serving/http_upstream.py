"""The way to a model over plain HTTP, straight to its replicas' own servers. It costs half the CPU of a handle.

What this way cannot do goes over the handle: a model without a running replica, which Serve starts for what waits at
handles, and replicas that no connection reaches.
"""

from collections.abc import AsyncIterator
from urllib.parse import quote

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from serve_app.serving.asgi import Headers, HttpRequest
from serve_app.serving.directory import ModelDirectory
from serve_app.serving.gate import ROUTER_HEADER, Gate
from serve_app.serving.limiter_actor import router_token
from serve_app.serving.replica_addresses import ReplicaAddress, ReplicaAddresses
from serve_app.serving.upstream import Answer, HandleUpstream, ReplicaLost, require_open

# Seconds for a connection to a replica. One that runs takes it at once; a node that is gone says nothing.
CONNECT_TIMEOUT_S = 3.0
# Seconds for which an idle connection is kept. Serve's servers close theirs after 90, and a request that is sent at
# that moment would be lost.
KEEP_ALIVE_S = 60.0
# What Serve says in a replica's place, as plain text: it is full, ends, or is another model's on the same port. An
# engine's own answers are JSON.
SERVE_ERRORS = frozenset({404, 500, 502, 503, 504})
NOT_CONNECTED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


class HttpUpstream:
    """Sends to the replicas' own servers. One for each router replica."""

    def __init__(self, directory: ModelDirectory, handles: HandleUpstream, gate: Gate, addresses: ReplicaAddresses):
        self._directory = directory
        self._handles = handles
        self._gate = gate
        self._addresses = addresses
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """As in `Upstream`."""
        await self._addresses.watch()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            auto_decompress=False,
            skip_auto_headers=("user-agent", "accept", "accept-encoding"),
            read_bufsize=2**17,
        )

    async def send(self, name: str, request: HttpRequest) -> Answer:
        """As in `Upstream`."""
        await require_open(self._directory, name)
        for address in self._addresses.by_preference(name):
            try:
                return await self._send_to(address, request)
            except NOT_CONNECTED:  # Nothing was sent, so another may have it.
                address.refused()
        return await self._handles.send(name, request)

    async def close(self) -> None:
        """Closes its connections."""
        self._addresses.stop()
        if self._session is not None:
            await self._session.close()

    async def _send_to(self, address: ReplicaAddress, request: HttpRequest) -> "HttpAnswer":
        assert self._session is not None, "not started"
        query = f"?{request.query.decode('latin-1')}" if request.query else ""
        url = URL(f"{address.url}{quote(request.path)}{query}", encoded=True)
        address.running += 1
        try:
            reply = await self._session.request(
                request.method, url, data=request.body, headers=self._headers(request), allow_redirects=False
            )
            answer = HttpAnswer(reply, address)
        except BaseException as error:
            address.running -= 1
            if isinstance(error, aiohttp.ClientError) and not isinstance(error, NOT_CONNECTED):
                raise ReplicaLost(f"{type(error).__name__}: {error}") from error
            raise
        if reply.status in SERVE_ERRORS and reply.content_type == "text/plain":
            reason = (await _text(reply))[:200]
            await answer.close()
            raise ReplicaLost(reason or f"HTTP {reply.status}")
        return answer

    def _headers(self, request: HttpRequest) -> CIMultiDict[str]:
        headers = CIMultiDict((key.decode("latin-1"), value.decode("latin-1")) for key, value in request.headers)
        if not self._gate.source.is_open:
            headers[ROUTER_HEADER.decode()] = router_token().decode()
        return headers


class HttpAnswer:
    """An answer over HTTP. Reading it slowly slows the replica down: TCP holds it back."""

    def __init__(self, reply: aiohttp.ClientResponse, address: ReplicaAddress):
        self.status = reply.status
        self.headers: Headers = [(name.lower(), value) for name, value in reply.raw_headers]
        self._reply = reply
        self._address: ReplicaAddress | None = address

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
        if self._address is not None:
            self._address.running -= 1
            self._address = None


async def _text(reply: aiohttp.ClientResponse) -> str:
    try:
        return " ".join((await reply.text(errors="replace")).split())
    except aiohttp.ClientError:
        return ""
