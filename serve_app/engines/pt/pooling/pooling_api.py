"""Builds the ASGI application of a model that makes vectors or scores. Its endpoints are those of vLLM 0.32."""

import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve_app.engines.pt.api.answer_writer import json_response
from serve_app.engines.pt.api.error_handlers import EXCEPTION_HANDLERS, guarded, key_name
from serve_app.engines.pt.api.protocol import Body
from serve_app.engines.pt.pooling.answers import (
    check_dimensions,
    embeddings,
    ranking,
    score_of,
    scores,
    shaped,
    similarities,
)
from serve_app.engines.pt.pooling.inputs import Input
from serve_app.engines.pt.pooling.loop import Vector
from serve_app.engines.pt.pooling.openapi import openapi_document
from serve_app.engines.pt.pooling.pooler import Pooler
from serve_app.engines.pt.pooling.protocol import (
    MOST_TEXTS,
    DetokenizeTextRequest,
    EmbedRequest,
    PairsBody,
    RerankRequest,
    ScoreRequest,
    TokenizeTextRequest,
)
from serve_app.engines.pt.pooling.texts import Cut, InputMaker
from serve_app.engines.workers import Workers
from serve_app.errors import EngineError, InvalidRequest, ModelNotFound, ModelUnavailable
from serve_app.facts.pooling import ENDPOINTS
from serve_app.wire.arrival import known_body
from serve_app.wire.body import RequestBody
from serve_app.wire.census import decode_body
from serve_app.wire.headers import header

Asked = TypeVar("Asked", bound=Body)

# What these models do not do, in vLLM's words for it.
ELSEWHERE = {
    "/v1/chat/completions": "Chat Completions",
    "/v1/completions": "Completions",
    "/v1/responses": "Responses",
    "/v1/messages": "Messages",
    "/v1/messages/count_tokens": "Messages",
}
SCORE_PATHS, RERANK_PATHS = ("/score", "/v1/score"), ("/rerank", "/v1/rerank", "/v2/rerank")


