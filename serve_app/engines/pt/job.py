"""One checked request, and how its answer is written: the two shapes of OpenAI's objects."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from serve_app.engines.pt.logprobs import LogprobsWriter, chat_logprobs, text_logprobs
from serve_app.engines.pt.protocol import ChatRequest, CompletionRequest
from serve_app.engines.pt.sequence import SamplingParams


@dataclass(frozen=True)
class Shape:
    """How one endpoint writes its objects. `whole` and `delta` make the part of a choice that holds text."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    whole: Callable[[str], dict[str, Any]]
    delta: Callable[[str], dict[str, Any]]
    opening: dict[str, Any] | None
    logprobs: LogprobsWriter


@dataclass(frozen=True)
class Job:
    """One checked request: what to generate, and how its answer is written. `n` choices follow each prompt."""

    request: ChatRequest | CompletionRequest
    prompts: list[list[int]]
    params: SamplingParams
    shape: Shape

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(map(len, self.prompts))

    @property
    def choices(self) -> list[tuple[list[int], SamplingParams]]:
        """Prompt and sampling of each choice. With a seed, each choice of a prompt has a seed of its own."""
        n, seed = self.request.choices, self.params.seed
        return [
            (prompt, self.params if seed is None or number == 0 else replace(self.params, seed=seed + number))
            for prompt in self.prompts
            for number in range(n)
        ]


CHAT = Shape(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text}},
    delta=lambda text: {"delta": {"content": text} if text else {}},
    opening={"delta": {"role": "assistant", "content": ""}, "logprobs": None},
    logprobs=chat_logprobs,
)
TEXT = Shape(
    "cmpl-",
    "text_completion",
    "text_completion",
    whole=lambda text: {"text": text},
    delta=lambda text: {"text": text},
    opening=None,
    logprobs=text_logprobs,
)
