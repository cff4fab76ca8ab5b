"""Reads tool calls, which transformers' response parser finds in the text or a grammar forces.

With `tool_choice: auto` the model writes calls in its own way, and the tokenizer's `response_template` (or Hermes'
way, if the chat template shows it) tells them from text. With `required` or a named function, a JSON schema forces the
output, which works for every model.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from transformers import PreTrainedTokenizerBase

from serve_app.engines.pt.transformers_internals import own_response_template, response_parser
from serve_app.errors import InvalidRequest

# This is Hermes' and Qwen's way as a transformers response template. Space before a call is left out, up to a bound,
# since all of it is held back and read again with every token until it is known what follows.
HERMES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s{0,32}<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}

# These may be between the calls of a list, and these show where an object of JSON ends.
BETWEEN_CALLS = "[], \t\r\n"
JSON_MARKS = re.compile(r'["\\{}]')


@dataclass(frozen=True)
class ToolCall:
    """This is one call, or the next part of its arguments. `index` counts the calls of a message; `arguments` is
    JSON."""

    index: int
    id: str
    name: str
    arguments: str
    is_first: bool = True

    def write(self) -> dict[str, Any]:
        """Returns the call as OpenAI has it in a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    def write_delta(self) -> dict[str, Any]:
        """Returns the call as OpenAI has it in a stream, where id and name come once."""
        if self.is_first:
            return {"index": self.index, **self.write()}
        return {"index": self.index, "function": {"arguments": self.arguments}}


@dataclass(frozen=True)
class Delta:
    """This is the meaning of new text: text of the answer, text of the thinking before it, and calls. `is_thinking`
    means that the new text was part of the thinking or of its tags, though there may be nothing to show of it."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    is_thinking: bool = field(default=False, compare=False)

    def __add__(self, other: "Delta") -> "Delta":
        """Returns both in order. Parts of one call become one."""
        return Delta.join((self, other))

    @classmethod
    def join(cls, deltas: Iterable["Delta"]) -> Self:
        """Returns all deltas as one, in order. Parts of one call become one. The work grows with their length."""
        deltas = tuple(deltas)
        calls: dict[int, list[ToolCall]] = {}
        for delta in deltas:
            for call in delta.calls:
                calls.setdefault(call.index, []).append(call)
        return cls(
            "".join(delta.content for delta in deltas),
            "".join(delta.reasoning for delta in deltas),
            tuple(replace(parts[0], arguments="".join(part.arguments for part in parts)) for parts in calls.values()),
            any(delta.is_thinking for delta in deltas),
        )


class MessageReader(Protocol):
    """Reads the text of one choice as it comes."""

    # Whether the markers are special tokens, which the text must then keep.
    needs_special_tokens: bool

    def feed(self, text: str) -> Delta:
        """Returns what is certain with this text."""
        ...

    def finish(self) -> Delta:
        """Returns the rest after the end of the text."""
        ...


class PlainReader:
    """Reads all text as content."""

    needs_special_tokens = False

    def feed(self, text: str) -> Delta:
        """Does what `MessageReader` says."""
        return Delta(text)

    def finish(self) -> Delta:
        """Does what `MessageReader` says."""
        return Delta()


class TemplateReader:
    """Reads calls in the model's own way with transformers' parser. A call that the parser cannot read becomes content.

    With `parallel` false, calls after the first are left out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any], prompt: str, tools: Any, parallel: bool
    ):
        self.needs_special_tokens = template is not HERMES
        prefix = prompt if self.needs_special_tokens else ""
        self._parser = response_parser(tokenizer, template, prefix, tools)
        self._most = None if parallel else 1
        self._calls = 0
        self._unread = ""  # This text has not come out yet, and must not be lost if the parser fails.
        self._failed = False

    def feed(self, text: str) -> Delta:
        """Does what `MessageReader` says."""
        return self._read(text, lambda: self._parser.feed(text))

    def finish(self) -> Delta:
        """Does what `MessageReader` says."""
        return self._read("", lambda: self._parser.finalize()[1])

    def _read(self, text: str, parse: Callable[[], list[dict[str, Any]]]) -> Delta:
        if self._failed:
            return Delta(text)
        self._unread += text
        unread = self._unread
        try:
            return self._translate(parse())
        except Exception:  # Whatever a model writes is an answer.
            self._failed = True
            return Delta(unread)

    def _translate(self, events: ReadOnlySequence[Mapping[str, Any]]) -> Delta:
        texts = {"content": "", "thinking": ""}
        calls: list[ToolCall] = []
        for event in events:
            field = event.get("field")
            if event["type"] == "region_close" and field == "tool_calls":
                calls.append(_call(self._calls + len(calls), event["value"]["function"]))
            elif event["type"] == "region_chunk" and not event.get("dirty") and field in texts:
                texts[field] += event["text"]
                self._unread = self._unread.partition(event["text"])[2]
        if calls:
            self._unread = ""
        self._calls += len(calls)
        wanted = tuple(call for call in calls if self._is_wanted(call))
        is_thinking = any(event.get("field") == "thinking" for event in events)
        return Delta(texts["content"], texts["thinking"], wanted, is_thinking)

    def _is_wanted(self, call: ToolCall) -> bool:
        return self._most is None or call.index < self._most