def build_app(pooler: Pooler) -> Starlette:
    """Returns the application around a running model."""
    endpoints = _Endpoints(pooler)
    served = {
        "/v1/embeddings": endpoints.embed,
        **dict.fromkeys(SCORE_PATHS, endpoints.score),
        **dict.fromkeys(RERANK_PATHS, endpoints.rerank),
        "/tokenize": endpoints.tokenize,
        "/detokenize": endpoints.detokenize,
        **{path: endpoints.refuse(name) for path, name in ELSEWHERE.items()},
    }
    if pooler.loaded.pooling.task == "classify":
        served["/v1/embeddings"] = endpoints.refuse("Embeddings")
    return Starlette(
        routes=[
            *(Route(path, guarded(endpoint), methods=["POST"]) for path, endpoint in served.items()),
            Route("/v1/models", endpoints.models),
            Route("/health", endpoints.health),
            Route("/load", endpoints.load),
            Route("/openapi.json", endpoints.openapi),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
    )


class _Endpoints:
    def __init__(self, pooler: Pooler):
        self._pooler, self._pooling = pooler, pooler.loaded.pooling
        self._inputs = InputMaker(pooler.loaded)
        self._workers = Workers()
        self._created = int(time.time())

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings answers with a vector for each input."""
        size, asked = await self._read(request, EmbedRequest.read)
        items, prompt = asked.items(), self._prompt(asked)
        if not items or not all(items):
            raise InvalidRequest("'input' is empty.", param="input")
        _require_few(len(items), "input")
        check_dimensions(asked.dimensions, self._pooling, self._pooler.loaded.vector_size, self._pooler.name)
        cut, owner = Cut.of(asked, asked.add_special_tokens), _owner(request)
        normalizes = self._pooling.normalizes if asked.use_activation is None else asked.use_activation
        with self._pooler.reserve(len(items)):
            made = partial(self._inputs.of_texts, items, cut, owner, size, "input", prompt)
            inputs = await self._workers.run(size, made)
            found = await self._pooler.compute(inputs)

        def answer() -> bytes:
            vectors = [shaped(vector, asked.dimensions, normalizes) for vector in found]
            return embeddings(asked, vectors, self._head(request, "embd", inputs))

        return json_response(await self._workers.write(_answer_bytes(size, found), answer))

    async def score(self, request: Request) -> Response:
        """POST /score answers with a score for each pair of texts."""
        size, asked = await self._read(request, ScoreRequest.read)
        inputs, values = await self._scored(request, size, asked, *asked.sides())
        head = self._head(request, "score", inputs)
        return json_response(await self._workers.write(size, lambda: scores(values, head)))

    async def rerank(self, request: Request) -> Response:
        """POST /rerank answers with the documents in the order of their scores."""
        size, asked = await self._read(request, RerankRequest.read)
        queries, documents = asked.sides()
        inputs, values = await self._scored(request, size, asked, queries, documents)
        head = self._head(request, "score", inputs)
        del head["created"]
        head["usage"] = {name: head["usage"][name] for name in ("prompt_tokens", "total_tokens")}
        return json_response(await self._workers.write(size, lambda: ranking(asked, documents, values, head)))

    async def _scored(
        self, request: Request, size: int, asked: PairsBody, firsts: list[str], seconds: list[str]
    ) -> tuple[Sequence[Input], list[float]]:
        """Returns the inputs that were computed, and the score of each pair."""
        if len(firsts) > 1 and len(firsts) != len(seconds):
            raise InvalidRequest("Input lengths must be either 1:1, 1:N or N:N")
        if not firsts:
            raise InvalidRequest("At least one text element must be given")
        if not seconds:
            raise InvalidRequest("At least one text_pair element must be given")
        _require_few(len(seconds), "documents")
        scored = self._by_classifier if self._pooling.task == "classify" else self._by_vectors
        return await scored(_owner(request), size, asked, firsts, seconds)

    async def _by_classifier(
        self, owner: object, size: int, asked: PairsBody, firsts: list[str], seconds: list[str]
    ) -> tuple[Sequence[Input], list[float]]:
        several = firsts * len(seconds) if len(firsts) == 1 else firsts
        pairs = list(zip(several, seconds, strict=True))
        limits = (asked.max_tokens_per_query, asked.max_tokens_per_doc)
        variables = asked.template_variables
        with self._pooler.reserve(len(pairs)):
            work = size * _share(firsts, seconds)  # It says which tokenizer is held, and for how long.
            made = partial(self._inputs.of_pairs, pairs, Cut.of(asked), owner, work, limits, variables)
            inputs = await self._workers.run(work, made)
            found = await self._pooler.compute(inputs)
        return inputs, [score_of(float(logit[0]), self._pooling, asked.use_activation) for logit in found]

    async def _by_vectors(
        self, owner: object, size: int, asked: PairsBody, firsts: list[str], seconds: list[str]
    ) -> tuple[Sequence[Input], list[float]]:
        limits = (asked.max_tokens_per_query, asked.max_tokens_per_doc)
        if asked.template_variables:
            raise InvalidRequest(
                "'instruction' and 'chat_template_kwargs' are for models that read pairs of texts. This one compares "
                "vectors, so put the instruction before each text.",
                param="instruction",
            )
        self._inputs.check_limits(limits)
        prompt = self._pooling.prompts.get(self._pooling.default_prompt or "", "")

        def made() -> list[Input]:
            texts = [
                text for side, most in zip((firsts, seconds), limits, strict=True)
                for text in self._inputs.shortened(side, most, size)
            ]  # fmt: skip
            return self._inputs.of_texts(texts, Cut.of(asked), owner, size, "documents", prompt)

        with self._pooler.reserve(len(firsts) + len(seconds)):
            inputs = await self._workers.run(size, made)
            found = await self._pooler.compute(inputs)
        count = len(firsts)
        compared: Callable[[], list[float]] = lambda: similarities(found[:count], found[count:])  # noqa: E731
        return inputs, await self._workers.write(_answer_bytes(size, found), compared)

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize answers with the token ids of a text, as vLLM does."""
        size, asked = await self._read(request, TokenizeTextRequest.read)

        def answer() -> bytes:
            ids = self._inputs.ids_of(asked.prompt, asked.add_special_tokens, size)
            return msgspec.json.encode({"count": len(ids), "max_model_len": self._inputs.max_model_len, "tokens": ids})

        return json_response(await self._workers.run(size, answer))

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize answers with the text of token ids, as vLLM does."""
        size, asked = await self._read(request, DetokenizeTextRequest.read)

        def answer() -> bytes:
            return msgspec.json.encode({"prompt": self._inputs.text_of(asked.tokens, size)})

        return json_response(await self._workers.run(size, answer))

    def refuse(self, api: str) -> Callable[[Request], Any]:
        """Returns an endpoint that says what the model does instead."""

        async def refused(_: Request) -> Response:
            served = ", ".join(ENDPOINTS[self._pooling.task])
            raise InvalidRequest(
                f"The model does not support {api} API. '{self._pooler.name}' is "
                f"{self._pooling.names_what_it_does}, which answers {served}.",
                param="model",
            )

        return refused

    async def models(self, _: Request) -> Response:
        """GET /v1/models lists the one model."""
        entry = {
            "id": self._pooler.name, "object": "model", "created": self._created, "owned_by": "serve-app",
            "max_model_len": self._inputs.max_model_len, "task": self._pooling.task,
        }  # fmt: skip
        return JSONResponse({"object": "list", "data": [entry]})

    async def load(self, _: Request) -> Response:
        """GET /load counts the inputs that are computed or wait, as vLLM does."""
        return JSONResponse({"server_load": self._pooler.in_flight})

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json answers with the OpenAPI document."""
        return JSONResponse(openapi_document(self._pooling.task))

    async def health(self, _: Request) -> Response:
        """GET /health answers 200 while the engine can answer."""
        self._require_alive()
        reason = self._pooler.loaded.alone
        return JSONResponse({"status": "ok"} | ({"one_input_at_a_time": reason} if reason else {}))

    def _require_alive(self) -> None:
        try:
            self._pooler.require_alive()
        except EngineError as error:
            raise ModelUnavailable(str(error), retry_after_s=5.0) from None

    def _prompt(self, asked: EmbedRequest) -> str:
        """Returns the text that comes before each input. Raises InvalidRequest for a name that the model lacks."""
        prompts, name = self._pooling.prompts, asked.prompt_name
        if name is None:
            return prompts.get(self._pooling.default_prompt or "", "")
        if name and name not in prompts:
            known = ", ".join(prompts) or "none"
            raise InvalidRequest(f"'prompt_name': the model has no such prompt. It has: {known}.", param="prompt_name")
        return prompts.get(name, "")

    def _head(self, request: Request, prefix: str, inputs: Sequence[Input]) -> dict[str, Any]:
        """Returns what all answers begin with. The id is made of the request's own, as with vLLM."""
        own = header(request.scope["headers"], b"x-request-id")
        total = sum(map(len, inputs))
        return {
            "id": f"{prefix}-{uuid.uuid4().hex if own is None else own.decode('latin-1')}",
            "created": int(time.time()), "model": self._pooler.name,
            "usage": {
                "prompt_tokens": total, "total_tokens": total, "completion_tokens": 0, "prompt_tokens_details": None,
            },
        }  # fmt: skip

    async def _read(self, request: Request, read: Callable[[object], Asked]) -> tuple[int, Asked]:
        """Returns the body's bytes, and what `read` makes of it, on a thread. Raises InvalidRequest and
        ModelNotFound."""
        body = known_body(request.scope) or RequestBody(await request.body())
        size = len(body.content)
        asked = await self._workers.run(size, lambda: read(decode_body(body.content, lambda: body.census)))
        if asked.model not in (None, self._pooler.name):
            raise ModelNotFound(f"This route serves '{self._pooler.name}', not '{asked.model}'.", param="model")
        self._require_alive()
        return size, asked


def _owner(request: Request) -> object:
    """Returns whose inputs take turns: those of the request's key, or of the request if it has none."""
    return key_name(request) or object()


def _share(firsts: Sequence[str], seconds: Sequence[str]) -> int:
    """Returns how many times the texts of a request are read, because a single one is read with each other one."""
    return max(1, len(seconds) // len(firsts)) if len(firsts[0]) > 256 else 1


def _answer_bytes(size: int, found: Sequence[Vector]) -> int:
    """Returns the size of the larger of a request and its answer, in which a number takes some 20 bytes."""
    return max(size, 20 * sum(vector.size for vector in found))


def _require_few(count: int, name: str) -> None:
    if count > MOST_TEXTS:
        raise InvalidRequest(
            f"'{name}' has {count} texts, but a request has at most {MOST_TEXTS}. Send several requests.", param=name
        )
