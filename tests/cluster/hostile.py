"""Clients that send or read a byte a second, bodies of 100 MB, ten thousand headers: over plain sockets.

The functions return what the server said, so that a test can say what it should have said.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

MB = 10**6


class Connection:
    """One request over a socket of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, prefix: str, key: str):
        self.reader = reader
        self.writer = writer
        self._head = f"POST {prefix}/v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"

    async def begin(self, *headers: str) -> None:
        """Sends the head."""
        lines = "".join(f"{header}\r\n" for header in headers)
        self.writer.write(f"{self._head}content-type: application/json\r\n{lines}\r\n".encode())
        await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """The status and the bytes after it, as far as they come before the server closes or is silent for 2 s."""
        read = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            while piece := await asyncio.wait_for(self.reader.read(65536), 60 if not read else 2):
                read += piece
        return int(read.split(b" ", 2)[1]) if read else 0, read


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
    async with connect(port, prefix, key) as connection:
        await connection.begin(f"content-length: {100 * MB}" if declared else "transfer-encoding: chunked")
        piece = b" " * MB if declared else b"%x\r\n%s\r\n" % (MB, b" " * MB)
        with contextlib.suppress(ConnectionError):  # It may be refused before it is sent.
            for _ in range(100):
                connection.writer.write(piece)
                await connection.writer.drain()
        return await connection.answer()


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
