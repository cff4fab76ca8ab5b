"""Reaches a model over plain HTTP, directly at its replicas' own servers. This costs half the CPU of a handle.

Two cases need the handle instead: a model without a running replica, which Serve starts for what waits at handles, and
replicas that no connection reaches.
"""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from serve_app.access.gate import ROUTER_HEADER, Gate
from serve_app.access.limiter import router_token
from serve_app.errors import Overloaded, UnreadableAnswer
from serve_app.router.directory import ModelDirectory
from serve_app.router.engine_loss import is_lost_status
from serve_app.router.suspicion import Death
from serve_app.router.upstream.addresses import Lease, ReplicaAddress, ReplicaAddresses
from serve_app.router.upstream.protocol import (
    FULL_RETRY_S,
    Answer,
    EngineGone,
    HandleUpstream,
    ReplicaLost,
    require_open,
)
from serve_app.wire.asgi import HttpRequest
from serve_app.wire.headers import Headers

logger = logging.getLogger("ray.serve")

# A connection to a replica may take this many seconds. A running replica takes it at once; a lost node says nothing.
CONNECT_TIMEOUT_S = 3.0
# Servers close idle connections after a while, and a request that is sent during that is lost. So this share is used.
KEEP_ALIVE_SHARE = 0.67
# Serve says this in a replica's place, as plain text, if the replica is full, is stopping, or belongs to another model
# on the same port. An engine's own answers are JSON.
SERVE_ERRORS = frozenset({404, 500, 502, 503, 504})
BACKPRESSURE = "dropped due to backpressure"
TOO_MANY = 429
REDIRECTS = frozenset({301, 302, 303, 307, 308})
NOT_CONNECTED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
# A node that loses its power closes no connection. Its silence is noticed after 5 + 3 × 5 s, or, if something was sent
# and is not acknowledged, after 30 s.
SOCKET_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
)
# A key that opens the router's door does not open a replica's, where the router's own token does. Without keys, what
# stands in these headers is passed on like any other header.
CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
# The log gets a line about replicas that are not reached at most once in this many seconds.
WARN_EVERY_S = 60.0
# A line of an answer's head may have this many bytes, as HAProxy allows with the buffers that the configs set.
MAX_LINE_BYTES = 64 * 1024
# A replica that has said that its engine is lost has this many seconds to say that it lives.
HEALTH_TIMEOUT_S = 5.0


class HttpUpstream:
    """Sends requests to the replicas' own servers. Each router replica has one."""

    def __init__(self, directory: ModelDirectory, handles: HandleUpstream, gate: Gate, addresses: ReplicaAddresses):
        self._directory = directory
        self._handles = handles
        self._gate = gate
        self._addresses = addresses
        self._session: aiohttp.ClientSession | None = None
        self._warned_at = float("-inf")

    async def start(self) -> None:
        """Does what `Upstream` says."""
        await asyncio.to_thread(router_token)  # Later, Ray's head may be away.
        await self._addresses.watch()
        keep_alive_s = KEEP_ALIVE_SHARE * self._addresses.keep_alive_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=keep_alive_s, socket_factory=_socket),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            auto_decompress=False,
            skip_auto_headers=("user-agent", "accept", "accept-encoding"),
            read_bufsize=2**17,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
        )

    async def send(self, name: str, request: HttpRequest) -> Answer:
        """Does what `Upstream` says. If a replica has no room or takes no connection, the request goes to the next."""
        model = await require_open(self._directory, name)
        application = model.application
        refusals: list[HttpAnswer] = []  # Two at most: if all are full, asking all would double their load.
        full: Overloaded | None = None
        try:
            for address in self._addresses.by_preference(application, model.having):
                if address.is_out:  # Another request has found its node silent meanwhile.
                    continue
                if address.is_gone and not await self._is_well(address):
                    continue
                try:
                    answer = await self._send_to(address, request)
                except Overloaded as error:
                    full = error
                except aiohttp.ConnectionTimeoutError:
                    self._addresses.silent(address.host)
                except aiohttp.ClientConnectorError:  # Nothing was sent, so another replica may get it.
                    address.refused()
                else:
                    refusals.append(answer)
                    if answer.status != TOO_MANY or len(refusals) == 2:
                        return refusals.pop()
            if refusals:
                return refusals.pop()
        finally:
            for refusal in refusals:
                await refusal.close()
        if full is not None:
            raise full
        if self._addresses.has_gone(application):  # Over a handle, Ray would choose the same replica.
            raise EngineGone(f"the engines of the replicas of '{name}' are lost and are being replaced")
        return await self._over_a_handle(name, application, request)

    async def close(self) -> None:
        """Closes its connections."""
        self._addresses.stop()
        if self._session is not None:
            await self._session.close()

    async def _over_a_handle(self, name: str, application: str, request: HttpRequest) -> Answer:
        if self._addresses.has(application) and time.monotonic() > self._warned_at + WARN_EVERY_S:
            self._warned_at = time.monotonic()
            logger.warning(
                "No replica of '%s' takes a connection from here, so requests go over Ray, at twice the cost. Nodes "
                "must reach each other's ports of RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT to …_MAX_HTTP_PORT.", name
            )  # fmt: skip
        return await self._handles.send(name, request)

    async def _send_to(self, address: ReplicaAddress, request: HttpRequest) -> "HttpAnswer":
        assert self._session is not None, "not started"
        query = f"?{request.query.decode('latin-1')}" if request.query else ""
        url = URL(f"{address.url}{quote(request.path)}{query}", encoded=True)
        lease = address.begin()
        try:
            reply = await self._session.request(
                request.method, url, data=request.body, headers=self._headers(request), allow_redirects=False
            )
        except NOT_CONNECTED:
            lease.end()
            raise
        except aiohttp.ClientResponseError as error:  # It answered, and would give the same answer again.
            lease.end()
            raise _unreadable(error) from error
        except aiohttp.ClientError as error:
            death = address.lost()
            lease.end()
            raise _broken(error, address, death) from error
        except BaseException:
            lease.end()
            raise
        address.answered()
        answer = HttpAnswer(reply, lease)
        if reply.status in SERVE_ERRORS and reply.content_type == "text/plain":
            await _raise_of_serve(address, answer, reply)
        if is_lost_status(reply.status):
            try:
                await self._is_well(address)
            except BaseException:  # The client has left meanwhile.
                await answer.close()
                raise
        return answer

    async def _is_well(self, address: ReplicaAddress) -> bool:
        """Returns whether an engine that was reported as lost lives. The report may have meant only one request."""
        assert self._session is not None, "not started"
        lease = address.begin()
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
            async with self._session.get(f"{address.url}/health", timeout=timeout) as reply:
                is_well, is_told = reply.status == 200, True
        except NOT_CONNECTED:
            address.refused()
            return False
        except (aiohttp.ClientError, TimeoutError):
            is_well = is_told = False
        finally:
            lease.end()
        if is_well:
            address.well()
        else:
            address.gone(is_told)
        return is_well

    def _headers(self, request: HttpRequest) -> CIMultiDict[str]:
        shut = () if self._gate.source.is_open else CREDENTIALS
        headers = CIMultiDict(
            (key.decode("latin-1"), _text(value)) for key, value in request.headers if key not in shut
        )
        # Without keys, the replica would compare a page's `Origin` with its own address, and the router has compared it
        # with the one that the browser knows.
        headers[ROUTER_HEADER.decode()] = router_token().decode()
        return headers


