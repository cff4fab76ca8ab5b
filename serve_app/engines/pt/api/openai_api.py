"""The pt engine's ASGI application: OpenAI's chat and text completions, whole and streamed."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from serve_app.engines.pt.api.job import CHAT, TEXT, ChoiceProgress, Job, Part, Shape, WholeChoice
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
from serve_app.engines.pt.api.tool_calls import (
    CallListReader,
    Delta,
    MessageReader,
    NamedCallReader,
    PlainReader,
    TemplateReader,
    response_template,
)
from serve_app.engines.pt.core.places import Reservation
from serve_app.engines.pt.core.sequence import Logprobs, SamplingParams
from serve_app.engines.pt.generator import Generator
from serve_app.engines.workers import SMALL_BYTES, Workers
from serve_app.errors import ContextTooLong, EngineError, InvalidRequest, ModelNotFound, ModelUnavailable, RequestError
from serve_app.wire.asgi import KEY_NAME_HEADER
from serve_app.wire.body import header
from serve_app.wire.census import decode_body
from serve_app.wire.openai_errors import error_object, error_response

logger = logging.getLogger("ray.serve")

Endpoint = Callable[[Request], Awaitable[Response]]
Asked = TypeVar("Asked", bound=Body)

# What OpenAI's completions endpoint generates when the request does not say.
DEFAULT_COMPLETION_TOKENS = 16


def build_app(generator: Generator) -> Starlette:
    """The application around a running model."""
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
        exception_handlers={RequestError: _refuse, HTTPException: _no_such_route, Exception: _unexpected},
    )


class _Endpoints:
    def __init__(self, generator: Generator):
        self._generator = generator
        self._prompts = Prompts(generator)
        self._workers = Workers()
        self._created = int(time.time())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        size, asked = await self._read(request, ChatRequest.read)
        key = _key_name(request)
        return await self._answer(size, asked, key, CHAT, None, lambda: [self._prompts.of_chat(asked)])

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        size, asked = await self._read(request, CompletionRequest.read)
        key, tokens = _key_name(request), DEFAULT_COMPLETION_TOKENS
        return await self._answer(size, asked, key, TEXT, tokens, lambda: self._prompts.of_texts(asked))

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings: the mean of the last hidden states over the text's tokens, scaled to length 1."""
        size, asked = await self._read(request, EmbeddingRequest.read)
        self._require_alive()
        with self._generator.reserve(asked.sequences) as places:
            prompts = await self._workers.run(size, partial(self._prompts.of_texts, asked))
            longest, most = max(map(len, prompts)), self._generator.max_tokens_per_request
            if longest > most:
                raise ContextTooLong(
                    f"This model's maximum context length is {most} tokens. However, the input has {longest}.",
                    param="input",
                )
            vectors = await self._vectors(prompts, places)
        return _json_response(await self._workers.run(size, lambda: self._write_vectors(asked, prompts, vectors)))

    async def _vectors(self, prompts: list[list[int]], places: Reservation) -> list[list[float]]:
        """Of all prompts, or the first error; then the others end too."""
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
        return msgspec.json.encode({"object": "list", "data": data, "model": self._generator.name, "usage": usage})

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize, as vLLM has it: of a prompt, or of messages through the chat template."""

        def answer(asked: ChatRequest | TokenizeRequest) -> bytes:
            ids = self._prompts.of_chat(asked) if isinstance(asked, ChatRequest) else self._prompts.of_text(asked)
            most = self._generator.max_tokens_per_request
            return msgspec.json.encode({"count": len(ids), "max_model_len": most, "tokens": ids})

        size, asked = await self._read(request, read_tokenize)
        return _json_response(await self._workers.run(size, partial(answer, asked)))

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize, as vLLM has it."""

        def answer(asked: DetokenizeRequest) -> bytes:
            return msgspec.json.encode({"prompt": self._prompts.text_of(asked)})

        size, asked = await self._read(request, DetokenizeRequest.read)
        return _json_response(await self._workers.run(size, partial(answer, asked)))

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        entry = {
            "id": self._generator.name,
            "object": "model",
            "created": self._created,
            "owned_by": "serve-app",
            "max_model_len": self._generator.max_tokens_per_request,
            "batching": not self._generator.serial_reason,
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def load(self, _: Request) -> Response:
        """GET /load, as vLLM has it: requests that run or wait."""
        return JSONResponse({"server_load": self._generator.in_flight})

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json."""
        return JSONResponse(openapi_document())

    async def health(self, _: Request) -> Response:
        """200 while the engine can answer."""
        self._require_alive()
        reason = self._generator.serial_reason
        return JSONResponse({"status": "ok"} | ({"one_request_at_a_time": reason} if reason else {}))

    def _require_alive(self) -> None:
        try:
            self._generator.require_alive()
        except EngineError as error:
            raise ModelUnavailable(str(error), retry_after_s=5.0) from None

    async def _read(self, request: Request, read: Callable[[object], Asked]) -> tuple[int, Asked]:
        """The body's bytes, and what `read` makes of it, on a thread. Raises InvalidRequest and ModelNotFound."""
        body = await request.body()
        asked = await self._workers.run(len(body), lambda: read(decode_body(body)))
        if asked.model not in (None, self._generator.name):
            raise ModelNotFound(f"This route serves '{self._generator.name}', not '{asked.model}'.", param="model")
        return len(body), asked

    async def _answer(
        self,
        size: int,
        asked: ChatRequest | CompletionRequest,
        key: str | None,
        shape: Shape,
        default_tokens: int | None,
        tokenize: Callable[[], list[list[int]]],
    ) -> Response:
        """Takes the places first: nothing is built for sequences that the model cannot take."""
        self._require_alive()
        with ExitStack() as stack:
            places = stack.enter_context(self._generator.reserve(asked.sequences))
            job = await self._workers.run(size, lambda: self._job(asked, shape, default_tokens, tokenize()))
            if asked.grammar is not None:
                grammars = await asyncio.to_thread(lambda: self._generator.grammars)
                grammar = await grammars.compile_soon(asked.grammar, key)
                job = replace(job, params=replace(job.params, grammar=grammar))
            if asked.stream:
                return _EventStream(self._stream(job, places), stack.pop_all())
            return await self._whole(job, places)

    def _job(
        self,
        asked: ChatRequest | CompletionRequest,
        shape: Shape,
        default_tokens: int | None,
        prompts: list[list[int]],
    ) -> Job:
        """The request as far as it can be prepared without the model. Takes time: not for the event loop."""
        max_tokens = self._prompts.max_tokens(asked.limit, max(map(len, prompts)), default_tokens)
        self._prompts.check_ids(list(asked.logit_bias or {}), "logit_bias")
        params = asked.sampling(max_tokens, self._generator.loaded.model.generation_config)
        readers = [reader for prompt in prompts for reader in self._readers(asked, prompt)]
        return Job(asked, prompts, params, shape, readers, self._openings(asked, prompts))

    async def _whole(self, job: Job, places: Reservation) -> Response:
        answers = [WholeChoice(text) for text in job.openings]
        async with aclosing(self._pieces(job, places)) as pieces:
            async for index, part in pieces:
                answers[index].add(part)
        if sum(answer.size for answer in answers) <= SMALL_BYTES:
            return _json_response(self._write(job, answers))
        return _json_response(await self._workers.run(SMALL_BYTES + 1, partial(self._write, job, answers)))

    def _write(self, job: Job, answers: Sequence[WholeChoice]) -> bytes:
        """The whole answer as JSON, one choice after the other, so that no step is long."""
        choices = [
            msgspec.json.encode(
                {
                    "index": index,
                    **job.shape.whole(answer.delta),
                    "logprobs": self._logprobs(job, answer.logprobs),
                    "finish_reason": answer.finish_reason(job),
                }
            )
            for index, answer in enumerate(answers)
        ]
        head = msgspec.json.encode(self._head(job, job.shape.whole_object))
        usage = msgspec.json.encode(_usage(job, answers))
        return head[:-1] + b',"choices":[' + b",".join(choices) + b'],"usage":' + usage + b"}"

    async def _stream(self, job: Job, places: Reservation) -> AsyncGenerator[bytes]:
        head = self._head(job, job.shape.chunk_object)
        usage = {"usage": None} if job.request.include_usage else {}
        answers = [ChoiceProgress() for _ in job.choices]
        try:
            for index, text in enumerate(job.openings):
                if job.shape.opening is not None or text:
                    opening = job.shape.opening or {**job.shape.delta(Delta(text)), "logprobs": None}
                    yield _event(head | {"choices": [{"index": index, **opening, "finish_reason": None}]} | usage)
            async with aclosing(self._pieces(job, places)) as pieces:
                async for index, part in pieces:
                    start = answers[index].characters
                    answers[index].add(part)
                    if part.is_empty:
                        continue
                    choice = {
                        "index": index,
                        **job.shape.delta(part.delta),
                        "logprobs": self._logprobs(job, part.piece.logprobs, start),
                        "finish_reason": answers[index].finish_reason(job),
                    }
                    yield _event(head | {"choices": [choice]} | usage)
            if job.request.include_usage:
                yield _event(head | {"choices": [], "usage": _usage(job, answers)})
            yield b"data: [DONE]\n\n"
        except Exception as error:
            # The head is out, so the status can tell nothing any more: an error event ends the stream.
            yield _event(error_object(_request_error(error)))

    async def _pieces(self, job: Job, places: Reservation) -> AsyncGenerator[tuple[int, Part]]:
        """The parts of all choices as they come, each with its choice's index."""
        arrived: asyncio.Queue[tuple[int, Part] | Exception] = asyncio.Queue()
        owner = object()

        async def follow(index: int, prompt: list[int], params: SamplingParams) -> None:
            reader = job.readers[index]
            try:
                text = self._generator.generate(
                    prompt, params, job.request.stop_strings, not reader.needs_special_tokens, places, owner
                )
                async with aclosing(text) as pieces:
                    async for piece in pieces:
                        arrived.put_nowait((index, Part.read(piece, reader)))
            except Exception as error:
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(follow(index, *choice)) for index, choice in enumerate(job.choices)]
        try:
            unfinished = len(tasks)
            while unfinished:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise _request_error(item) from item
                unfinished -= item[1].piece.finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _openings(self, asked: ChatRequest | CompletionRequest, prompts: list[list[int]]) -> list[str]:
        """The text that each choice begins with: the prompt, where it is to be echoed."""
        if not (isinstance(asked, CompletionRequest) and asked.echo):
            return [""] * asked.sequences
        decode = self._generator.loaded.tokenizer.decode
        texts = [decode(prompt, skip_special_tokens=True) for prompt in prompts]
        return [text for text in texts for _ in range(asked.choices)]

    def _readers(self, asked: ChatRequest | CompletionRequest, prompt: list[int]) -> list[MessageReader]:
        """What tells tool calls from text, for each choice of a prompt. Raises InvalidRequest where nothing can."""
        choices = range(asked.choices)
        if not isinstance(asked, ChatRequest) or not asked.offered_tools:
            return [PlainReader() for _ in choices]
        if asked.named_tool is not None:
            return [NamedCallReader(asked.named_tool) for _ in choices]
        if asked.tool_choice == "required":
            return [CallListReader() for _ in choices]
        tokenizer = self._generator.loaded.tokenizer
        template = response_template(tokenizer)
        if template is None:
            raise InvalidRequest(
                "tool_choice 'auto' needs a model whose tokenizer has a response_template, or a chat template with "
                "<tool_call>. With 'required' or a named function, or with 'none', this model can be used.",
                param="tool_choice",
            )
        text = tokenizer.decode(prompt)
        return [TemplateReader(tokenizer, template, text, asked.offered_tools, asked.parallel) for _ in choices]

    def _logprobs(self, job: Job, logprobs: Sequence[Logprobs], start: int = 0) -> Any:
        if job.params.logprobs is None or not logprobs:
            return None
        return job.shape.logprobs(list(logprobs), self._generator.loaded.tokenizer, start)

    def _head(self, job: Job, kind: str) -> dict[str, Any]:
        number = uuid.uuid4().hex
        return {
            "id": job.shape.id_prefix + number,
            "object": kind,
            "created": int(time.time()),
            "model": self._generator.name,
        }


