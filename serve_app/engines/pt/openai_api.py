"""The pt engine's ASGI application: OpenAI's chat and text completions, whole and streamed."""

import asyncio
import inspect
import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from serve_app.engines.openai_errors import error_object, error_response, read_json
from serve_app.engines.pt.embedding import embed
from serve_app.engines.pt.job import CHAT, TEXT, Job, Shape
from serve_app.engines.pt.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from serve_app.engines.pt.sequence import Logprobs, Piece, SamplingParams
from serve_app.errors import ContextTooLong, EngineError, InvalidRequest, ModelNotFound, ModelUnavailable, RequestError

if TYPE_CHECKING:
    from serve_app.engines.pt.engine import PtEngine

# Arguments of `apply_chat_template` itself, which a client must not reach through the template's variables.
TEMPLATE_METHOD_ARGUMENTS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)

# What OpenAI's completions endpoint generates when the request does not say.
DEFAULT_COMPLETION_TOKENS = 16


def build_app(engine: "PtEngine") -> Starlette:
    """The application around a started engine."""
    endpoints = _Endpoints(engine)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/completions", endpoints.complete, methods=["POST"]),
            Route("/v1/embeddings", endpoints.embed, methods=["POST"]),
            Route("/tokenize", endpoints.tokenize, methods=["POST"]),
            Route("/detokenize", endpoints.detokenize, methods=["POST"]),
            Route("/v1/models", endpoints.models),
            Route("/health", endpoints.health),
        ],
        exception_handlers={RequestError: _refuse, HTTPException: _no_such_route, Exception: _refuse},
    )


