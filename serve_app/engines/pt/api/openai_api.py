"""Builds the pt engine's ASGI application, whose endpoints are OpenAI's and some of vLLM's."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve_app.engines.pt.api.answer_writer import AnswerWriter, json_response
from serve_app.engines.pt.api.job import CHAT, TEXT
from serve_app.engines.pt.api.job_builder import JobBuilder
from serve_app.engines.pt.api.openapi import openapi_document
from serve_app.engines.pt.api.prompts import Prompts
from serve_app.engines.pt.api.protocol import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
    read_tokenize,
)
from serve_app.engines.pt.api.request_error import request_error
from serve_app.engines.pt.core.places import Reservation
from serve_app.engines.pt.generator import Generator
from serve_app.engines.workers import Workers
from serve_app.errors import ContextTooLong, EngineError, ModelUnavailable, RequestError
from serve_app.wire.arrival import known_body
from serve_app.wire.asgi import KEY_NAME_HEADER
from serve_app.wire.body import RequestBody
from serve_app.wire.census import decode_body
from serve_app.wire.headers import header
from serve_app.wire.openai_errors import error_response, route_error_response

logger = logging.getLogger("ray.serve")

Endpoint = Callable[[Request], Awaitable[Response]]
Asked = TypeVar("Asked", bound=Body)

# OpenAI's completions endpoint generates this many tokens if the request does not say.
DEFAULT_COMPLETION_TOKENS = 16


def build_app(generator: Generator) -> Starlette:
    """Returns the application around a running model."""
    endpoints = _Endpoints(generator)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", _guarded(endpoints.chat), methods=["POST"]),
            Route("/v1/completions", _guarded(endpoints.complete), methods=["POST"]),
            Route("/v1/embeddings", _guarded(endpoints.embed), methods=["POST"]),
            Route("/tokenize", _guarded(endpoints.tokenize), methods=["POST"]),
            Route("/detokenize", _guarded(endpoints.detokenize), methods=["POST"]),
            Route("/v1/models", endpoints.models),
            Route("/health", endpoints.health),
            Route("/load", endpoints.load),
            Route("/openapi.json", endpoints.openapi),
        ],
        exception_handlers={RequestError: _refused, HTTPException: _no_such_route, Exception: _unexpected},
    )


class _Endpoints:
    def __init__(self, generator: Generator):
        self._generator = generator
        self._prompts = Prompts(generator)
        self._workers = Workers()
        self._writer = AnswerWriter(generator, JobBuilder(generator, self._prompts), self._workers)
        self._created = int(time.time())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions answers a chat."""
        size, asked = await self._read(request, ChatRequest.read)
        key = _key_name(request)
        self._require_alive()
        return await self._writer.answer(size, asked, key, CHAT, None, lambda: [self._prompts.of_chat(asked)])

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions continues texts."""
        size, asked = await self._read(request, CompletionRequest.read)
        key, tokens = _key_name(request), DEFAULT_COMPLETION_TOKENS
        self._require_alive()
        return await self._writer.answer(size, asked, key, TEXT, tokens, lambda: self._prompts.of_texts(asked))

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings answers with the mean of the last hidden states over a text's tokens, of length 1."""
        size, asked = await self._read(request, EmbeddingRequest.read)
        self._require_alive()
        with self._generator.reserve(asked.sequences, asked.model) as places:
            prompts = await self._workers.run(size, partial(self._prompts.of_texts, asked))
            longest, most = max(map(len, prompts)), self._generator.max_tokens_per_request
            if longest > most:
                raise ContextTooLong(
                    f"This model's maximum context length is {most} tokens. However, the input has {longest}.",
                    param="input",
                )
            vectors = await self._vectors(prompts, places)
        return json_response(await self._workers.run(size, lambda: self._write_vectors(asked, prompts, vectors)))

    async def _vectors(self, prompts: list[list[int]], places: Reservation) -> list[list[float]]:
        """Returns the vectors of all prompts, or raises the first error, which ends the others too."""
        owner = object()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._generator.embed(prompt, places, owner)) for prompt in prompts]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _write_vectors(self, asked: EmbeddingRequest, prompts: list[list[int]], vectors: list[list[float]]) -> bytes:
        data = [
            {"object": "embedding", "index": index, "embedding": asked.encode(vector)}
            for index, vector in enumerate(vectors)
        ]
        total = sum(map(len, prompts))
        usage = {"prompt_tokens": total, "total_tokens": total}
        model = self._generator.adapter_name(asked.model) or self._generator.name
        return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": usage})

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize answers with the token ids of a prompt, or of messages in the chat template, as vLLM does."""

        def answer(asked: ChatRequest | TokenizeRequest) -> bytes:
            ids = self._prompts.of_chat(asked) if isinstance(asked, ChatRequest) else self._prompts.of_text(asked)
            most = self._generator.max_tokens_per_request
            return msgspec.json.encode({"count": len(ids), "max_model_len": most, "tokens": ids})

        size, asked = await self._read(request, read_tokenize)
        return json_response(await self._workers.run(size, partial(answer, asked)))

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize answers with the text of token ids, as vLLM does."""

        def answer(asked: DetokenizeRequest) -> bytes:
            return msgspec.json.encode({"prompt": self._prompts.text_of(asked)})

        size, asked = await self._read(request, DetokenizeRequest.read)
        return json_response(await self._workers.run(size, partial(answer, asked)))

    async def models(self, _: Request) -> Response:
        """GET /v1/models lists the one model and its adapters."""
        entry = {
            "id": self._generator.name,
            "object": "model",
            "created": self._created,
            "owned_by": "serve-app",
            "max_model_len": self._generator.max_tokens_per_request,
            "batching": not self._generator.serial_reason,
        }
        adapters = [entry | {"id": name, "parent": self._generator.name} for name in self._generator.adapters]
        return JSONResponse({"object": "list", "data": [entry, *adapters]})

    async def load(self, _: Request) -> Response:
        """GET /load counts the sequences that run or wait, as vLLM does."""
        return JSONResponse({"server_load": self._generator.in_flight})

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json answers with the OpenAPI document."""
        return JSONResponse(openapi_document())

    async def health(self, _: Request) -> Response:
        """GET /health answers 200 while the engine can answer."""
        self._require_alive()
        reason = self._generator.serial_reason
        return JSONResponse({"status": "ok"} | ({"one_request_at_a_time": reason} if reason else {}))

    def _require_alive(self) -> None:
        try:
            self._generator.require_alive()
        except EngineError as error:
            raise ModelUnavailable(str(error), retry_after_s=5.0) from None

    async def _read(self, request: Request, read: Callable[[object], Asked]) -> tuple[int, Asked]:
        """Returns the body's bytes, and what `read` makes of it, on a thread. Raises InvalidRequest and
        ModelNotFound."""
        body = known_body(request.scope) or RequestBody(await request.body())
        size = len(body.content)
        asked = await self._workers.run(size, lambda: read(decode_body(body.content, lambda: body.census)))
        self._generator.adapter_name(asked.model)
        return size, asked


def _key_name(request: Request) -> str | None:
    """Returns the name of the key that the request came with."""
    name = header(request.scope["headers"], KEY_NAME_HEADER)
    return None if name is None else name.decode("latin-1")


def _guarded(endpoint: Endpoint) -> Endpoint:
    """Gives the endpoint an answer for every error.

    Starlette raises an unexpected error again once its handler has answered, and the server then cuts the connection
    under the client's next request.
    """

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:
            if not isinstance(error, RequestError):
                logger.exception("A request failed.")
            return error_response(request_error(error))

    return guarded


async def _refused(_: Request, error: Exception) -> Response:
    return error_response(request_error(error))


async def _unexpected(_: Request, error: Exception) -> Response:
    """Answers in JSON. Serve answers in plain text in a replica's place, and the router would then ask another
    replica."""
    return error_response(RequestError(f"The pt engine failed: {type(error).__name__}: {error}"))


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return route_error_response(error, f"{request.method} {request.url.path}: {error.detail}.")