class _EventStream(StreamingResponse):
    """A stream of events that holds `places` until it has ended, or was given up, whichever way."""

    def __init__(self, events: AsyncGenerator[bytes], places: AbstractContextManager[Any]):
        super().__init__(events, media_type="text/event-stream")
        self._events = events
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._places:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)


def _key_name(request: Request) -> str | None:
    """The name of the key that the request came with."""
    name = header(request.scope["headers"], KEY_NAME_HEADER)
    return None if name is None else name.decode("latin-1")


def _usage(job: Job, answers: Sequence[ChoiceProgress]) -> dict[str, int]:
    generated = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": job.prompt_tokens + generated,
    }


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineError):
        return ModelUnavailable(str(error), retry_after_s=5.0)
    return RequestError(f"The engine failed on this request: {type(error).__name__}: {error}")


def _json_response(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _guarded(endpoint: Endpoint) -> Endpoint:
    """The endpoint with an answer for every error.

    Starlette raises an unexpected error again once its handler has answered, and the server then cuts the connection
    under the client's next request.
    """

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:
            if not isinstance(error, RequestError):
                logger.exception("A request failed.")
            return error_response(_request_error(error))

    return guarded


async def _refuse(_: Request, error: Exception) -> Response:
    return error_response(_request_error(error))


async def _unexpected(_: Request, error: Exception) -> Response:
    """As JSON: plain text is what Serve says in a replica's place, and the router would ask another one."""
    return error_response(RequestError(f"The pt engine failed: {type(error).__name__}: {error}"))


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(InvalidRequest(f"{request.method} {request.url.path}: {error.detail}."))
    response.status_code = error.status_code
    return response
