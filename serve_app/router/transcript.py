"""Knows what a stream has sent so far, and how another replica can continue it. It is pure.

A stream of text can be continued after its replica was lost: the text that the client has is appended to the prompt as
token ids, and `/v1/completions` generates the rest. With greedy decoding, the whole is then the text of an undisturbed
run, if the text's tokens are those that tokenizing it gives. With sampling, it is a text that the model could have
written, but not the one that it would have written, because a `seed` starts anew.

These cannot be continued: several choices, log probabilities, tools, formats that a grammar enforces (it would begin
anew in the middle), penalties (they count the answer's tokens, which are now part of the prompt), reasoning in a field
of its own, and endpoints other than those of texts: completions, chat completions, messages and responses. A stream
that has sent nothing of the answer is no exception to them: its request is sent again as a whole.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec

# Up to this many bytes, events are kept unread. Beyond that, they are read and only their text is kept.
KEPT_BYTES = 256 * 1024
EVENT_ENDS = (b"\n\n", b"\r\n\r\n")

Kind = Literal["chat", "text"]
_KINDS: Mapping[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "text"}

# These fields pass to the continuation as they are.
_SAMPLING = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "logit_bias",
    "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "bad_words", "user",
    "priority", "stream_options",
)  # fmt: skip
# These fields belong to the prompt and are used up when it is tokenized.
_PROMPT = (
    "messages", "prompt", "add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template",
    "chat_template_kwargs",
)  # fmt: skip
# These fields have no effect on the text. SDKs send some of them with every request.
_WITHOUT_EFFECT = (
    "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip
_LENGTH = ("max_tokens", "max_completion_tokens", "min_tokens", "stream")
_KNOWN = frozenset((*_SAMPLING, *_PROMPT, *_LENGTH, *_WITHOUT_EFFECT))
# These fields must have this value or be absent, or the stream cannot be continued.
_NEUTRAL: Mapping[str, Any] = {
    "n": 1, "best_of": 1, "echo": False, "logprobs": False, "top_logprobs": 0, "prompt_logprobs": None,
    "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "suffix": "", "tools": [],
    # Tokens after the end of a text are not all in the text, because the end's own token is left out.
    "ignore_eos": False, "use_beam_search": False, "parallel_tool_calls": True, "tool_choice": "none",
    "modalities": ["text"], "length_penalty": 1, "response_format": {"type": "text"},
    "return_token_ids": False,
    "include_reasoning": True,
}  # fmt: skip
DEFAULT_COMPLETION_TOKENS = 16
# An engine's event of another form raises these where it is read.
UNKNOWN_FORM = (LookupError, TypeError, AttributeError, ValueError)


class CannotResume(Exception):
    """Says that the stream cannot be continued. The message says why."""


def kind_of(path: str, asked: Mapping[str, Any]) -> Kind:
    """Returns the form of the stream. Raises CannotResume if the rest would not be what it would have been."""
    kind = _KINDS.get(path)
    if kind is None:
        raise CannotResume(f"streams of {path} cannot be continued")
    for field, value in asked.items():
        if field in _KNOWN or value is None:
            continue
        if field not in _NEUTRAL:
            raise CannotResume(f"the request has the field '{field}'")
        is_neutral = value == _NEUTRAL[field] and isinstance(value, bool) == isinstance(_NEUTRAL[field], bool)
        if not (is_neutral or (field == "tool_choice" and value == "auto")):  # "auto" needs tools, and there are none.
            raise CannotResume(f"the request sets '{field}'")
    if asked.get("include_stop_str_in_output") and asked.get("stop"):
        raise CannotResume("the stream includes its stop strings, and half of one may have been sent")
    if not all(_is_text(message) for message in asked.get("messages") or []):
        raise CannotResume("a message contains more than text")
    prompt = asked.get("prompt")
    is_ids = isinstance(prompt, list) and all(isinstance(item, int) for item in prompt)
    if isinstance(prompt, list) and not is_ids and len(prompt) > 1:
        raise CannotResume("the request has several prompts")
    return kind


class WholeEvents:
    """Cuts a stream after its events, because half an event cannot be taken back. It searches each byte once, however
    many pieces an event comes in."""

    def __init__(self) -> None:
        self._tail = bytearray()

    def feed(self, piece: bytes) -> bytes:
        """Returns the whole events up to here. Most pieces are whole events themselves and pass as they are."""
        if not self._tail and piece.endswith(EVENT_ENDS):
            return piece
        unsearched = max(0, len(self._tail) - 3)  # The end of an event may be cut itself.
        self._tail += piece
        found = ((self._tail.rfind(mark, unsearched), len(mark)) for mark in EVENT_ENDS)
        end = max((at + length for at, length in found if at >= 0), default=0)
        whole = bytes(memoryview(self._tail)[:end])
        del self._tail[:end]
        return whole

    def rest(self) -> bytes:
        """Returns what came after the last whole event."""
        tail, self._tail = bytes(self._tail), bytearray()
        return tail


def _is_text(message: Any) -> bool:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, list):
        return all(isinstance(part, Mapping) and part.get("type") == "text" for part in content)
    return content is None or isinstance(content, str)


class Continued(Protocol):
    """Turns another replica's events into events of the first stream."""

    def rewrite(self, piece: bytes) -> bytes:
        """Returns whole events as the client expects them."""
        ...


