"""Which numbers vLLM takes. It runs in a fork of `tests/warm_vllm.py`."""

from typing import Any


def taken(numbers: list[tuple[str, float]]) -> list[bool]:
    """Whether vLLM takes each field with this number in a chat request."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.exceptions import VLLMValidationError

    def takes(name: str, number: float) -> bool:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "model": "m", "max_tokens": 8}
        try:
            ChatCompletionRequest.model_validate(body | {name: number}).to_sampling_params(8, {})
        except (ValueError, VLLMValidationError):
            return False
        return True

    return [takes(name, number) for name, number in numbers]
