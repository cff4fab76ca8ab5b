"""Makes the events of a streamed message of Anthropic's API from the parts of an answer as they come.

An answer is a row of blocks, each of which begins, gets deltas, and ends before the next one begins.
"""

import uuid
from collections.abc import Mapping
from typing import Any, Literal

Event = dict[str, Any]
Kind = Literal["text", "thinking", "tool_use"]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


def new_message_id() -> str:
    """Returns a new id that looks like Anthropic's."""
    return f"msg_{uuid.uuid4().hex[:24]}"


def signature() -> str:
    """Returns what stands for the signature of a thinking block, which clients keep and send back. Nothing reads
    it."""
    return uuid.uuid4().hex


def stop_reason(
    finish_reason: str | None, stopped_by: str | None, has_calls: bool, is_call_whole: bool
) -> tuple[StopReason, str | None]:
    """Returns the reason for the end and the stop sequence that was met.

    `has_calls` is whether there are calls, and `is_call_whole` whether the last one is complete. A call that a stop
    sequence has cut must not run.
    """
    if finish_reason == "length":
        return "max_tokens", None
    if has_calls and is_call_whole:
        return "tool_use", None
    if stopped_by is not None:
        return "stop_sequence", stopped_by
    return ("tool_use" if has_calls else "end_turn"), None


class MessageEvents:
    """Keeps where the stream is. Each method returns the next events.

    A stream that another replica continues begins at the block `index`, which is open and of the kind `open_kind` if
    that is not None.
    """

    def __init__(self, index: int = 0, open_kind: Kind | None = None):
        self._index = index
        self._kind = open_kind

    def start(self, message_id: str, model: str, input_tokens: int) -> list[Event]:
        """Returns the events before the first block."""
        message: Event = {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": input_tokens, "output_tokens": 0},
        }
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def thinking(self, text: str) -> list[Event]:
        """Adds text of the thinking."""
        opened = self._opened("thinking", {"type": "thinking", "thinking": "", "signature": ""})
        return [*opened, self._delta({"type": "thinking_delta", "thinking": text})]

    def text(self, text: str) -> list[Event]:
        """Adds text of the answer."""
        return [*self._opened("text", {"type": "text", "text": ""}), self._delta({"type": "text_delta", "text": text})]

    def tool_use(self, call_id: str, name: str, arguments: str, is_first: bool) -> list[Event]:
        """Adds a call, or the next part of the arguments of the last one."""
        opened: list[Event] = []
        if is_first:
            opened = [
                *self.close(),
                *self._opened("tool_use", {"type": "tool_use", "id": call_id, "name": name, "input": {}}),
            ]
        return [*opened, self._delta({"type": "input_json_delta", "partial_json": arguments})] if arguments else opened

    def close(self) -> list[Event]:
        """Ends the block that is open, if there is one."""
        if self._kind is None:
            return []
        signed = self._kind == "thinking"
        events = [self._delta({"type": "signature_delta", "signature": signature()})] if signed else []
        events.append({"type": "content_block_stop", "index": self._index})
        self._index += 1
        self._kind = None
        return events

    def stop(self, reason: StopReason, stop_sequence: str | None, usage: Mapping[str, int]) -> list[Event]:
        """Returns the last events."""
        delta = {"stop_reason": reason, "stop_sequence": stop_sequence}
        return [
            *self.close(),
            {"type": "message_delta", "delta": delta, "usage": dict(usage)},
            {"type": "message_stop"},
        ]

    def _opened(self, kind: Kind, block: Event) -> list[Event]:
        if self._kind == kind:
            return []
        events = self.close()
        self._kind = kind
        return [*events, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}
