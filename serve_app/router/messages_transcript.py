"""Knows what a stream of Anthropic's Messages API has sent so far, and how another replica continues it. It is pure.

The rest comes from `/v1/completions`, as for a chat, and is written as deltas of the block that is open.
"""

from collections.abc import Mapping
from typing import Any

from serve_app.router.transcript import CannotResume, ContinuedByText, Kind, Transcript, events
from serve_app.wire.anthropic.chat_request import RENAMED, chat_request
from serve_app.wire.anthropic.events import MessageEvents, stop_reason
from serve_app.wire.sse import named_events

PATH = "/v1/messages"
OPENINGS = frozenset({"message_start", "ping"})
# Other fields may change the text in ways that the chat request does not show. Tools and formats are refused there.
KNOWN = frozenset({
    *RENAMED, "messages", "system", "tools", "tool_choice", "output_config", "metadata", "service_tier",
    "inference_geo", "cache_control", "context_management", "user_profile_id", "workspace_id",
})  # fmt: skip


def chat_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the chat request that stands for this one. Raises CannotResume if engines differ in its prompt."""
    if unknown := next((name for name in asked if name not in KNOWN and asked[name] is not None), None):
        raise CannotResume(f"the request has the field '{unknown}'")
    if asked["messages"][-1]["role"] == "assistant":
        raise CannotResume("the request has begun the answer")
    chat = chat_request(asked)
    if any(message["role"] == "system" for message in chat["messages"][1:]):
        raise CannotResume("a system message comes after others")
    return chat


class MessagesTranscript(Transcript):
    """Keeps the events that a client has. `index` is the block that is open, or the next one if none is."""

    def __init__(self) -> None:
        super().__init__()
        self.index = 0
        self.is_open = False
        self._opened: set[str] = set()

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        if "unreadable" in event:
            self.problem = "one of its events is not JSON"
        self.started = True
        if kind in OPENINGS:
            self._opened.add(kind)
        if kind == "content_block_start":
            self.has_output, self.is_open, self.is_over = True, True, False
            self.index = event["index"]
            if (block := event["content_block"]["type"]) != "text":
                self.problem = f"the stream has a block of type '{block}'"
        elif kind == "content_block_delta":
            self._add_text(event["delta"].get("text") or "")
        elif kind == "content_block_stop":
            self.is_open, self.is_over = False, True
            self.index = event["index"] + 1
        elif kind == "message_delta":
            self.finish_reason = event["delta"].get("stop_reason") or "end_turn"
        elif kind in ("message_stop", "error"):
            self.done = True

    def continued(self, kind: Kind, prompt_tokens: int, sent_tokens: int, body: bytes) -> ContinuedByText:
        """Does what `Transcript` says."""
        return MessagesContinuation(self._writer(), prompt_tokens, sent_tokens, body)

    def ending(self, kind: Kind, asked: Mapping[str, Any], prompt_tokens: int, sent_tokens: int, is_cut: bool) -> bytes:
        """Does what `Transcript` says."""
        usage = {"input_tokens": prompt_tokens, "output_tokens": sent_tokens + (not is_cut)}
        ends = self._writer().stop("max_tokens" if is_cut else "end_turn", None, usage)
        return named_events(ends if self.finish_reason is None else ends[-1:])

    def without_opening(self, event: Any) -> bytes:
        """Does what `Transcript` says."""
        is_event = isinstance(event, dict) and event.get("type") not in self._opened
        return named_events([event]) if is_event else b""

    def _writer(self) -> MessageEvents:
        return MessageEvents(self.index, "text" if self.is_open else None)


class MessagesContinuation:
    """Turns the events of the continuing completion into events of the first stream."""

    def __init__(self, writer: MessageEvents, prompt_tokens: int, sent_tokens: int, body: bytes):
        self.body = body
        self._writer = writer
        self._prompt_tokens = prompt_tokens
        self._sent_tokens = sent_tokens
        self._reason: str | None = None
        self._stopped_by: str | None = None

    def rewrite(self, piece: bytes) -> bytes:
        """Does what `Continued` says."""
        return b"".join(named_events(self._rewritten(event)) for event in events(piece) if isinstance(event, dict))

    def _rewritten(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        if isinstance(error := event.get("error"), Mapping):
            return [{"type": "error", "error": {"type": "api_error", "message": str(error.get("message"))}}]
        made: list[dict[str, Any]] = []
        for choice in event.get("choices") or []:
            if text := choice.get("text"):
                made += self._writer.text(text)
            self._reason = choice.get("finish_reason") or self._reason
            stopped_by = choice.get("stop_reason")
            self._stopped_by = stopped_by if isinstance(stopped_by, str) else self._stopped_by
        if usage := event.get("usage"):
            reason, stopped_by = stop_reason(self._reason, self._stopped_by, False, False)
            sent = self._sent_tokens + usage.get("completion_tokens", 0)
            counts = {"input_tokens": self._prompt_tokens, "output_tokens": sent}
            made += self._writer.stop(reason, stopped_by, counts)
        return made
