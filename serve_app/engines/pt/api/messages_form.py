"""Writes the answers of Anthropic's Messages API."""

from collections.abc import Sequence
from typing import Any

import msgspec

from serve_app.engines.pt.api.answer_form import EventWriter
from serve_app.engines.pt.api.job import ChoiceProgress, Job, WholeChoice
from serve_app.engines.pt.api.request_error import renamed
from serve_app.engines.pt.api.tool_calls import Delta, ToolCall
from serve_app.engines.pt.core.sequence import Piece
from serve_app.errors import RequestError
from serve_app.wire.anthropic.chat_request import NAMES
from serve_app.wire.anthropic.errors import messages_error
from serve_app.wire.anthropic.events import MessageEvents, new_message_id, signature, stop_reason
from serve_app.wire.sse import named_events

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])


class MessagesForm:
    """Writes messages."""

    repeated_bytes = 0

    def whole(self, job: Job, answers: Sequence[WholeChoice]) -> bytes:
        """Returns the whole message as JSON. An answer without anything has one empty block, as with vLLM."""
        (answer,) = answers
        delta = answer.delta
        calls = [_block(call) for call in delta.calls]
        content: list[dict[str, Any]] = []
        if delta.reasoning:
            content.append({"type": "thinking", "thinking": delta.reasoning, "signature": signature()})
        if delta.content or not (content or calls):
            content.append({"type": "text", "text": delta.content})
        has_calls = any(block["type"] == "tool_use" for block in calls)
        is_whole = has_calls and calls[-1]["type"] == "tool_use"
        reason, stopped_by = stop_reason(answer.finish_reason(job), answer.stopped_by, has_calls, is_whole)
        return msgspec.json.encode(
            {
                "id": new_message_id(),
                "type": "message",
                "role": "assistant",
                "model": job.model,
                "content": [*content, *calls],
                "stop_reason": reason,
                "stop_sequence": stopped_by,
                "usage": _usage(job, answer),
            }
        )

    def events(self, job: Job) -> EventWriter:
        """Returns the writer of one stream."""
        return _MessagesEvents(job)


class _MessagesEvents:
    """Does what `EventWriter` says."""

    def __init__(self, job: Job):
        self._job = job
        self._events = MessageEvents()
        self._answer = ChoiceProgress()
        self._arguments: list[str] = []  # They are those of the last call.

    def begin(self) -> bytes:
        return named_events(self._events.start(new_message_id(), self._job.model, self._job.prompt_tokens))

    def add(self, _: int, piece: Piece, delta: Delta) -> bytes:
        self._answer.add(piece, delta)
        events = self._events.thinking(delta.reasoning) if delta.reasoning else []
        if delta.content:
            events += self._events.text(delta.content)
        for call in delta.calls:
            if call.is_first:
                self._arguments.clear()
            self._arguments.append(call.arguments)
            events += self._events.tool_use(_call_id(call), call.name, call.arguments, call.is_first)
        return named_events(events)

    def end(self) -> bytes:
        reason, stopped_by = stop_reason(
            self._answer.finish_reason(self._job),
            self._answer.stopped_by,
            bool(self._arguments),
            _is_object("".join(self._arguments)),
        )
        return named_events(self._events.stop(reason, stopped_by, _usage(self._job, self._answer)))

    def weight(self, delta: Delta | None) -> int:
        return sum(map(len, self._arguments)) if delta is None else 0

    def failed(self, error: RequestError) -> bytes:
        return named_events([messages_error(renamed(error, NAMES))])


def _usage(job: Job, answer: ChoiceProgress) -> dict[str, int]:
    """Returns the usage. What the prompt cache had is no part of the input."""
    kept = {"cache_read_input_tokens": answer.kept} if answer.kept else {}
    return {"input_tokens": job.prompt_tokens - answer.kept, "output_tokens": answer.tokens, **kept}


def _block(call: ToolCall) -> dict[str, Any]:
    """Returns the block of a call. The arguments of one that was cut are no object, so they stay text."""
    if not _is_object(call.arguments):
        return {"type": "text", "text": call.arguments}
    return {"type": "tool_use", "id": _call_id(call), "name": call.name, "input": msgspec.Raw(call.arguments.encode())}


def _is_object(arguments: str) -> bool:
    try:
        _OBJECT.decode(arguments)
    except (ValueError, RecursionError):
        return False
    return True


def _call_id(call: ToolCall) -> str:
    """Returns the call's id with the beginning that Anthropic's have."""
    return "toolu_" + call.id.removeprefix("call_")
