"""The chat requests that stand for messages and responses have the prompts that vLLM makes of them.

Both engines then see the same prompt, and the router can continue a stream of either.
"""

from copy import deepcopy
from typing import Any

import pytest

from serve_app.wire.anthropic.chat_request import chat_request as chat_of_messages
from serve_app.wire.responses.chat_request import chat_request as chat_of_responses
from tests.contracts.contract import contract

MESSAGES, RESPONSES = "serve_app/wire/anthropic/chat_request.py", "serve_app/wire/responses/chat_request.py"

# It imports vLLM.
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.slow,
]

TEXT = {"type": "text", "text": "Hello"}
CALL = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, TEXT, CALL]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [TEXT, TEXT]}, TEXT, TEXT]},
    {"role": "assistant", "content": [CALL]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "ok"}]},
]
BILLING = {"type": "text", "text": "x-anthropic-billing-header: x"}
BODIES: list[dict[str, Any]] = [
    {"messages": TURNS},
    {"messages": TURNS, "system": "You are helpful."},
    {"messages": TURNS, "system": [BILLING, TEXT, TEXT]},
    {"messages": [*TURNS, {"role": "system", "content": [TEXT]}, TURNS[0]]},
    {"messages": TURNS[:1], "stop_sequences": ["a"], "top_k": 5, "top_p": 0.5, "temperature": 0.5, "stream": True},
    {"messages": TURNS[:1], "thinking": {"type": "disabled"}},
    {"messages": TURNS[:1], "output_config": {"effort": "high"}},
    *({"messages": TURNS[:1], "tools": [{"name": "f", "input_schema": {"properties": {}}}], "tool_choice": choice}
      for choice in ({"type": "auto"}, {"type": "any", "disable_parallel_tool_use": True}, {"type": "none"},
                     {"type": "tool", "name": "f"})),
]  # fmt: skip
SAME = (
    "model", "max_tokens", "stop", "top_k", "top_p", "temperature", "tool_choice", "parallel_tool_calls",
    "reasoning_effort",
)  # fmt: skip


def plain(message: Any) -> dict[str, Any]:
    """A message without what is not there."""
    fields = message if isinstance(message, dict) else message.model_dump()
    return {name: value for name, value in fields.items() if value is not None and name != "reasoning_content"}


@contract("vllm", "what it makes of a request to the Messages API", MESSAGES)
def test_messages_have_vllms_prompt() -> None:
    """Every kind of block, and each field that has another name."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    for body in BODIES:
        asked = {"model": "m", "max_tokens": 5, **body}
        theirs = AnthropicServingMessages.to_chat_completion_request(AnthropicMessagesRequest.model_validate(asked))
        ours = chat_of_messages(asked)
        assert [plain(message) for message in ours["messages"]] == [plain(each) for each in theirs.messages], body
        said = theirs.model_dump(exclude_none=True)
        for name in SAME:
            default = {"tool_choice": "auto" if "tools" in body else "none", "stop": [], "parallel_tool_calls": True}
            assert (ours.get(name) or default.get(name)) == (said.get(name) or default.get(name)), (name, body)
        function = [tool["function"] for tool in ours.get("tools", ())]
        assert [(each["name"], each["parameters"]) for each in function] == [
            (tool["function"]["name"], tool["function"]["parameters"]) for tool in said.get("tools") or ()
        ]


OUTPUT = {"type": "output_text", "text": "Hello", "annotations": []}
ITEMS: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [OUTPUT]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}'},
    {"type": "function_call", "call_id": "d", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "ok"},
    {"type": "function_call_output", "call_id": "d", "output": "ok"},
    {"role": "assistant", "content": "Done."},
    {"type": "function_call", "call_id": "e", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "e", "output": "ok"},
    {"role": "user", "content": "Thanks"},
]


@contract("vllm", "what it makes of a request to the Responses API", RESPONSES)
def test_responses_have_vllms_prompt() -> None:
    """Each kind of item, as it is merged into messages."""
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.utils import construct_input_messages

    for given in ("Hello", ITEMS):
        asked = {"model": "m", "input": given, "instructions": "You are helpful."}
        request = ResponsesRequest.model_validate(deepcopy(asked))  # It changes what it is given.
        theirs = construct_input_messages(request_instructions=request.instructions, request_input=request.input)
        ours = chat_of_responses(asked)["messages"]
        assert [plain(message) for message in ours] == [plain(message) for message in theirs]
