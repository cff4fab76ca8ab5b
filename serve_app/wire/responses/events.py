"""Makes a response of OpenAI's Responses API, and the events of its stream, from the parts of an answer as they come.

An answer is a row of items (reasoning, message, function_call), each of which is added, gets deltas, and is done before
the next one is added. The last event has the whole response once more, so its text is kept until then.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from serve_app.wire.obfuscation import obfuscation

Event = dict[str, Any]
Kind = Literal["reasoning", "message", "function_call"]
# An entry of log probabilities has about this many bytes of JSON.
ENTRY_BYTES = 64
PREFIXES: Mapping[Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


def new_id(prefix: str) -> str:
    """Returns a new id that looks like OpenAI's."""
    return f"{prefix}_{uuid.uuid4().hex}"


def new_response(model: str, asked: Mapping[str, Any], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a response in progress, which repeats what was asked: values, or their JSON as msgspec's `Raw`.
    `sampling` has the values that are used for what the request left out."""
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.get("instructions"),
        "max_tool_calls": asked.get("max_tool_calls"),
        "metadata": asked.get("metadata") or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": asked.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": asked.get("reasoning"),
        "service_tier": "default",
        "store": False,
        "text": asked.get("text") or {"format": {"type": "text"}},
        "tool_choice": asked.get("tool_choice") or "auto",
        "tools": asked.get("tools") or [],
        "top_logprobs": asked.get("top_logprobs") or 0,
        "truncation": "disabled",
        "usage": None,
        "user": asked.get("user"),
        **sampling,
    }


def usage(input_tokens: int, output_tokens: int, reasoning_tokens: int = 0, cached_tokens: int = 0) -> dict[str, Any]:
    """Returns the field `usage`."""
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": input_tokens + output_tokens,
    }


@dataclass
class Item:
    """This is the item that is being written. `texts` are the pieces of its text or arguments so far, and `size` says
    about how many bytes of JSON they and their log probabilities have.

    `has_part` says that the part of its content has been added, and `done` counts the events of its end that have been
    sent. Both are for a stream that another replica continues.
    """

    kind: Kind
    id: str
    texts: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    call_id: str = ""
    name: str = ""
    has_part: bool = True
    done: int = 0
    size: int = 0

    def written(self, status: str) -> dict[str, Any]:
        """Returns the item as it stands in `output`."""
        text = "".join(self.texts)
        if self.kind == "function_call":
            named = {"call_id": self.call_id, "name": self.name, "arguments": text}
            return {"type": "function_call", "id": self.id, **named, "status": status}
        content = [self.part(text)] if text or status == "completed" else []
        if self.kind == "reasoning":
            return {"type": "reasoning", "id": self.id, "summary": [], "content": content, "status": status}
        return {"type": "message", "id": self.id, "role": "assistant", "content": content, "status": status}

    def part(self, text: str) -> dict[str, Any]:
        """Returns the only part of the item's content."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self.logprobs)}


class ResponseEvents:
    """Keeps where the stream is. Each method returns the next events.

    A stream that another replica continues has `sequence` events already, and perhaps an `item` that is open. With
    `pads`, deltas are padded. `size` says about how many bytes of JSON all items have.
    """

    def __init__(self, response: dict[str, Any], sequence: int = 0, item: Item | None = None, *, pads: bool = False):
        self.size = 0
        self._pads = pads
        self._response = response
        self._sequence = sequence
        self._output: list[dict[str, Any]] = list(response["output"])
        self._item = item

    def closing_bytes(self, kind: Kind, is_new: bool) -> int:
        """Returns about how many bytes the next part of an answer has written again, because it ends the item that is
        open. `kind` is the part's, and `is_new` says that it is an item of its own."""
        item = self._item
        return item.size if item is not None and (is_new or item.kind != kind) else 0

    def start(self) -> list[Event]:
        """Returns the events before the first item."""
        return [self._event(f"response.{kind}", response=self._response) for kind in ("created", "in_progress")]

    def reasoning(self, text: str) -> list[Event]:
        """Adds text of the thinking."""
        return [*self._opened("reasoning"), self._at("response.reasoning_text.delta", content_index=0, delta=text)]

    def text(self, text: str, logprobs: Sequence[Any] = ()) -> list[Event]:
        """Adds text of the answer, with the log probabilities of its tokens."""
        opened = self._opened("message")
        assert self._item is not None, "it was opened"
        self._item.logprobs += logprobs
        self._grown(sum(ENTRY_BYTES * (1 + len(entry["top_logprobs"])) for entry in logprobs))
        delta = self._at("response.output_text.delta", content_index=0, delta=text, logprobs=list(logprobs))
        return [*opened, delta]

    def call(self, call_id: str, name: str, arguments: str, is_first: bool) -> list[Event]:
        """Adds a call, or the next part of the arguments of the last one."""
        events: list[Event] = []
        if is_first:
            events += self.close()
            self._item = Item("function_call", new_id("fc"), call_id=call_id, name=name)
            events.append(self._added())
        if arguments:
            events.append(self._at("response.function_call_arguments.delta", delta=arguments))
        return events

    def close(self, status: str = "completed") -> list[Event]:
        """Ends the item that is open, if there is one."""
        item = self._item
        if item is None:
            return []
        written, text = item.written(status), "".join(item.texts)
        if item.kind == "function_call":
            ends: list[tuple[str, dict[str, Any]]] = [
                ("response.function_call_arguments.done", {"name": item.name, "arguments": text})
            ]
        else:
            logprobs = {} if item.kind == "reasoning" else {"logprobs": item.logprobs}
            name = "reasoning_text" if item.kind == "reasoning" else "output_text"
            ends = [
                (f"response.{name}.done", {"content_index": 0, "text": text, **logprobs}),
                ("response.content_part.done", {"content_index": 0, "part": item.part(text)}),
            ]
        events = [self._at(kind, **fields) for kind, fields in ends[item.done :]]
        events.append(self._event("response.output_item.done", output_index=len(self._output), item=written))
        self._output.append(written)
        self._item = None
        return events

    def stop(self, is_cut: bool, used: Mapping[str, Any]) -> list[Event]:
        """Returns the last events. `is_cut` means that the answer reached its most tokens."""
        events = self.close("incomplete" if is_cut else "completed")
        response = self.whole(is_cut, used)
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def failed(self, code: str, message: str) -> list[Event]:
        """Returns the last event of a stream that cannot be ended otherwise."""
        error = {"code": code, "message": message}
        response = {**self._response, "status": "failed", "error": error, "output": self._output}
        return [self._event("response.failed", response=response)]

    def whole(self, is_cut: bool, used: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the whole response, whose items have ended."""
        details = {"reason": "max_output_tokens"} if is_cut else None
        status = "incomplete" if is_cut else "completed"
        ended = {"status": status, "incomplete_details": details, "output": self._output, "usage": dict(used)}
        return {**self._response, **ended}

    def _opened(self, kind: Kind) -> list[Event]:
        events: list[Event] = []
        if self._item is None or self._item.kind != kind:
            events += self.close()
            self._item = Item(kind, new_id(PREFIXES[kind]), has_part=False)
            events.append(self._added())
        if not self._item.has_part:
            self._item.has_part = True
            events.append(self._at("response.content_part.added", content_index=0, part=self._item.part("")))
        return events

    def _added(self) -> Event:
        assert self._item is not None, "an item was opened"
        item = self._item.written("in_progress")
        return self._event("response.output_item.added", output_index=len(self._output), item=item)

    def _at(self, kind: str, **fields: Any) -> Event:
        """Returns an event of the open item, and keeps the text of a delta."""
        assert self._item is not None, "an item is open"
        if "delta" in fields:
            self._item.texts.append(fields["delta"])
            self._grown(len(fields["delta"]))
            fields |= {"obfuscation": obfuscation(fields["delta"])} if self._pads else {}
        return self._event(kind, item_id=self._item.id, output_index=len(self._output), **fields)

    def _grown(self, size: int) -> None:
        assert self._item is not None, "an item is open"
        self._item.size += size
        self.size += size

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event
