"""Turns the messages of a chat into what its template reads, with joined parts of text and decoded arguments of
calls."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from serve_app.errors import InvalidRequest
from serve_app.wire.census import decode_counted, require_countable


def with_joined_text(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages with lists of text parts as one text. Raises InvalidRequest for images and the like."""
    return [_joined(message, f"messages[{index}]") for index, message in enumerate(messages)]


def with_read_arguments(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages with the arguments of tool calls decoded, which chat templates expect.

    They are JSON in strings of the body, so their contents were not counted with the body. They are counted here, over
    all calls together, before any of them is built. Raises InvalidRequest.
    """
    calls = [_calls(message, f"messages[{index}]") for index, message in enumerate(messages)]
    texts = [text for of_message in calls for call in of_message if isinstance(text := _arguments(call), str)]
    # Arguments that are not JSON may hide what follows from the count. They are refused before that is read.
    require_countable("\n".join(texts).encode(), what="The JSON of all arguments of tool calls", param="messages")
    return [
        message | {"tool_calls": [_decoded(call, f"messages[{index}]") for call in calls[index]]}
        if calls[index]
        else message
        for index, message in enumerate(messages)
    ]


def with_known_roles(messages: Sequence[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """Returns the messages as this chat template reads them. Where it does not know the role developer, such a message
    is one of the system. Thinking of earlier answers has both of its names."""
    knows = "developer" in template
    return [_named(message, knows) for message in messages]


def _named(message: dict[str, Any], knows_developer: bool) -> dict[str, Any]:
    if message["role"] == "developer" and not knows_developer:
        message = message | {"role": "system"}
    thinking = message.get("reasoning") or message.get("reasoning_content")
    return message | {"reasoning": thinking, "reasoning_content": thinking} if thinking else message


def _joined(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, list):  # Templates put text together, so a message without any has an empty one.
        return {**message, "content": content or ""}
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f"{where}: content of type '{part.get('type')}' is not supported, since this model reads only text.",
                param="messages",
            )
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Returns the message's tool calls. Raises InvalidRequest unless each is a function with arguments."""
    try:
        calls = list(message.get("tool_calls") or ())
        for call in calls:
            _arguments(call)
    except (TypeError, KeyError):
        raise InvalidRequest(
            f"{where}.tool_calls: each call needs a function with a name, and arguments as JSON.", param="messages"
        ) from None
    return calls


def _arguments(call: Mapping[str, Any]) -> Any:
    return call["function"]["arguments"]


def _decoded(call: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = _arguments(call)
    try:
        read = decode_counted(arguments.encode() or b"{}") if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise InvalidRequest(
            f"{where}.tool_calls: the arguments of a function cannot be read as JSON: {error}.", param="messages"
        ) from None
    return call | {"function": call["function"] | {"arguments": read}}