class Transcript:
    """Keeps the events that a client has. The attributes are those of the answer's only choice.

    `started` means that there are events, and `has_output` that the answer has begun with one of them. `is_over` means
    that its text has ended, though no event may have named the reason yet. `sequence` is the number of the next event
    in an API that numbers them. `problem` says why the stream cannot be continued.
    """

    def __init__(self) -> None:
        self._unread: list[bytes] = []
        self._reading = threading.Lock()
        self._unread_bytes = 0
        self._texts: list[str] = []
        self.length = 0
        self.head: dict[str, Any] = {}
        self.started = False
        self.has_output = False
        self.is_over = False
        self.sequence = 0
        self.finish_reason: str | None = None
        self.done = False
        self.told_usage = False
        self.problem = ""

    @property
    def text(self) -> str:
        """Returns the text so far, which has `length` characters. Its pieces are joined once."""
        self._texts = ["".join(self._texts)]
        return self._texts[0]

    @property
    def unread_bytes(self) -> int:
        """Returns how many bytes `read` has to read or to wait for."""
        return self._unread_bytes + (KEPT_BYTES if self._reading.locked() else 0)

    @property
    def is_full(self) -> bool:
        """Returns whether so many events are unread that they should be read now."""
        return self._unread_bytes > KEPT_BYTES

    def add(self, piece: bytes) -> None:
        """Keeps whole events that are sent to the client."""
        self._unread.append(piece)
        self._unread_bytes += len(piece)

    def read(self) -> None:
        """Reads the events that were kept, and keeps their text. It takes time with many bytes, so an event loop must
        not call it then. A reader whose caller was ended meanwhile is waited for. An event of a form that is not known
        here only means that the stream cannot be continued."""
        with self._reading:
            data, self._unread, self._unread_bytes = b"".join(self._unread), [], 0
            for event in events(data):
                if event == "[DONE]":
                    self.done = True
                elif isinstance(event, dict):
                    try:
                        self._take(event)
                    except UNKNOWN_FORM:
                        self.started = True
                        self.problem = "one of its events has a form that is not known here"

    def _add_text(self, text: str) -> None:
        if not isinstance(text, str):
            raise TypeError("an engine's text is none")
        self._texts.append(text)
        self.length += len(text)

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.done = True
            return
        if "unreadable" in event:
            self.problem = "one of its events is not JSON"
        self.told_usage = self.told_usage or bool(event.get("usage") and not event.get("choices"))
        self.started = True
        self.head = self.head or {name: event[name] for name in ("id", "created", "model") if name in event}
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            self.has_output = self.has_output or not _is_opening(choice)
            self._add_text(choice.get("text") or delta.get("content") or "")
            self.finish_reason = self.finish_reason or choice.get("finish_reason")
            for name in ("tool_calls", "reasoning", "reasoning_content", "function_call", "refusal"):
                if delta.get(name):
                    self.problem = f"the stream has '{name}'"

    def continued(self, kind: Kind, prompt_tokens: int, sent_tokens: int, body: bytes) -> "ContinuedByText":
        """Returns the continuation by a completion, whose request is `body`."""
        return Continuation(kind, self.head, prompt_tokens, sent_tokens, body)

    def ending(self, kind: Kind, asked: Mapping[str, Any], prompt_tokens: int, sent_tokens: int, is_cut: bool) -> bytes:
        """Returns the last events of a stream whose text is complete. `is_cut` means that it ended by its length. The
        token that ends a text otherwise is counted, though it is not in the text."""
        sent_tokens += not is_cut
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if is_cut else "stop", "logprobs": None}
        choice["delta" if kind == "chat" else "text"] = {} if kind == "chat" else ""
        head = {"object": "chat.completion.chunk" if kind == "chat" else "text_completion", **self.head}
        parts = [] if self.finish_reason else [as_event({**head, "choices": [choice]})]
        if (asked.get("stream_options") or {}).get("include_usage") and not self.told_usage:
            total = prompt_tokens + sent_tokens
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": sent_tokens, "total_tokens": total}
            parts.append(as_event({**head, "choices": [], "usage": usage}))
        return b"".join([*parts, as_event("[DONE]")])

    def without_opening(self, event: Any) -> bytes:
        """Returns an event of a request that was sent again as it belongs into the first stream, or nothing for one
        that comes before the answer, which the client has."""
        if not isinstance(event, dict) or "error" in event:
            return as_event(event)
        choices = event.get("choices") or []
        if choices and all(_is_opening(choice) for choice in choices):
            return b""
        return as_event({**event, **self.head})


