"""Writes the answers of OpenAI's Responses API."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerBase

from serve_app.engines.pt.api.answer_form import EventWriter
from serve_app.engines.pt.api.job import ChoiceProgress, ContentLogprobs, Job, WholeChoice
from serve_app.engines.pt.api.request_error import renamed
from serve_app.engines.pt.api.tool_calls import Delta
from serve_app.engines.pt.core.sequence import Logprobs, Piece
from serve_app.engines.pt.text.logprobs import chat_logprobs
from serve_app.errors import RequestError
from serve_app.wire.responses.chat_request import NAMES
from serve_app.wire.responses.events import Event, Kind, ResponseEvents, new_response, usage
from serve_app.wire.sse import named_events


@dataclass(frozen=True)
class ResponsesForm:
    """Writes answers that repeat these fields of their request, which are JSON."""

    tokenizer: PreTrainedTokenizerBase
    repeated: Mapping[str, msgspec.Raw]

    @property
    def repeated_bytes(self) -> int:
        """Does what `AnswerForm` says."""
        return sum(memoryview(value).nbytes for value in self.repeated.values())

    def whole(self, job: Job, answers: Sequence[WholeChoice]) -> bytes:
        """Returns the whole response as JSON."""
        (answer,) = answers
        events, is_cut = ResponseEvents(self.response(job)), _is_cut(job, answer)
        self.add(events, answer.delta, answer.content_logprobs)
        events.close("incomplete" if is_cut else "completed")
        return msgspec.json.encode(events.whole(is_cut, _usage(job, answer)))

    def events(self, job: Job) -> EventWriter:
        """Returns the writer of one stream."""
        return _ResponsesEvents(self, job)

    def response(self, job: Job) -> dict[str, Any]:
        """Returns the response before anything was generated."""
        params = job.params
        sampling = {
            "max_output_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
        }
        return new_response(job.model, self.repeated, sampling)

    def add(self, events: ResponseEvents, delta: Delta, logprobs: Sequence[Logprobs]) -> list[Event]:
        """Returns the events of new text and calls. Only the text of the answer has log probabilities."""
        made = events.reasoning(delta.reasoning) if delta.reasoning else []
        if delta.content:
            entries = chat_logprobs(list(logprobs), self.tokenizer)["content"] if logprobs else []
            made += events.text(delta.content, entries)
        for call in delta.calls:
            made += events.call(call.id, call.name, call.arguments, call.is_first)
        return made


class _ResponsesEvents:
    """Does what `EventWriter` says."""

    def __init__(self, form: ResponsesForm, job: Job):
        self._form = form
        self._job = job
        self._events = ResponseEvents(form.response(job), pads=job.request.include_obfuscation)
        self._answer = ChoiceProgress()
        self._logprobs = ContentLogprobs()

    def begin(self) -> bytes:
        return named_events(self._events.start())

    def add(self, _: int, piece: Piece, delta: Delta) -> bytes:
        self._answer.add(piece, delta)
        return named_events(self._form.add(self._events, delta, self._logprobs.add(piece, delta)))

    def end(self) -> bytes:
        is_cut = _is_cut(self._job, self._answer)
        return named_events(self._events.stop(is_cut, _usage(self._job, self._answer)))

    def weight(self, delta: Delta | None) -> int:
        if delta is None:
            return self._form.repeated_bytes + self._events.size
        kinds: list[tuple[Kind, bool]] = [("reasoning", False)] if delta.reasoning else []
        kinds += [("message", False)] if delta.content else []
        kinds += [("function_call", call.is_first) for call in delta.calls]
        return max((self._events.closing_bytes(kind, is_new) for kind, is_new in kinds), default=0)

    def failed(self, error: RequestError) -> bytes:
        error = renamed(error, NAMES)
        return named_events(self._events.failed(error.code or error.type, error.message))


def _is_cut(job: Job, answer: ChoiceProgress) -> bool:
    return answer.finish_reason(job) == "length"


def _usage(job: Job, answer: ChoiceProgress) -> dict[str, Any]:
    return usage(job.prompt_tokens, answer.tokens, answer.reasoning_tokens, answer.kept)
