"""HTTP/1.1 over plain sockets: requests that no HTTP library would send, as values that can be kept and sent again.

Clients keep their connection, since a fuzz run sends a hundred thousand requests.
"""

import asyncio
import base64
import contextlib
import json
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

Header = tuple[bytes, bytes]

# Longer bodies are compressed where a request is written down.
READABLE_BYTES = 2000
MOST_HEAD_BYTES = 2**18


@dataclass(frozen=True)
class Request:
    """One request. `host` and `content-length` are added where `headers` lack them; `leave_after_s` closes it early."""

    method: str
    path: str
    headers: tuple[Header, ...] = ()
    body: bytes = b""
    leave_after_s: float | None = None

    def encode(self) -> bytes:
        """The bytes for the socket."""
        names = {name.lower() for name, _ in self.headers}
        headers = list(self.headers)
        if b"host" not in names:
            headers.append((b"host", b"localhost"))
        if not names & {b"content-length", b"transfer-encoding"}:
            headers.append((b"content-length", b"%d" % len(self.body)))
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        return f"{self.method} {self.path} HTTP/1.1\r\n".encode() + head + b"\r\n" + self.body

    def line(self) -> str:
        """One line of JSON, which `read` turns into the same request."""
        told: dict[str, Any] = {
            "method": self.method,
            "path": self.path,
            "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in self.headers],
        }
        if len(self.body) <= READABLE_BYTES:
            told["body"] = self.body.decode("latin-1")
        else:
            told["zlib"] = base64.b64encode(zlib.compress(self.body)).decode()
        if self.leave_after_s is not None:
            told["leave_after_s"] = self.leave_after_s
        return json.dumps(told)

    @classmethod
    def read(cls, line: str) -> Self:
        """The request of a line."""
        told = json.loads(line)
        body = zlib.decompress(base64.b64decode(told["zlib"])) if "zlib" in told else told["body"].encode("latin-1")
        headers = tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in told["headers"])
        return cls(told["method"], told["path"], headers, body, told.get("leave_after_s"))


@dataclass(frozen=True)
class Answer:
    """What came back, and after how long. `problem` says why there is no whole answer; `status` is 0 without a head."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    seconds: float = 0.0
    problem: str = ""


class Left(Exception):
    """The client closed the connection on purpose."""


class Client:
    """A connection that is opened when it is needed. One request at a time."""

    def __init__(self, port: int):
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, request: Request, timeout_s: float) -> Answer:
        """Sends it and reads the answer. A connection that the server closed while it was idle is opened again."""
        start = time.monotonic()
        was_open = self._streams is not None
        answer = await self._once(request, timeout_s, start)
        if was_open and answer.status == 0 and answer.problem == "closed without an answer":
            answer = await self._once(request, timeout_s, start)
        return answer

    def close(self) -> None:
        """At once, whatever is under way."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _once(self, request: Request, timeout_s: float, start: float) -> Answer:
        wait_s = timeout_s if request.leave_after_s is None else request.leave_after_s
        status, headers, body, problem = 0, dict[bytes, bytes](), b"", ""
        try:
            async with asyncio.timeout(wait_s):
                reader, writer = await self._open()
                writing = asyncio.create_task(_write(writer, request.encode()))
                try:
                    status, headers = await _head(reader)
                    body = await _body(reader, headers, request.method == "HEAD")
                finally:
                    is_sent = writing.done() and not writing.cancelled() and writing.exception() is None
                    writing.cancel()
                    await asyncio.gather(writing, return_exceptions=True)
        except TimeoutError:
            problem = f"no whole answer in {timeout_s:g} s" if request.leave_after_s is None else "left"
        except (ConnectionError, asyncio.IncompleteReadError):
            problem = "cut within the answer" if status else "closed without an answer"
        except (ValueError, asyncio.LimitOverrunError) as error:
            problem = f"not HTTP: {error}"
        if problem or not is_sent or headers.get(b"connection", b"").lower() == b"close":
            self.close()
        return Answer(status, headers, body, time.monotonic() - start, problem)

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=MOST_HEAD_BYTES)
        return self._streams


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """The server may answer, and close, before it has read all."""
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        await writer.drain()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes]]:
    while True:
        lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        status = int(lines[0].split(b" ", 2)[1])
        if status >= 200 or status == 101:  # The others announce an answer.
            return status, dict(_fields(lines[1:]))


def _fields(lines: Iterable[bytes]) -> Iterable[Header]:
    for line in lines:
        name, colon, value = line.partition(b":")
        if colon:
            yield name.strip().lower(), value.strip()


async def _body(reader: asyncio.StreamReader, headers: dict[bytes, bytes], is_head: bool) -> bytes:
    if is_head:
        return b""
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        pieces = []
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            pieces.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
        return b"".join(pieces)
    if b"content-length" in headers:
        return await reader.readexactly(int(headers[b"content-length"]))
    return await reader.read()