class HttpAnswer:
    """This is an answer over HTTP. Reading it slowly slows the replica down: TCP holds it back."""

    def __init__(self, reply: aiohttp.ClientResponse, lease: Lease):
        self.status = reply.status
        self.headers: Headers = [(name.lower(), value) for name, value in reply.raw_headers]
        if reply.status in REDIRECTS:  # A replica names its own address and prefix, but the client asked by name.
            own = lease.address.url.encode()
            self.headers = [(name, value.removeprefix(own)) for name, value in self.headers]
        self._reply = reply
        self._lease = lease

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yields all that has arrived as one piece, without waiting for more."""
        try:
            async for piece in self._reply.content.iter_any():
                yield piece
        except aiohttp.ClientError as error:
            death = self._lease.address.lost()
            raise _broken(error, self._lease.address, death) from error

    def lost(self, message: str) -> ReplicaLost:
        """Returns the error to raise. The replica must report its health before anything is sent there again. If it is
        well, nothing has died: vLLM answers 503 when its queue is full."""
        address = self._lease.address
        was_asked = is_lost_status(self.status)
        is_well = was_asked and not address.is_gone
        return ReplicaLost(message, None if is_well else address.gone(is_told=not was_asked))

    async def close(self) -> None:
        """Closes the connection of an answer that was not read to its end, which ends the engine's work."""
        self._reply.close()
        self._lease.end()


async def _raise_of_serve(address: ReplicaAddress, answer: HttpAnswer, reply: aiohttp.ClientResponse) -> None:
    """Raises Overloaded if the replica's queue (Serve's max_queued_requests) is full, and otherwise ReplicaLost."""
    reason = ""
    try:
        reason = " ".join((await reply.text(errors="replace")).split())[:200]
    except aiohttp.ClientError:
        pass
    finally:
        if BACKPRESSURE not in reason:
            address.lost()
        await answer.close()
    if BACKPRESSURE in reason:
        raise Overloaded("The model's queue is full. Try again later.", retry_after_s=FULL_RETRY_S)
    raise ReplicaLost(reason or f"HTTP {reply.status}")


def _broken(error: aiohttp.ClientError, address: ReplicaAddress, death: Death | None) -> ReplicaLost:
    """Returns the error to raise for a connection that broke. How it did is for the log and not for clients."""
    logger.info("The connection to the replica at %s broke: %s: %s", address.url, type(error).__name__, error)
    return ReplicaLost("the connection to the replica broke", death)


def _unreadable(error: aiohttp.ClientResponseError) -> UnreadableAnswer:
    text = " ".join(error.message.split())[:300]
    return UnreadableAnswer(
        f"The model's replica gave an answer that is not readable HTTP: {text} Its headers may have "
        f"{MAX_LINE_BYTES} bytes each."
    )


def _socket(info: Any) -> socket.socket:
    """Returns a socket that notices when the other side has vanished. aiohttp's own socket sets no such option."""
    family, kind, protocol, _, _ = info
    made = socket.socket(family, kind, protocol)
    for level, option, value in SOCKET_OPTIONS:
        made.setsockopt(level, option, value)
    return made


def _text(value: bytes) -> str:
    """Returns a header's value as text for aiohttp, which writes UTF-8. Other bytes are latin-1, as HTTP says."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
