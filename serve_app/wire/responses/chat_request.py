"""Turns the body of a request to OpenAI's Responses API into that of a chat completion.

The messages are those that vLLM makes of such a body, so both engines see the same prompt. Nothing is stored, so a
request brings the whole conversation, and what refers to something stored is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.errors import InvalidRequest
from serve_app.wire.responses.tools import require_client_tool

Fields = Mapping[str, Any]

PATH = "/v1/responses"
# These fields mean the same in a chat completion, under these names there.
RENAMED = {
    "model": "model", "max_output_tokens": "max_completion_tokens", "temperature": "temperature", "top_p": "top_p",
    "top_k": "top_k", "min_p": "min_p", "seed": "seed", "stop": "stop", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "repetition_penalty": "repetition_penalty", "logit_bias": "logit_bias",
    "ignore_eos": "ignore_eos", "stream": "stream", "chat_template_kwargs": "chat_template_kwargs",
    "structured_outputs": "structured_outputs", "parallel_tool_calls": "parallel_tool_calls",
}  # fmt: skip
# Errors of the chat completion name its own fields, and these are their names here.
NAMES = {
    "messages": "input", "max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens",
    "response_format": "text", "reasoning_effort": "reasoning",
}  # fmt: skip
WITH_LOGPROBS = "message.output_text.logprobs"
# These fields refer to something that would have to be stored. Each has what to do instead.
STORED: Mapping[str, str] = {
    "previous_response_id": "Send the items of the conversation so far in 'input', with the 'output' of each response.",
    "conversation": "Send the items of the conversation so far in 'input', with the 'output' of each response.",
    "background": "Leave it out, and read the answer of this request, or stream it.",
    "prompt": "Send the text of the prompt in 'instructions' and 'input'.",
}
TEXT_PARTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})


def require_stateless(fields: Fields) -> None:
    """Raises InvalidRequest for a field that refers to something stored. `fields` are those of a decoded body."""
    for name, instead in STORED.items():
        if fields.get(name):
            raise InvalidRequest(f"'{name}' is not served, because nothing is stored here. {instead}", param=name)


def chat_request(asked: Fields) -> dict[str, Any]:
    """Returns the body of the chat completion.

    The types of the fields must have been checked, but items of the input are checked here. Raises InvalidRequest with
    the place of an item that this does not know.
    """
    require_stateless(asked)
    chat = {name: asked[field] for field, name in RENAMED.items() if asked.get(field) is not None}
    chat["messages"] = _messages(asked)
    if tools := asked.get("tools"):
        chat["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    if (choice := asked.get("tool_choice")) is not None:
        chat["tool_choice"] = choice if isinstance(choice, str) else _named(choice)
    if (effort := (asked.get("reasoning") or {}).get("effort")) is not None:
        chat["reasoning_effort"] = effort
    if wanted := _format((asked.get("text") or {}).get("format") or {"type": "text"}):
        chat["response_format"] = wanted
    if WITH_LOGPROBS in (asked.get("include") or ()):
        chat |= {"logprobs": True, "top_logprobs": asked.get("top_logprobs") or 0}
    if chat.get("stream"):
        chat["stream_options"] = {**(asked.get("stream_options") or {}), "include_usage": True}
    return chat


def _messages(asked: Fields) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if asked.get("instructions"):
        messages.append({"role": "system", "content": asked["instructions"]})
    given = asked["input"]
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    first = len(messages)
    for index, item in enumerate(given):
        _add(item, f"input[{index}]", messages, first)
    return messages


def _add(item: Fields, where: str, messages: list[dict[str, Any]], first: int) -> None:
    """Appends what an item means to the messages. Reasoning, text and calls of one answer become one message.

    The messages before `first` do not come from items.
    """
    kind = item.get("type") or "message"
    last = messages[-1] if len(messages) > first and messages[-1]["role"] == "assistant" else None
    if kind == "function_call_output":
        output = _text_of(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": str(item.get("call_id") or ""), "content": output})
    elif kind == "function_call":
        call = _call(item, where)
        if last is not None:
            last.setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "tool_calls": [call]})
    elif kind == "reasoning":
        _add_to_answer("reasoning", _reasoning(item, where), last, messages)
    elif kind == "message" and item.get("role") == "assistant":
        _add_to_answer("content", _text_of(item.get("content"), f"{where}.content"), last, messages)
    elif kind == "message" and item.get("role") in ("user", "system", "developer"):
        messages.append({"role": item["role"], "content": _parts(item.get("content"), f"{where}.content")})
    else:
        raise _unknown(item, where)


def _add_to_answer(name: str, text: str, last: dict[str, Any] | None, messages: list[dict[str, Any]]) -> None:
    if last is not None and last.get(name) is None:
        last[name] = text
    else:
        messages.append({"role": "assistant", name: text})


def _unknown(item: Fields, where: str) -> InvalidRequest:
    kind = item.get("type") or "message"
    if kind == "item_reference":
        reason = "refers to something stored, and nothing is stored here. Send the item itself"
    elif kind == "message":
        reason = f"has the role '{str(item.get('role'))[:64]}'. It must be user, assistant, system or developer"
    else:
        reason = "is not supported. An input has messages, function_call, function_call_output and reasoning"
    return InvalidRequest(f"{where}: an item of type '{str(kind)[:64]}' {reason}.", param="input")


def _parts(content: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": text} for text in _texts(content, where)]


def _text_of(content: Any, where: str) -> str:
    return content if isinstance(content, str) else "\n".join(_texts(content, where))


def _texts(parts: Any, where: str) -> list[str]:
    """Returns the texts of parts. Raises InvalidRequest for parts that are not text."""
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
        raise InvalidRequest(f"{where}: it must be a text or a list of parts.", param="input")
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type")
        text = part.get("refusal") if kind == "refusal" else part.get("text")
        if not isinstance(kind, str) or kind not in TEXT_PARTS | {"refusal"} or not isinstance(text, str):
            raise InvalidRequest(
                f"{where}[{index}]: a part of type '{str(kind)[:64]}' is not supported, since this model "
                "reads only text.",
                param="input",
            )
        texts.append(text)
    return texts


def _reasoning(item: Fields, where: str) -> str:
    if item.get("encrypted_content"):
        raise InvalidRequest(
            f"{where}: encrypted_content cannot be read here. Send the item with its 'content', or leave it out.",
            param="input",
        )
    content, name = (item.get("content"), "content") if item.get("content") else (item.get("summary"), "summary")
    return "".join(_texts(content or [], f"{where}.{name}"))


def _call(item: Fields, where: str) -> dict[str, Any]:
    name, arguments = item.get("name"), item.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise InvalidRequest(f"{where}: a function_call needs a name, and arguments as JSON in a text.", param="input")
    function = {"name": name, "arguments": arguments}
    return {"id": str(item.get("call_id") or ""), "type": "function", "function": function}


def _tool(tool: Fields, where: str) -> dict[str, Any]:
    require_client_tool(tool, where, ("function",))
    names = ("name", "description", "parameters")
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    strict = {} if tool.get("strict") is None else {"strict": tool["strict"]}
    return {"type": "function", "function": function, **strict}


def _named(choice: Fields) -> dict[str, Any]:
    if choice.get("type") != "function":
        raise InvalidRequest(
            f"'tool_choice' of type '{str(choice.get('type'))[:64]}' is not served here. Use none, auto or required, "
            "or name a function.",
            param="tool_choice",
        )
    return {"type": "function", "function": {"name": choice.get("name")}}


def _format(wanted: Fields) -> dict[str, Any] | None:
    if wanted.get("type") != "json_schema":
        return None if wanted.get("type") == "text" else dict(wanted)
    names = ("name", "description", "schema", "strict")
    return {
        "type": "json_schema",
        "json_schema": {name: wanted[name] for name in names if wanted.get(name) is not None},
    }
