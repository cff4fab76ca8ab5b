"""Has requests generated, and answers in the form of their API, either whole or as a stream of events."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, ExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve_app.engines.pt.api.answer_form import AnswerForm, EventWriter
from serve_app.engines.pt.api.job import Job, WholeChoice
from serve_app.engines.pt.api.job_builder import JobBuilder
from serve_app.engines.pt.api.protocol import ChatRequest, CompletionRequest
from serve_app.engines.pt.api.request_error import request_error
from serve_app.engines.pt.api.tool_calls import Delta
from serve_app.engines.pt.core.places import Reservation
from serve_app.engines.pt.core.sequence import Piece
from serve_app.engines.pt.generator import Generator
from serve_app.engines.workers import SMALL_BYTES, Workers


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
        form: AnswerForm,
        default_tokens: int | None,
        tokenize: Callable[[], list[list[int]]],
    ) -> Response:
        """Answers a request with `key`, the name of its API key, in the given form. The other arguments are those of
        `JobBuilder.build`.

        It takes the places first, so nothing is built for sequences that the model cannot take. Raises
        RequestError.
        """
        with ExitStack() as stack:
            places = stack.enter_context(self._generator.reserve(asked.sequences, asked.model))
            build = partial(self._builder.build, asked, default_tokens, tokenize, places.adapter_name)
            job = await self._workers.run(size, build)
            if asked.grammar is not None:
                grammars = await asyncio.to_thread(lambda: self._generator.grammars)
                grammar = await grammars.compile_soon(asked.grammar, key)
                job = replace(job, params=replace(job.params, grammar=grammar))
            if asked.stream:
                writer = form.events(job)
                size = form.repeated_bytes + sum(map(len, job.openings))
                opening = await self._written(size, writer.begin)
                return EventStream(self._stream(job, writer, opening, places), stack.pop_all())
            return await self._whole(job, form, places)

    async def _whole(self, job: Job, form: AnswerForm, places: Reservation) -> Response:
        answers = [WholeChoice(text) for text in job.openings]
        async with aclosing(self._pieces(job, places)) as pieces:
            async for index, piece, delta in pieces:
                answers[index].add(piece, delta)
        size = form.repeated_bytes + sum(answer.size for answer in answers)
        return json_response(await self._written(size, partial(form.whole, job, answers)))

    async def _stream(
        self, job: Job, writer: EventWriter, opening: bytes, places: Reservation
    ) -> AsyncGenerator[bytes]:
        try:
            if opening:
                yield opening
            async with aclosing(self._pieces(job, places)) as pieces:
                async for index, piece, delta in pieces:
                    if events := await self._written(writer.weight(delta), partial(writer.add, index, piece, delta)):
                        yield events
            yield await self._written(writer.weight(None), writer.end)
        except Exception as error:
            # The head is sent with its status, so an error event ends the stream.
            yield await self._written(writer.weight(None), partial(writer.failed, request_error(error)))

    async def _written(self, size: int, write: Callable[[], bytes]) -> bytes:
        """Returns what `write` makes of about `size` bytes. A few are quicker without a thread."""
        return write() if size <= SMALL_BYTES else await self._workers.write(size, write)

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
