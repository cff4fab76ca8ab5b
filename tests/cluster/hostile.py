"""Clients that send or read a byte a second, bodies of 100 MB, ten thousand headers: over plain sockets.

The functions return what the server said, so that a test can say what it should have said.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

MB = 10**6
# Seconds until an answer begins, and of silence after which it has ended.
ANSWER_TIMEOUT_S, SILENCE_S = 60.0, 2.0


def head(prefix: str, key: str) -> str:
    """The first lines of a request."""
    return f"POST {prefix}/v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"


def status_of(answer: bytes) -> int:
    """0 where nothing came."""
    return int(answer.split(b" ", 2)[1]) if answer else 0


class Connection:
    """One request over a socket of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, prefix: str, key: str):
        self.reader = reader
        self.writer = writer
        self._head = head(prefix, key)

    async def begin(self, *headers: str) -> None:
        """Sends the head."""
        lines = "".join(f"{header}\r\n" for header in headers)
        self.writer.write(f"{self._head}content-type: application/json\r\n{lines}\r\n".encode())
        await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """The status and the bytes after it, until the server closes or is silent for SILENCE_S."""
        read = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            while piece := await asyncio.wait_for(self.reader.read(65536), ANSWER_TIMEOUT_S if not read else SILENCE_S):
                read += piece
        return status_of(read), read


@contextlib.asynccontextmanager
async def connect(port: int, prefix: str, key: str) -> AsyncIterator[Connection]:
    """A connection that is closed at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    try:
        yield Connection(reader, writer, prefix, key)
    finally:
        writer.transport.abort()


async def large_body(port: int, prefix: str, key: str, declared: bool) -> tuple[int, bytes]:
    """100 MB, with its length in the head, or in chunks."""
    return await asyncio.to_thread(_large_body, port, prefix, key, declared)


def _large_body(port: int, prefix: str, key: str, declared: bool) -> tuple[int, bytes]:
    """Over a plain socket: the answer may come before all is sent, with a reset behind it. asyncio gives up such a
    connection with the answer unread; the kernel still has it."""
    length = f"content-length: {100 * MB}" if declared else "transfer-encoding: chunked"
    piece = b" " * MB if declared else b"%x\r\n%s\r\n" % (MB, b" " * MB)
    read = b""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_TIMEOUT_S) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(f"{head(prefix, key)}content-type: application/json\r\n{length}\r\n\r\n".encode())
            for _ in range(100):
                connection.sendall(piece)
        with contextlib.suppress(ConnectionError, TimeoutError):
            while more := connection.recv(65536):
                read += more
                connection.settimeout(SILENCE_S)
    return status_of(read), read


async def many_headers(port: int, prefix: str, key: str) -> tuple[int, bytes]:
    """Ten thousand."""
    async with connect(port, prefix, key) as connection:
        await connection.begin(*(f"x-{number}: 1" for number in range(10_000)))
        return await connection.answer()


async def slow_sender(port: int, prefix: str, key: str) -> tuple[int, bytes]:
    """A body of 1000 bytes, one a second."""
    async with connect(port, prefix, key) as connection:
        await connection.begin("content-length: 1000")
        answer = asyncio.create_task(connection.answer())
        while not answer.done():
            connection.writer.write(b" ")
            await asyncio.wait({answer}, timeout=1)
        return await answer


async def slow_reader(port: int, prefix: str, key: str, body: dict[str, object], seconds: int) -> int:
    """A stream of which a byte a second is read. Returns the number of bytes."""
    async with connect(port, prefix, key) as connection:
        content = json.dumps(body).encode()
        await connection.begin(f"content-length: {len(content)}")
        connection.writer.write(content)
        count = 0
        for _ in range(seconds):
            count += len(await connection.reader.read(1))
            await asyncio.sleep(1)
        return count
