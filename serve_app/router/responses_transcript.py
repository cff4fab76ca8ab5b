"""Knows what a stream of OpenAI's Responses API has sent so far, and how another replica continues it. It is pure.

The rest comes from `/v1/completions`, as for a chat, and is written as deltas of the message that is open. The last
event then has the response that the first one began, with the whole text.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from serve_app.router.transcript import CannotResume, ContinuedByText, Kind, Transcript, events
from serve_app.wire.responses.chat_request import PATH, RENAMED, chat_request
from serve_app.wire.responses.events import Item, ResponseEvents, usage
from serve_app.wire.sse import named_events

__all__ = ["PATH", "ResponsesTranscript", "chat_of"]

OPENINGS = frozenset({"response.created", "response.in_progress"})
ENDS = ("response.output_text.done", "response.content_part.done", "response.output_item.done")
# Other fields may change the text in ways that the chat request does not show. Tools and formats are refused there.
KNOWN = frozenset({
    *RENAMED, "input", "instructions", "tools", "tool_choice", "reasoning", "text", "include", "top_logprobs",
    "metadata", "store", "user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "stream_options", "max_tool_calls", "request_id",
})  # fmt: skip
# These have no effect with these values.
NEUTRAL: Mapping[str, Any] = {"truncation": "disabled", "background": False, "include_reasoning": True}


def chat_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the chat request that stands for this one. Raises CannotResume for a field that it cannot stand for."""
    for name, value in asked.items():
        if name not in KNOWN and value is not None and not (name in NEUTRAL and value == NEUTRAL[name]):
            raise CannotResume(f"the request has the field '{name}'")
    if (asked.get("stream_options") or {}).get("include_obfuscation"):
        raise CannotResume("its events are padded")
    return chat_request(asked)


class ResponsesTranscript(Transcript):
    """Keeps the events that a client has, and of the first one the response. `ends` counts the events of the message's
    end."""

    def __init__(self) -> None:
        super().__init__()
        self._response: dict[str, Any] = {"output": []}
        self._item_id: str | None = None
        self._has_part = False
        self._ends = 0
        self._opened: set[str] = set()

    def _take(self, event: dict[str, Any]) -> None:
        kind = str(event.get("type"))
        if "unreadable" in event:
            self.problem = "one of its events is not JSON"
        self.started = True
        if kind in OPENINGS:
            self._opened.add(kind)
        self.sequence = event.get("sequence_number", self.sequence - 1) + 1
        if kind == "response.created":
            self._response = {**_raw(event["response"]), "output": []}
        elif kind == "response.output_item.added":
            self.has_output = True
            if event["item"]["type"] != "message" or self._item_id is not None:
                self.problem = f"the stream has an item of type '{event['item']['type']}'"
            self._item_id = event["item"]["id"]
        elif kind == "response.content_part.added":
            self._has_part = True
        elif kind == "response.output_text.delta":
            self._add_text(event["delta"])
        elif kind in ENDS:
            self._ends, self.is_over = ENDS.index(kind) + 1, True
            if kind == ENDS[-1]:  # Only the item itself says why it ended.
                self.finish_reason = "length" if event["item"]["status"] == "incomplete" else "stop"
        elif kind in ("response.completed", "response.incomplete", "response.failed", "error"):
            self.done = True

    def continued(self, kind: Kind, prompt_tokens: int, sent_tokens: int, body: bytes) -> ContinuedByText:
        """Does what `Transcript` says."""
        return ResponsesContinuation(self._writer(), prompt_tokens, sent_tokens, body)

    def ending(self, kind: Kind, asked: Mapping[str, Any], prompt_tokens: int, sent_tokens: int, is_cut: bool) -> bytes:
        """Does what `Transcript` says."""
        sent_tokens += not is_cut
        return named_events(self._writer().stop(is_cut, usage(prompt_tokens, sent_tokens)))

    def without_opening(self, event: Any) -> bytes:
        """Does what `Transcript` says."""
        if not isinstance(event, dict) or event.get("type") in self._opened:
            return b""
        if isinstance(response := event.get("response"), dict):
            began = {name: self._response[name] for name in ("id", "created_at") if name in self._response}
            event = {**event, "response": {**response, **began}}
        return named_events([event])

    def _writer(self) -> ResponseEvents:
        if self._item_id is None:
            return ResponseEvents(self._response, self.sequence)
        item = Item("message", self._item_id, [self.text], has_part=self._has_part, done=self._ends)
        if self._ends == len(ENDS):
            status = "incomplete" if self.finish_reason == "length" else "completed"
            return ResponseEvents({**self._response, "output": [item.written(status)]}, self.sequence)
        return ResponseEvents(self._response, self.sequence, item)


class ResponsesContinuation:
    """Turns the events of the continuing completion into events of the first stream."""

    def __init__(self, writer: ResponseEvents, prompt_tokens: int, sent_tokens: int, body: bytes):
        self.body = body
        self._writer = writer
        self._prompt_tokens = prompt_tokens
        self._sent_tokens = sent_tokens
        self._reason: str | None = None

    def rewrite(self, piece: bytes) -> bytes:
        """Does what `Continued` says."""
        return b"".join(named_events(self._rewritten(event)) for event in events(piece) if isinstance(event, dict))

    def _rewritten(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        if isinstance(error := event.get("error"), Mapping):
            return self._writer.failed(str(error.get("code") or error.get("type")), str(error.get("message")))
        made: list[dict[str, Any]] = []
        for choice in event.get("choices") or []:
            if text := choice.get("text"):
                made += self._writer.text(text)
            self._reason = choice.get("finish_reason") or self._reason
        if counts := event.get("usage"):
            sent = self._sent_tokens + counts.get("completion_tokens", 0)
            made += self._writer.stop(self._reason == "length", usage(self._prompt_tokens, sent))
        return made


def _raw(response: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the response with its fields as JSON. What it repeats of a request is long, and is written again."""
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in response.items()}
