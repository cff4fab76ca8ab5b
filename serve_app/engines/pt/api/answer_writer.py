"""Writes the answers of chat and text completions, either whole or as a stream of events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve_app.engines.pt.api.job import ChoiceProgress, Job, Shape, WholeChoice, is_nothing
from serve_app.engines.pt.api.job_builder import JobBuilder
from serve_app.engines.pt.api.protocol import ChatRequest, CompletionRequest
from serve_app.engines.pt.api.request_error import request_error
from serve_app.engines.pt.api.tool_calls import Delta
from serve_app.engines.pt.core.places import Reservation
from serve_app.engines.pt.core.sequence import Logprobs, Piece
from serve_app.engines.pt.generator import Generator
from serve_app.engines.workers import SMALL_BYTES, Workers
from serve_app.wire.openai_errors import error_object


class AnswerWriter:
    """Has jobs generated, and writes their results as answers."""

    def __init__(self, generator: Generator, builder: JobBuilder, workers: Workers):
        self._generator = generator
        self._builder = builder
        self._workers = workers

    async def answer(
        self,
        size: int,
        asked: ChatRequest | CompletionRequest,
        key: str | None,
        shape: Shape,
        default_tokens: int | None,
        tokenize: Callable[[], list[list[int]]],
    ) -> Response:
        """Answers a request with `key`, the name of its API key. The other arguments are those of `JobBuilder.build`.

        It takes the places first, so nothing is built for sequences that the model cannot take. Raises
        RequestError.
        """
        with ExitStack() as stack:
            places = stack.enter_context(self._generator.reserve(asked.sequences, asked.model))
            job = await self._workers.run(size, lambda: self._builder.build(asked, shape, default_tokens, tokenize))
            if asked.grammar is not None:
                grammars = await asyncio.to_thread(lambda: self._generator.grammars)
                grammar = await grammars.compile_soon(asked.grammar, key)
                job = replace(job, params=replace(job.params, grammar=grammar))
            if asked.stream:
                return EventStream(self._stream(job, places), stack.pop_all())
            return await self._whole(job, places)

    async def _whole(self, job: Job, places: Reservation) -> Response:
        answers = [WholeChoice(text) for text in job.openings]
        async with aclosing(self._pieces(job, places)) as pieces:
            async for index, piece, delta in pieces:
                answers[index].add(piece, delta)
        if sum(answer.size for answer in answers) <= SMALL_BYTES:
            return json_response(self._write(job, answers))
        return json_response(await self._workers.run(SMALL_BYTES + 1, partial(self._write, job, answers)))

    def _write(self, job: Job, answers: Sequence[WholeChoice]) -> bytes:
        """Returns the whole answer as JSON, one choice after the other, so that no step is long."""
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
                async for index, piece, delta in pieces:
                    start = answers[index].characters
                    answers[index].add(piece, delta)
                    if is_nothing(piece, delta):
                        continue
                    choice = {
                        "index": index,
                        **job.shape.delta(delta),
                        "logprobs": self._logprobs(job, piece.logprobs, start),
                        "finish_reason": answers[index].finish_reason(job),
                    }
                    yield _event(head | {"choices": [choice]} | usage)
            if job.request.include_usage:
                yield _event(head | {"choices": [], "usage": _usage(job, answers)})
            yield b"data: [DONE]\n\n"
        except Exception as error:
            # The head is sent with its status, so an error event ends the stream.
            yield _event(error_object(request_error(error)))

    async def _pieces(self, job: Job, places: Reservation) -> AsyncGenerator[tuple[int, Piece, Delta]]:
        """Yields the pieces of all choices as they come, each with its choice's index and the meaning of its text."""
        generated = self._generator.generate_all(
            job.choices, job.request.stop_strings, not job.readers[0].needs_special_tokens, places
        )
        try:
            async with aclosing(generated):
                async for index, piece in generated:
                    reader = job.readers[index]
                    delta = reader.feed(piece.text)
                    yield index, piece, delta if piece.finish_reason is None else delta + reader.finish()
        except Exception as error:
            raise request_error(error) from error

    def _logprobs(self, job: Job, logprobs: Sequence[Logprobs], start: int = 0) -> Any:
        if job.params.logprobs is None or not logprobs:
            return None
        return job.shape.logprobs(list(logprobs), self._generator.tokenizer, start)

    def _head(self, job: Job, kind: str) -> dict[str, Any]:
        number = uuid.uuid4().hex
        return {
            "id": job.shape.id_prefix + number,
            "object": kind,
            "created": int(time.time()),
            "model": job.model,
        }


class EventStream(StreamingResponse):
    """This is a stream of events that holds `places` until it has ended or was abandoned in any way."""

    def __init__(self, events: AsyncGenerator[bytes], places: AbstractContextManager[Any]):
        super().__init__(events, media_type="text/event-stream")
        self._events = events
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream, and gives the places back at its end."""
        with self._places:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)


def json_response(body: bytes) -> Response:
    """Returns a response that has this JSON as its body."""
    return Response(body, media_type="application/json")


def _usage(job: Job, answers: Sequence[ChoiceProgress]) -> dict[str, int]:
    generated = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": job.prompt_tokens + generated,
    }


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
