"""A small OpenAI-compatible server in a thread."""

import asyncio
import json
import threading
from collections.abc import Mapping
from typing import Any

from aiohttp import web

TOKEN_S = 0.002


class TokenServer:
    """Answers with as many tokens as it is asked for, at most `batch` requests at one time. `most_inside` is how many
    were there at one time, those that wait too."""

    def __init__(self, batch: int):
        self.seen = list[dict[str, Any]]()
        self.inside = self.most_inside = 0
        self._batch = batch
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    async def _start(self) -> str:
        self._room = asyncio.Semaphore(self._batch)
        app = web.Application()
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            return await self._answered(request)
        finally:
            self.inside -= 1

    async def _answered(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(body)
        if body.get("prompt") == "refuse":
            return web.json_response({"error": {"message": "full"}}, status=503)
        is_chat = request.path.endswith("chat/completions")
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        async with self._room:
            await reply.prepare(request)
            for number in range(body["max_tokens"]):
                await asyncio.sleep(TOKEN_S)
                choice = {"delta": {"content": "x"}} if is_chat else {"text": "x"}
                await reply.write(event({"choices": [choice], "usage": None}))
                if body.get("prompt") == "cut" and number == 1:
                    return reply
        await reply.write(event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}))
        await reply.write(b"data: [DONE]\n\n")
        return reply

    def stop(self) -> None:
        """Ends the server and its thread."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


def event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()
