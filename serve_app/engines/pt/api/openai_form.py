"""Writes the answers of chat and text completions, in the two shapes of OpenAI's objects."""

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerBase

from serve_app.engines.pt.api.answer_form import EventWriter
from serve_app.engines.pt.api.job import ChoiceProgress, Job, WholeChoice, is_nothing
from serve_app.engines.pt.api.tool_calls import Delta
from serve_app.engines.pt.core.sequence import Logprobs, Piece
from serve_app.engines.pt.text.logprobs import LogprobsWriter, chat_logprobs, text_logprobs
from serve_app.errors import RequestError
from serve_app.wire.obfuscation import obfuscation
from serve_app.wire.openai_errors import error_object


@dataclass(frozen=True)
class Shape:
    """Says how one endpoint writes its objects. `whole` and `delta` make the part that holds a choice's text and
    calls."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    whole: Callable[[Delta], dict[str, Any]]
    delta: Callable[[Delta], dict[str, Any]]
    opening: dict[str, Any] | None
    logprobs: LogprobsWriter


@dataclass(frozen=True)
class OpenAIForm:
    """Writes answers in one shape."""

    shape: Shape
    tokenizer: PreTrainedTokenizerBase
    repeated_bytes = 0  # The text of an echo is in the choices' openings.

    def whole(self, job: Job, answers: Sequence[WholeChoice]) -> bytes:
        """Returns the whole answer as JSON, one choice after the other, so that no step is long."""
        choices = [
            msgspec.json.encode(
                {
                    "index": index,
                    **self.shape.whole(answer.delta),
                    "logprobs": self.logprobs(job, answer.logprobs),
                    **_reasons(job, answer),
                }
            )
            for index, answer in enumerate(answers)
        ]
        head = msgspec.json.encode(self.head(job, self.shape.whole_object))
        usage = msgspec.json.encode(_usage(job, answers))
        return head[:-1] + b',"choices":[' + b",".join(choices) + b'],"usage":' + usage + b"}"

    def events(self, job: Job) -> EventWriter:
        """Returns the writer of one stream."""
        return _OpenAIEvents(self, job)

    def logprobs(self, job: Job, logprobs: Sequence[Logprobs], start: int = 0) -> Any:
        """Returns the log probabilities of tokens after `start` characters, or None if none are wanted."""
        if job.params.logprobs is None or not logprobs:
            return None
        return self.shape.logprobs(list(logprobs), self.tokenizer, start)

    def head(self, job: Job, kind: str) -> dict[str, Any]:
        """Returns the fields before the choices."""
        number = uuid.uuid4().hex
        return {
            "id": self.shape.id_prefix + number,
            "object": kind,
            "created": int(time.time()),
            "model": job.model,
        }


class _OpenAIEvents:
    """Does what `EventWriter` says."""

    def __init__(self, form: OpenAIForm, job: Job):
        self._form = form
        self._job = job
        self._head = form.head(job, form.shape.chunk_object)
        self._usage: dict[str, Any] = {"usage": None} if job.request.include_usage else {}
        self._answers = [ChoiceProgress() for _ in job.choices]

    def begin(self) -> bytes:
        shape, events = self._form.shape, []
        for index, text in enumerate(self._job.openings):
            if shape.opening is not None or text:
                opening = shape.opening or {**shape.delta(Delta(text)), "logprobs": None}
                events.append(self._chunk({"index": index, **opening, "finish_reason": None}))
        return b"".join(events)

    def add(self, index: int, piece: Piece, delta: Delta) -> bytes:
        answer = self._answers[index]
        start = answer.characters
        answer.add(piece, delta)
        if is_nothing(piece, delta):
            return b""
        return self._chunk(
            {
                "index": index,
                **self._form.shape.delta(delta),
                "logprobs": self._form.logprobs(self._job, piece.logprobs, start),
                **_reasons(self._job, answer),
            },
            "".join((delta.content, delta.reasoning, *(call.arguments for call in delta.calls))),
        )

    def end(self) -> bytes:
        done = b"data: [DONE]\n\n"
        if not self._job.request.include_usage:
            return done
        return _event(self._head | {"choices": [], "usage": _usage(self._job, self._answers)}) + done

    def weight(self, delta: Delta | None) -> int:
        return 0

    def failed(self, error: RequestError) -> bytes:
        return _event(error_object(error))

    def _chunk(self, choice: dict[str, Any], text: str = "") -> bytes:
        padding = {"obfuscation": obfuscation(text)} if self._job.request.include_obfuscation else {}
        return _event(self._head | {"choices": [choice]} | self._usage | padding)


def _reasons(job: Job, answer: ChoiceProgress) -> dict[str, Any]:
    """Returns why the choice ended, and, as vLLM does, the stop string that ended it."""
    stopped_by = {} if answer.stopped_by is None else {"stop_reason": answer.stopped_by}
    return {"finish_reason": answer.finish_reason(job), **stopped_by}


def _usage(job: Job, answers: Sequence[ChoiceProgress]) -> dict[str, Any]:
    generated = sum(answer.tokens for answer in answers)
    thought = sum(answer.reasoning_tokens for answer in answers)
    usage: dict[str, Any] = {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": job.prompt_tokens + generated,
    }
    if thought:
        usage["completion_tokens_details"] = {"reasoning_tokens": thought}
    if kept := sum(answer.kept for answer in answers):  # Several choices have one prompt.
        usage["prompt_tokens_details"] = {"cached_tokens": min(kept, job.prompt_tokens)}
    return usage


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _reasoning(delta: Delta) -> dict[str, str]:
    """Returns the thinking under both names: vLLM's and the one of its earlier versions, which many clients read."""
    return {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning} if delta.reasoning else {}


def _message(delta: Delta) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": delta.content or (None if delta.calls else "")}
    message |= _reasoning(delta)
    if delta.calls:
        message["tool_calls"] = [call.write() for call in delta.calls]
    return {"message": message}


def _message_delta(delta: Delta) -> dict[str, Any]:
    fields: dict[str, Any] = {"content": delta.content} if delta.content else {}
    fields |= _reasoning(delta)
    if delta.calls:
        fields["tool_calls"] = [call.write_delta() for call in delta.calls]
    return {"delta": fields}


CHAT = Shape(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    whole=_message,
    delta=_message_delta,
    opening={"delta": {"role": "assistant", "content": ""}, "logprobs": None},
    logprobs=chat_logprobs,
)
TEXT = Shape(
    "cmpl-",
    "text_completion",
    "text_completion",
    whole=lambda delta: {"text": delta.content},
    delta=lambda delta: {"text": delta.content},
    opening=None,
    logprobs=text_logprobs,
)
