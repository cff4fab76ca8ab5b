"""Turns the body of a request to Anthropic's Messages API into that of a chat completion.

The messages are those that vLLM makes of such a body, so both engines see the same prompt. What stands in a body
without any effect is cache_control (caches find their texts themselves), citations that are off, is_error of a
tool_result (chat templates have no place for it), and the signature of a thinking block.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.errors import InvalidRequest

Fields = Mapping[str, Any]

# Claude Code begins its system prompt with a line that differs with every request and would keep prompts from being
# found in a cache. vLLM leaves it out too.
BILLING_LINE = "x-anthropic-billing-header"
# These fields mean the same in a chat completion, under these names there.
RENAMED = {
    "model": "model", "max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k",
    "stop_sequences": "stop", "stream": "stream", "chat_template_kwargs": "chat_template_kwargs",
}  # fmt: skip
# Errors of the chat completion name its own fields and values, and these are their names here.
NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config",
    "required": "any",
    "reasoning_effort": "thinking",
}


def chat_request(asked: Fields, merge_system: bool = False) -> dict[str, Any]:
    """Returns the body of the chat completion.

    `merge_system` puts system messages that come later into the first one, for chat templates that refuse them.
    The types of the fields must have been checked, but blocks are checked here. Raises InvalidRequest with the place
    of a block that this does not know.
    """
    chat = {name: asked[field] for field, name in RENAMED.items() if asked.get(field) is not None}
    chat["messages"] = _messages(asked, merge_system)
    if tools := asked.get("tools"):
        chat["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    chat |= _choice(asked.get("tool_choice")) | _output(asked.get("output_config")) | _thinking(asked)
    if chat.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    if _is_begun(asked["messages"]):
        chat |= {"add_generation_prompt": False, "continue_final_message": True}
    return chat


def _messages(asked: Fields, merge_system: bool) -> list[dict[str, Any]]:
    system = _system_text(asked.get("system") or "", "system")
    messages: list[dict[str, Any]] = []
    given = asked["messages"]
    if given and given[-1]["role"] == "assistant" and not _has_content(given[-1]["content"]):
        given = given[:-1]  # It begins an answer with nothing, as an answer begins without it.
    for index, message in enumerate(given):
        where, role, content = f"messages[{index}]", message["role"], message["content"]
        if role == "system":
            text = _system_text(content, where)
            if merge_system:
                system += text
            elif text:
                messages.append({"role": "system", "content": text})
        elif isinstance(content, str):
            messages.append({"role": role, "content": content})
        else:
            messages += _of_blocks(role, content, where)
    return [{"role": "system", "content": system}, *messages] if system else messages


def _system_text(content: str | Sequence[Fields], where: str) -> str:
    """Returns the text of a system prompt. Its blocks follow each other without anything between them."""
    if isinstance(content, str):
        texts = [content]
    else:
        texts = [_text(block, f"{where}[{index}]") for index, block in enumerate(content)]
    return "".join(text for text in texts if not text.startswith(BILLING_LINE))


def _text(block: Fields, where: str) -> str:
    """Returns the text of a block. Raises InvalidRequest for one of another type."""
    text = block.get("text")
    if block.get("type") != "text" or not isinstance(text, str):
        raise _unknown(block, where)
    return text


def _of_blocks(role: str, blocks: Sequence[Fields], where: str) -> list[dict[str, Any]]:
    """Returns the messages of one message's blocks: the results of tools first, each as a message of its own."""
    results: list[dict[str, Any]] = []
    parts: list[dict[str, str]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for index, block in enumerate(blocks):
        place, kind = f"{where}.content[{index}]", block.get("type")
        if kind == "tool_result" and role == "user":
            results.append(_result(block, place))
        elif kind == "tool_use" and role == "assistant":
            calls.append(_call(block, place))
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "redacted_thinking" and role == "assistant":
            continue  # Only its writer can read it.
        elif text := _text(block, place):
            parts.append({"type": "text", "text": text})
    message: dict[str, Any] = {"role": role}
    if parts:
        message["content"] = parts[0]["text"] if len(parts) == 1 else parts
    if thoughts:
        message["reasoning"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    is_needed = len(message) > 1 or role == "assistant"
    return [*results, message] if is_needed else results


def _call(block: Fields, where: str) -> dict[str, Any]:
    name, given = block.get("name"), block.get("input")
    if not isinstance(name, str) or not isinstance(given, Mapping | None):
        raise InvalidRequest(
            f"{where}: a tool_use block needs a name and an input, which is an object.", param="messages"
        )
    return {
        "id": str(block.get("id") or ""),
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(given or {}, ensure_ascii=False)},
    }


def _result(block: Fields, where: str) -> dict[str, Any]:
    content = block.get("content") or ""
    if not isinstance(content, str):
        if not isinstance(content, list) or not all(isinstance(item, Mapping) for item in content):
            raise InvalidRequest(f"{where}.content: it must be a text or a list of blocks.", param="messages")
        content = "\n".join(_text(item, f"{where}.content[{index}]") for index, item in enumerate(content))
    return {"role": "tool", "tool_call_id": str(block.get("tool_use_id") or ""), "content": content}


def _unknown(block: Fields, where: str) -> InvalidRequest:
    return InvalidRequest(
        f"{where}: a block of type '{str(block.get('type'))[:64]}' is not supported here, since this model reads only "
        "text. Messages may have text, and those of their role may have tool_use, tool_result and thinking.",
        param=where.partition("[")[0],
    )


def _tool(tool: Fields, where: str) -> dict[str, Any]:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise InvalidRequest(
            f"{where}: the tool type '{str(kind)[:64]}' is run by Anthropic's servers and is not served here. "
            "Define it as a tool of your own, with an input_schema.",
            param="tools",
        )
    function = {"name": tool["name"], "parameters": {"type": "object", **tool["input_schema"]}}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _choice(choice: Fields | None) -> dict[str, Any]:
    if choice is None:
        return {}
    kinds: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    named = {"type": "function", "function": {"name": choice.get("name")}}
    chosen: dict[str, Any] = {"tool_choice": kinds.get(choice["type"], named)}
    return chosen | ({"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {})


def _output(config: Fields | None) -> dict[str, Any]:
    wanted = (config or {}).get("format")
    if not wanted:
        return {}
    schema = {"name": "json_schema", "schema": wanted["schema"]}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _thinking(asked: Fields) -> dict[str, Any]:
    """Returns what says how much the model shall think. A budget of tokens is not enforced."""
    kind = (asked.get("thinking") or {}).get("type")
    effort = (asked.get("output_config") or {}).get("effort")
    if kind == "disabled":
        return {"reasoning_effort": "none"}
    given = asked.get("chat_template_kwargs") or {}
    wanted = {"chat_template_kwargs": {"enable_thinking": True, **given}} if kind == "enabled" else {}
    return wanted if effort is None else {**wanted, "reasoning_effort": effort}


def _is_begun(messages: Sequence[Fields]) -> bool:
    """Returns whether the last message is the beginning of the answer, which Anthropic's API has the model continue."""
    last = messages[-1] if messages else {}
    content = last.get("content") or ""
    if last.get("role") != "assistant" or not _has_content(content):
        return False
    return isinstance(content, str) or all(block.get("type") == "text" for block in content)


def _has_content(content: str | Sequence[Fields]) -> bool:
    """Returns whether a message has more than empty text."""
    if isinstance(content, str):
        return bool(content)
    return any(block.get("type") != "text" or block.get("text") != "" for block in content)
