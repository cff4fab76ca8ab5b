"""The engine's vocabulary: how to sample, one text being generated, and what the engine reports of it."""

from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token, and when to stop. `temperature` 0 is greedy; `top_k` 0 means all tokens."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False


@dataclass(eq=False)
class Sequence:
    """One prompt and what was generated for it. Owned by the engine's thread once it is submitted.

    `cache` is the model runner's, `random` the sampler's; nobody else looks inside.
    """

    prompt_ids: ReadOnlySequence[int]
    params: SamplingParams
    output_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cache: Any = None
    random: Any = None

    @property
    def length(self) -> int:
        """Tokens so far, prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)


@dataclass(frozen=True)
class Output:
    """What one step did for one sequence: a new token, an end, or an error. One of the last two is the last output."""

    sequence: Sequence
    token_id: int | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