class _Endpoints:
    def __init__(self, engine: "PtEngine"):
        self._engine = engine
        self._created = int(time.time())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = ChatRequest.read(await _json(request))
        self._check_model(asked.model)
        prompt = await asyncio.to_thread(self._apply_template, asked)
        return await self._answer(asked, [prompt], CHAT, default_tokens=None)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = CompletionRequest.read(await _json(request))
        self._check_model(asked.model)
        prompts = await asyncio.to_thread(self._tokenize, asked)
        return await self._answer(asked, prompts, TEXT, default_tokens=DEFAULT_COMPLETION_TOKENS)

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings: the mean of the last hidden states over the text's tokens, scaled to length 1."""
        asked = EmbeddingRequest.read(await _json(request))
        self._check_model(asked.model)
        prompts = await asyncio.to_thread(self._tokenize, asked)
        if (longest := max(map(len, prompts))) > self._engine.max_tokens_per_request:
            raise ContextTooLong(
                f"This model's maximum context length is {self._engine.max_tokens_per_request} tokens. However, the "
                f"input has {longest}.",
                param="input",
            )
        loaded = self._engine.loaded
        vectors = [
            await self._engine.run_on_model(partial(embed, loaded.model, loaded.input_device, ids)) for ids in prompts
        ]
        total = sum(map(len, prompts))
        data = [
            {"object": "embedding", "index": index, "embedding": asked.encode(vector)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": total, "total_tokens": total}
        return JSONResponse({"object": "list", "data": data, "model": self._engine.name, "usage": usage})

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize, as vLLM has it: of a prompt, or of messages through the chat template."""
        body = await _json(request)
        if isinstance(body, dict) and "messages" in body:
            asked = ChatRequest.read(body)
            ids = await asyncio.to_thread(self._apply_template, asked)
        else:
            read = TokenizeRequest.read(body)
            tokenizer = self._engine.loaded.tokenizer
            asked = read  # type: ignore[assignment]
            ids = tokenizer.encode(read.prompt, add_special_tokens=read.add_special_tokens)
        self._check_model(asked.model)
        return JSONResponse({"count": len(ids), "max_model_len": self._engine.max_tokens_per_request, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize, as vLLM has it."""
        asked = DetokenizeRequest.read(await _json(request))
        self._check_model(asked.model)
        self._check_ids(asked.tokens, "tokens")
        return JSONResponse({"prompt": self._engine.loaded.tokenizer.decode(asked.tokens)})

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        entry = {
            "id": self._engine.name,
            "object": "model",
            "created": self._created,
            "owned_by": "serve-app",
            "max_model_len": self._engine.max_tokens_per_request,
            "batching": not self._engine.serial_reason,
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(self, _: Request) -> Response:
        """200 while the engine can answer."""
        await self._require_alive()
        reason = self._engine.serial_reason
        return JSONResponse({"status": "ok"} | ({"one_request_at_a_time": reason} if reason else {}))

    async def _require_alive(self) -> None:
        try:
            await self._engine.check_health()
        except EngineError as error:
            raise ModelUnavailable(str(error), retry_after_s=5.0) from None

    async def _answer(
        self, asked: ChatRequest | CompletionRequest, prompts: list[list[int]], shape: Shape, default_tokens: int | None
    ) -> Response:
        max_tokens = self._max_tokens(asked.limit, max(map(len, prompts)), default_tokens)
        self._check_ids(list(asked.logit_bias or {}), "logit_bias")
        params = asked.sampling(max_tokens, self._engine.loaded.model.generation_config)
        job = Job(asked, prompts, params, shape)
        await self._require_alive()
        self._engine.require_place(len(job.choices))
        if asked.stream:
            return StreamingResponse(self._stream(job), media_type="text/event-stream")
        return await self._whole(job)

    async def _whole(self, job: Job) -> Response:
        texts = self._openings(job)
        logprobs: list[list[Logprobs]] = [[] for _ in texts]
        last: dict[int, Piece] = {}
        async with aclosing(self._pieces(job)) as pieces:
            async for index, piece in pieces:
                texts[index] += piece.text
                logprobs[index] += piece.logprobs
                last[index] = piece
        choices = [
            {
                "index": index,
                **job.shape.whole(text),
                "logprobs": self._logprobs(job, logprobs[index]),
                "finish_reason": last[index].finish_reason,
            }
            for index, text in enumerate(texts)
        ]
        head = self._head(job, job.shape.whole_object)
        return JSONResponse(head | {"choices": choices, "usage": _usage(job, last)})

    async def _stream(self, job: Job) -> AsyncGenerator[bytes]:
        head = self._head(job, job.shape.chunk_object)
        usage = {"usage": None} if job.request.include_usage else {}
        last: dict[int, Piece] = {}
        try:
            for index, text in enumerate(self._openings(job)):
                if job.shape.opening is not None or text:
                    opening = job.shape.opening or {**job.shape.delta(text), "logprobs": None}
                    yield _event(head | {"choices": [{"index": index, **opening, "finish_reason": None}]} | usage)
            async with aclosing(self._pieces(job)) as pieces:
                async for index, piece in pieces:
                    last[index] = piece
                    choice = {
                        "index": index,
                        **job.shape.delta(piece.text),
                        "logprobs": self._logprobs(job, list(piece.logprobs)),
                        "finish_reason": piece.finish_reason,
                    }
                    yield _event(head | {"choices": [choice]} | usage)
            if job.request.include_usage:
                yield _event(head | {"choices": [], "usage": _usage(job, last)})
            yield b"data: [DONE]\n\n"
        except Exception as error:
            # The head is out, so the status can tell nothing any more: an error event ends the stream.
            yield _event(error_object(_request_error(error)))

    async def _pieces(self, job: Job) -> AsyncGenerator[tuple[int, Piece]]:
        """The pieces of all choices as they come, each with its choice's index."""
        arrived: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue()

        async def follow(index: int, prompt: list[int], params: SamplingParams) -> None:
            try:
                async with aclosing(self._engine.generate(prompt, params, job.request.stop_strings)) as pieces:
                    async for piece in pieces:
                        arrived.put_nowait((index, piece))
            except Exception as error:
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(follow(index, *choice)) for index, choice in enumerate(job.choices)]
        try:
            unfinished = len(tasks)
            while unfinished:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise _request_error(item) from item
                unfinished -= item[1].finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _openings(self, job: Job) -> list[str]:
        """The text that each choice begins with: the prompt, where it is to be echoed."""
        if not (isinstance(job.request, CompletionRequest) and job.request.echo):
            return ["" for _ in job.choices]
        tokenizer = self._engine.loaded.tokenizer
        return [tokenizer.decode(prompt, skip_special_tokens=True) for prompt, _ in job.choices]

    def _logprobs(self, job: Job, logprobs: list[Logprobs]) -> Any:
        if job.params.logprobs is None or not logprobs:
            return None
        return job.shape.logprobs(logprobs, self._engine.loaded.tokenizer)

    def _head(self, job: Job, kind: str) -> dict[str, Any]:
        number = uuid.uuid4().hex
        return {
            "id": job.shape.id_prefix + number,
            "object": kind,
            "created": int(time.time()),
            "model": self._engine.name,
        }

    @property
    def _vocabulary(self) -> int:
        size: int = self._engine.loaded.model.get_input_embeddings().num_embeddings
        return size

    def _check_model(self, model: str | None) -> None:
        if model not in (None, self._engine.name):
            raise ModelNotFound(f"This route serves '{self._engine.name}', not '{model}'.", param="model")

    def _apply_template(self, asked: ChatRequest) -> list[int]:
        tokenizer = self._engine.loaded.tokenizer
        for name in asked.chat_template_kwargs:
            if name in TEMPLATE_METHOD_ARGUMENTS:
                raise InvalidRequest(
                    f"'chat_template_kwargs.{name}' is not a variable of the template.", param="chat_template_kwargs"
                )
        conversation = asked.conversation()
        self._check_characters(sum(len(message["content"] or "") for message in conversation), "messages")
        if tokenizer.chat_template is None:
            raise InvalidRequest(
                "This model has no chat template. Use /v1/completions, or set chat_template in its config.",
                param="messages",
            )
        try:
            ids: list[int] = tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=asked.add_generation_prompt and not asked.continue_final_message,
                continue_final_message=asked.continue_final_message,
                return_dict=False,
                **asked.chat_template_kwargs,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(f"The chat template refuses these messages: {error}", param="messages") from error
        self._check_ids(ids, "messages")
        return ids

    def _tokenize(self, asked: CompletionRequest | EmbeddingRequest) -> list[list[int]]:
        tokenizer, name = self._engine.loaded.tokenizer, asked.prompt_field
        for item in asked.prompts():
            self._check_characters(len(item) if isinstance(item, str) else 0, name)
        prompts = [tokenizer.encode(item) if isinstance(item, str) else list(item) for item in asked.prompts()]
        if not prompts or not all(prompts):
            raise InvalidRequest(f"'{name}' is empty.", param=name)
        for ids in prompts:
            self._check_ids(ids, name)
        return prompts

    def _check_characters(self, count: int, name: str) -> None:
        """Refuses a text that cannot fit before it is tokenised, which takes a second per megabyte."""
        most = self._engine.max_tokens_per_request * self._engine.longest_token
        if count > most:
            raise ContextTooLong(
                f"'{name}' has {count} characters; {self._engine.max_tokens_per_request} tokens, this model's maximum "
                f"context length, hold at most {most}.",
                param=name,
            )

    def _check_ids(self, ids: list[int], name: str) -> None:
        vocabulary = self._vocabulary
        wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise InvalidRequest(f"'{name}': token id {wrong} is outside the vocabulary of {vocabulary}.", param=name)

    def _max_tokens(self, asked: int | None, prompt_tokens: int, default: int | None) -> int:
        context = self._engine.max_tokens_per_request
        room = context - prompt_tokens
        wanted = asked if asked is not None else min(default, max(1, room)) if default is not None else max(1, room)
        if wanted > room:
            raise ContextTooLong(
                f"This model's maximum context length is {context} tokens. However, you requested "
                f"{prompt_tokens + wanted} tokens ({prompt_tokens} in the prompt, {wanted} in the completion).",
                param="max_tokens" if prompt_tokens < context else None,
            )
        return wanted


def _usage(job: Job, last: dict[int, Piece]) -> dict[str, int]:
    generated = sum(piece.tokens for piece in last.values())
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


async def _json(request: Request) -> object:
    try:
        return read_json(await request.body())
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None


async def _refuse(_: Request, error: Exception) -> Response:
    return error_response(_request_error(error))


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(InvalidRequest(f"{request.method} {request.url.path}: {error.detail}."))
    response.status_code = error.status_code
    return response