class Repeated:
    """Has the events of a request that was sent again, since its stream had sent nothing of the answer."""

    def __init__(self, transcript: Transcript):
        self._transcript = transcript

    def rewrite(self, piece: bytes) -> bytes:
        """Does what `Continued` says."""
        return b"".join(self._transcript.without_opening(event) for event in events(piece))


def _is_opening(choice: Mapping[str, Any]) -> bool:
    """Returns whether a choice's chunk has its role at most."""
    delta = choice.get("delta")
    said = isinstance(delta, Mapping) and not any(value for name, value in delta.items() if name != "role")
    return said and not choice.get("finish_reason")


def events(data: bytes) -> Iterator[Any]:
    """Yields the decoded data of whole server-sent events. It leaves "[DONE]" as it is and skips comments."""
    for block in data.decode("utf-8", "replace").replace("\r\n", "\n").split("\n\n"):
        # splitlines would also split at U+2028 and others, which JSON holds as they are.
        value = "\n".join(line[5:].removeprefix(" ") for line in block.split("\n") if line.startswith("data:"))
        if not value:
            continue
        try:
            yield value if value == "[DONE]" else msgspec.json.decode(value)
        except (ValueError, RecursionError):
            yield {"unreadable": value}


class ContinuedByText(Continued, Protocol):
    """Is a continuation by a completion, whose request is `body`."""

    @property
    def body(self) -> bytes:
        """Returns the request's body."""
        ...


@dataclass(frozen=True)
class Continuation:
    """Has the request for another replica, and turns its events into events of the first stream."""

    kind: Kind
    head: Mapping[str, Any]
    prompt_tokens: int
    sent_tokens: int
    body: bytes

    def rewrite(self, piece: bytes) -> bytes:
        """Returns whole events of the continuation as the client expects them."""
        return b"".join(self._rewrite(event) for event in events(piece))

    def _rewrite(self, event: Any) -> bytes:
        if not isinstance(event, dict) or "error" in event:
            return as_event(event)
        event = {**event, **self.head}
        if self.kind == "chat":
            event["object"] = "chat.completion.chunk"
            event["choices"] = [_chat_choice(choice) for choice in event.get("choices") or []]
        if usage := event.get("usage"):
            completion = self.sent_tokens + usage.get("completion_tokens", 0)
            event["usage"] = {
                **usage,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": completion,
                "total_tokens": self.prompt_tokens + completion,
            }
        return as_event(event)


def _chat_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in choice.items() if name in ("index", "finish_reason", "stop_reason")}
    return {**kept, "delta": {"content": choice.get("text") or ""}, "logprobs": None}


def as_event(event: Any) -> bytes:
    """Returns one server-sent event as bytes."""
    text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def prompt_request(kind: Kind, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the body for `/tokenize` that gives the prompt's token ids, or None if the request has them itself."""
    if kind == "chat":
        names = ("model", "messages", *_PROMPT[2:])
        return {name: asked[name] for name in names if asked.get(name) is not None}
    prompt = asked.get("prompt")
    if isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], str)):
        return None
    text = prompt[0] if isinstance(prompt, list) else prompt
    special = asked.get("add_special_tokens")
    return {"model": asked.get("model"), "prompt": text, "add_special_tokens": True if special is None else special}


def continuation(
    kind: Kind,
    asked: Mapping[str, Any],
    transcript: Transcript,
    prompt_ids: list[int],
    text_ids: list[int],
    max_model_len: int,
) -> ContinuedByText | None:
    """Returns the request for the rest, or None if no token is left to generate, so the stream has only to be ended."""
    limit = asked.get("max_completion_tokens") or asked.get("max_tokens")
    room = max_model_len - len(prompt_ids)
    most = (DEFAULT_COMPLETION_TOKENS if kind == "text" else room) if limit is None else min(int(limit), room)
    left = most - len(text_ids)
    if left <= 0:
        return None
    body = {name: asked[name] for name in _SAMPLING if asked.get(name) is not None}
    body |= {"prompt": prompt_ids + text_ids, "max_tokens": left, "stream": True}
    if asked.get("min_tokens"):
        body["min_tokens"] = max(0, int(asked["min_tokens"]) - len(text_ids))
    return transcript.continued(kind, len(prompt_ids), len(text_ids), msgspec.json.encode(body))
