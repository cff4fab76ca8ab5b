"""Builds the pt engine's ASGI application, whose endpoints are OpenAI's, Anthropic's and some of vLLM's."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve_app.engines.pt.api.answer_writer import AnswerWriter, json_response
from serve_app.engines.pt.api.error_handlers import EXCEPTION_HANDLERS, guarded, key_name
from serve_app.engines.pt.api.job_builder import JobBuilder
from serve_app.engines.pt.api.messages_form import MessagesForm
from serve_app.engines.pt.api.messages_request import has_system_message, read_counted, read_messages
from serve_app.engines.pt.api.openai_form import CHAT, TEXT, OpenAIForm, Shape
from serve_app.engines.pt.api.openapi import openapi_document
from serve_app.engines.pt.api.prompts import Prompts
from serve_app.engines.pt.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
    read_tokenize,
)
from serve_app.engines.pt.api.request_error import named_as
from serve_app.engines.pt.api.responses_form import ResponsesForm
from serve_app.engines.pt.api.responses_request import read_responses, require_repeatable_body
from serve_app.engines.pt.core.places import Reservation
from serve_app.engines.pt.generator import Generator
from serve_app.engines.workers import Workers
from serve_app.errors import ContextTooLong, EngineError, ModelUnavailable
from serve_app.wire.anthropic.chat_request import NAMES as MESSAGES_NAMES
from serve_app.wire.anthropic.errors import MessagesErrors
from serve_app.wire.arrival import known_body
from serve_app.wire.body import RequestBody
from serve_app.wire.census import decode_body
from serve_app.wire.responses.chat_request import NAMES as RESPONSES_NAMES


class _Named(Protocol):
    """This is what a body asks for, with the model that it names."""

    @property
    def model(self) -> str | None: ...


Asked = TypeVar("Asked", bound=_Named)

# OpenAI's completions endpoint generates this many tokens if the request does not say.
DEFAULT_COMPLETION_TOKENS = 16


def build_app(generator: Generator) -> Starlette:
    """Returns the application around a running model."""
    endpoints = _Endpoints(generator)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", guarded(endpoints.chat), methods=["POST"]),
            Route("/v1/completions", guarded(endpoints.complete), methods=["POST"]),
            Route("/v1/responses", guarded(endpoints.respond), methods=["POST"]),
            Route("/v1/messages", guarded(endpoints.messages), methods=["POST"]),
            Route("/v1/messages/count_tokens", guarded(endpoints.count_tokens), methods=["POST"]),
            Route("/v1/embeddings", guarded(endpoints.embed), methods=["POST"]),
            Route("/tokenize", guarded(endpoints.tokenize), methods=["POST"]),
            Route("/detokenize", guarded(endpoints.detokenize), methods=["POST"]),
            Route("/v1/models", endpoints.models),
            Route("/health", endpoints.health),
            Route("/load", endpoints.load),
            Route("/openapi.json", endpoints.openapi),
        ],
        middleware=[Middleware(MessagesErrors)],
        exception_handlers=EXCEPTION_HANDLERS,
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
        key = key_name(request)
        self._require_alive()
        return await self._writer.answer(
            size, asked, key, self._form(CHAT), None, lambda: [self._prompts.of_chat(asked)]
        )

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions continues texts."""
        size, asked = await self._read(request, CompletionRequest.read)
        key, tokens = key_name(request), DEFAULT_COMPLETION_TOKENS
        self._require_alive()
        return await self._writer.answer(
            size, asked, key, self._form(TEXT), tokens, lambda: self._prompts.of_texts(asked)
        )

    async def messages(self, request: Request) -> Response:
        """POST /v1/messages answers a chat of Anthropic's API."""
        size, asked = await self._read(request, partial(self._chat_of_messages, read_messages))
        key = key_name(request)
        self._require_alive()
        form = MessagesForm()
        with named_as(MESSAGES_NAMES):
            return await self._writer.answer(size, asked, key, form, None, lambda: [self._prompts.of_chat(asked)])

    async def count_tokens(self, request: Request) -> Response:
        """POST /v1/messages/count_tokens answers with the tokens of a chat's prompt."""
        size, asked = await self._read(request, partial(self._chat_of_messages, read_counted))
        with named_as(MESSAGES_NAMES):
            ids = await self._workers.run(size, lambda: self._prompts.of_chat(asked))
        return json_response(msgspec.json.encode({"input_tokens": len(ids)}))

    async def respond(self, request: Request) -> Response:
        """POST /v1/responses answers a chat of OpenAI's newer API, of which nothing is stored."""
        size, asked = await self._read(request, read_responses, require_repeatable_body)
        key, chat = key_name(request), asked.chat
        self._require_alive()
        form = ResponsesForm(self._generator.tokenizer, asked.repeated)
        with named_as(RESPONSES_NAMES):
            return await self._writer.answer(size, chat, key, form, None, lambda: [self._prompts.of_chat(chat)])

    def _form(self, shape: Shape) -> OpenAIForm:
        return OpenAIForm(shape, self._generator.tokenizer)

    def _chat_of_messages(self, read: Callable[..., ChatRequest], body: object) -> ChatRequest:
        return read(body, merge_system=has_system_message(body) and not self._prompts.takes_late_system)

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
            model = places.adapter_name or self._generator.name
        written = 20 * sum(map(len, vectors))  # A number takes some 20 bytes.
        write = partial(self._write_vectors, asked, prompts, vectors, model)
        return json_response(await self._workers.write(written, write))

    async def _vectors(self, prompts: list[list[int]], places: Reservation) -> list[list[float]]:
        """Returns the vectors of all prompts, or raises the first error, which ends the others too."""
        owner = object()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._generator.embed(prompt, places, owner)) for prompt in prompts]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _write_vectors(
        self, asked: EmbeddingRequest, prompts: list[list[int]], vectors: list[list[float]], model: str
    ) -> bytes:
        data = [
            {"object": "embedding", "index": index, "embedding": asked.encode(vector)}
            for index, vector in enumerate(vectors)
        ]
        total = sum(map(len, prompts))
        usage = {"prompt_tokens": total, "total_tokens": total}
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

    async def _read(
        self,
        request: Request,
        read: Callable[[object], Asked],
        check: Callable[[RequestBody], None] = lambda _: None,
    ) -> tuple[int, Asked]:
        """Returns the body's bytes, and what `read` makes of it after `check`, on a thread. Raises InvalidRequest and
        ModelNotFound."""
        body = known_body(request.scope) or RequestBody(await request.body())
        size = len(body.content)

        def reading() -> Asked:
            check(body)
            return read(decode_body(body.content, lambda: body.census))

        asked = await self._workers.run(size, reading)
        self._generator.adapter_name(asked.model)
        return size, asked