class NamedCallReader:
    """Reads the whole text as the arguments of one function."""

    needs_special_tokens = False

    def __init__(self, name: str):
        self._name = name
        self._id = new_call_id()
        self._is_first = True

    def feed(self, text: str) -> Delta:
        """Does what `MessageReader` says."""
        call = ToolCall(0, self._id, self._name, text, self._is_first)
        self._is_first = False
        return Delta(calls=(call,))

    def finish(self) -> Delta:
        """Does what `MessageReader` says."""
        return Delta()


class CallListReader:
    """Reads the whole text as a JSON list of calls. Each comes out when it is complete, and a rest that is cut is
    content.

    It looks at each character once to find where a call ends, and parses only whole calls.
    """

    needs_special_tokens = False

    def __init__(self) -> None:
        self._pieces: list[str] = []  # These belong to the call that is being written.
        self._depth = 0
        self._in_string = False
        self._escaped = -1  # This is the place of a character that a backslash has escaped, in the next piece at 0.
        self._calls = 0
        self._failed = False

    def feed(self, text: str) -> Delta:
        """Does what `MessageReader` says."""
        start, calls = 0, []
        for end in self._ends(text):
            self._pieces.append(text[start:end])
            start = end
            if not self._failed and (call := self._read_call()) is not None:
                calls.append(call)
        self._pieces.append(text[start:])
        return Delta(calls=tuple(calls))

    def finish(self) -> Delta:
        """Does what `MessageReader` says."""
        rest = "".join(self._pieces)
        return Delta(rest if rest.strip(BETWEEN_CALLS) else "")

    def _ends(self, text: str) -> Iterator[int]:
        """Yields the places in `text` after the last brace of an object at the top."""
        for found in JSON_MARKS.finditer(text):
            at, mark = found.start(), found.group()
            if at == self._escaped:
                continue
            if mark == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                if mark == "\\":
                    self._escaped = at + 1
            elif mark == "{":
                self._depth += 1
            elif mark == "}":
                self._depth -= 1
                if self._depth == 0:
                    yield at + 1
        self._escaped -= len(text)

    def _read_call(self) -> ToolCall | None:
        """Returns the completed call. If it is not a call, it stays with all that follows, and comes out at the end."""
        text = "".join(self._pieces)
        try:
            call = _call(self._calls, json.loads(text.lstrip(BETWEEN_CALLS)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self._failed = True
            return None
        self._pieces.clear()
        self._calls += 1
        return call


def response_template(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any] | None:
    """Returns how this model writes calls, or None if that is not known."""
    if (own := own_response_template(tokenizer)) is not None:
        return own
    template = str(tokenizer.chat_template or "")
    return HERMES if "<tool_call>" in template and "<function=" not in template else None


def thinking_template(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any] | None:
    """Returns how this model writes its thinking where it was offered no tools, or None if its files do not say."""
    own = own_response_template(tokenizer)
    if own is None or "thinking" not in own.get("fields", {}):
        return None
    return {**own, "fields": {name: field for name, field in own["fields"].items() if name != "tool_calls"}}


def call_list_schema(tools: ReadOnlySequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """Returns the JSON schema of one call to these tools, or of several if `parallel`.

    Definitions of the tools' schemas move to the root, where their references look for them. Raises InvalidRequest
    if they are not an object.
    """
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for number, tool in enumerate(tools):
        parameters = _with_prefix(parameters_of(tool), f"tool{number}_")
        for keyword in ("$defs", "definitions"):
            found = parameters.pop(keyword, {})
            if not isinstance(found, Mapping):
                raise InvalidRequest(
                    f"'tools[{number}].function.parameters.{keyword}' must be an object.", param="tools"
                )
            definitions |= {f"tool{number}_{name}": schema for name, schema in found.items()}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool["function"]["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    bounds = {"minItems": 1} if parallel else {"minItems": 1, "maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, **bounds, **({"$defs": definitions} if definitions else {})}


def _with_prefix(schema: Any, prefix: str) -> Any:
    """Returns the schema with references to the definitions at its root renamed."""
    if isinstance(schema, list):
        return [_with_prefix(item, prefix) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    changed = {key: _with_prefix(value, prefix) for key, value in schema.items()}
    reference = changed.get("$ref")
    if isinstance(reference, str):
        changed["$ref"] = re.sub(r"^#/(\$defs|definitions)/", rf"#/$defs/{prefix}", reference)
    return changed


def parameters_of(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON schema of a tool's arguments, which is an object if the tool does not say."""
    parameters: dict[str, Any] | None = tool["function"].get("parameters")
    return parameters or {"type": "object"}


def new_call_id() -> str:
    """Returns a new id that looks like OpenAI's."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _call(index: int, function: Mapping[str, Any]) -> ToolCall:
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(index, new_call_id(), str(function["name"]), text)
