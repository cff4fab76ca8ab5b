"""What format vLLM writes for a request with tools. It runs in a fork of `tests/warm_vllm.py`."""

import os
from types import SimpleNamespace
from typing import Any

from serve_app.facts.checkpoint import DEMO_MODEL, model_path

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"topic": {"enum": ["router", "backends"]}},
            "required": ["topic"],
            "additionalProperties": False,
        },
    },
}
ASKED: dict[str, dict[str, Any]] = {
    "auto": {"tool_choice": "auto"},
    "single": {"tool_choice": "auto", "parallel_tool_calls": False},
    "required": {"tool_choice": "required"},
    "named": {"tool_choice": {"type": "function", "function": {"name": "look_up"}}},
}


def formats(environment: dict[str, str], backend: str) -> dict[str, str | None]:
    """The kind of format for each way to ask for calls. Raises what vLLM raises if the backend does not read one."""
    os.environ.update(environment)
    from transformers import AutoTokenizer
    from vllm.config import StructuredOutputsConfig
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser import ParserManager

    tokenizer = AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))
    kind = ParserManager.get_parser(tool_parser_name="hermes", enable_auto_tools=True)
    assert kind is not None
    found: dict[str, str | None] = {}
    for name, fields in ASKED.items():
        request = ChatCompletionRequest.model_validate(
            {"messages": [{"role": "user", "content": "x"}], "model": "m", "tools": [TOOL], **fields}
        )
        adjusted = kind(tokenizer, request.tools).adjust_request(request)
        params = adjusted.to_sampling_params(8, {})
        of_model: Any = SimpleNamespace(is_diffusion=False)
        params._validate_structured_outputs(of_model, StructuredOutputsConfig(backend=backend), tokenizer)
        formatted = params.structured_outputs
        named = ("json", "structural_tag")
        found[name] = None if formatted is None else next(one for one in named if getattr(formatted, one) is not None)
    return found
