"""A small server with the real page, whose data a test scripts: states, deltas, chats, plans and failures."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from serve_app.console.page import INDEX, Page
from tests.console.browser import states

KEY = "sk-right-key"
TIMING = "router;dur=0.4, queue;dur=1.2, engine;dur=18.5"


def refusal(status: int, code: str, message: str, **headers: str) -> Response:
    """An error in OpenAI's form, or, without a code, the plain text of a proxy."""
    if not code:
        return PlainTextResponse(message, status)
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse(
        {"error": error}, status, headers={name.replace("_", "-"): text for name, text in headers.items()}
    )


class Scripted:
    """It. Attributes may be changed by the test's thread while it serves."""

    def __init__(self) -> None:
        self.state: Callable[[], Mapping[str, Any]] = states.demo
        self.needs_key = False
        self.key = KEY
        self.breaks = False  # whether an answer's connection ends in its middle
        self.plan: tuple[int, Mapping[str, Any]] = (200, {})
        self.chunks: list[Mapping[str, Any]] = [text_chunk(f"word{number} ") for number in range(20)]
        self.pause_s = 0.005
        self.chat_error: tuple[int, str, str] | None = None
        self.stream_error: tuple[int, str, str] | None = None
        self.asked: list[tuple[str, Any]] = []
        self.chats: list[Any] = []
        self.running_chats = 0
        self.keys_seen: list[str] = []
        self._pages: set[asyncio.Queue[bytes | None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._files = Page()
        self.url = ""

    @property
    def pages(self) -> int:
        """How many streams are open."""
        return len(self._pages)

    def push(self, **parts: Any) -> None:
        """Sends a delta to the open pages."""
        self._to_all(f"event: delta\ndata: {json.dumps(states.delta(**parts))}\n\n".encode())

    def drop(self) -> None:
        """Ends the open streams."""
        self._to_all(None)

    def _to_all(self, event: bytes | None) -> None:
        assert self._loop is not None
        for page in tuple(self._pages):
            self._loop.call_soon_threadsafe(page.put_nowait, event)

    def app(self) -> Starlette:
        """The server's routes."""
        actions = ["/ui/api/models/{name}/wake", "/ui/api/models/{name}/park", "/ui/api/reload"]
        return Starlette(
            routes=[
                Route("/ui/", lambda request: self._files.answer(request, INDEX)),
                Route("/ui/assets/{name:path}", self._asset),
                Route("/ui/api/stream", self._stream),
                Route("/ui/api/plan", self._plan, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                *(Route(path, self._act, methods=["POST"]) for path in actions),
            ]
        )

    def _asset(self, request: Request) -> Response:
        return self._files.answer(request, request.path_params["name"]) or Response(status_code=404)

    def _lacks_key(self, request: Request) -> Response | None:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        self.keys_seen.append(key)
        if not self.needs_key or key == self.key:
            return None
        return refusal(401, "invalid_api_key", "An API key is needed.")

    async def _stream(self, request: Request) -> Response:
        self._loop = asyncio.get_running_loop()
        if (denied := self._lacks_key(request)) is not None:
            return denied
        if self.stream_error is not None:
            return refusal(*self.stream_error)
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[bytes]:
        page: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._pages.add(page)
        try:
            whole = dict(self.state())
            if self.needs_key:
                whole["access"] = {"keys": True, "key": "team-a", "is_admin": False, "keeps_prompts": False}
            yield f": hello\n\nevent: state\ndata: {json.dumps(whole)}\n\n".encode()
            while (event := await page.get()) is not None:
                yield event
        finally:
            self._pages.discard(page)

    async def _plan(self, request: Request) -> Response:
        self.asked.append(("plan", await request.json()))
        return JSONResponse(self.plan[1], self.plan[0])

    async def _act(self, request: Request) -> Response:
        self.asked.append((request.url.path, None))
        if request.url.path.endswith("/reload"):
            return JSONResponse({"file": "/etc/models.yaml", "node": "10.0.0.1", "changes": ["a is new"]})
        return JSONResponse({"message": "It was done."})

    async def _chat(self, request: Request) -> Response:
        self.chats.append(await request.json())
        if self.chat_error is not None:
            return refusal(*self.chat_error)
        return StreamingResponse(self._answer(), media_type="text/event-stream", headers={"server-timing": TIMING})

    async def _answer(self) -> AsyncIterator[bytes]:
        self.running_chats += 1
        try:
            for chunk in tuple(self.chunks):
                yield f"data: {json.dumps(chunk)}\n\n".encode()
                await asyncio.sleep(self.pause_s)
                if self.breaks:
                    raise ConnectionResetError("the answer breaks, as the test wants")
            yield b"data: [DONE]\n\n"
        finally:
            self.running_chats -= 1


def text_chunk(text: str, **fields: Any) -> Mapping[str, Any]:
    """A piece of a chat's answer."""
    return {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **fields}


def delta_chunk(**delta: Any) -> Mapping[str, Any]:
    """A piece with other fields than text."""
    return {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def last_chunks(reason: str = "stop") -> list[Mapping[str, Any]]:
    """The end of an answer, with its usage."""
    usage = {"prompt_tokens": 7, "completion_tokens": 21, "total_tokens": 28}
    return [
        {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]},
        {"id": "chatcmpl-1", "choices": [], "usage": usage},
    ]


@contextmanager
def serving(scripted: Scripted) -> Iterator[Scripted]:
    """Serves on a free port of this machine, in a thread."""
    config = uvicorn.Config(scripted.app(), port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive(), "the server has ended"
        assert time.monotonic() < deadline, "the server has not started"
        time.sleep(0.01)
    scripted.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield scripted
    finally:
        if scripted._loop is not None:
            scripted.drop()
        server.should_exit = True
        thread.join(20)
