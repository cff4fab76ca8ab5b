"""Defines the engine's vocabulary: how to sample, a text that is being generated, and what the engine reports of it."""

from collections.abc import Mapping
from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass, field
from typing import Any, Literal

from serve_app.engines.pt.core.lora.adapter import Adapter
from serve_app.engines.pt.grammar.process import Grammar

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """Says how to choose the next token, and when to stop.

    `temperature` 0 is greedy. `top_k` 0 means all tokens. `logprobs` is how many alternatives to report beside the
    chosen token, or None for no log probabilities at all. `logit_bias` is added to the logits by token id. `grammar`
    says which tokens may come next.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Logprobs:
    """These are natural logarithms of the probabilities of the chosen token and the best ones, before any penalty or
    temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Sequence:
    """This is one prompt and what was generated for it. It belongs to the engine's thread once it is submitted.

    Sequences of one `owner`, the request that they came with, wait in one line (`FairQueue`). A sequence that `pools`
    generates nothing: its prompt's vector is its only output. All of its tokens are computed with `adapter`, or with
    the base model if that is None. `cached` counts the tokens whose keys and values are in the batch cache, and `kept`
    those of the prompt that an earlier text had. `sampling` is the sampler's own state, `drafting` the speculator's.
    """

    prompt_ids: ReadOnlySequence[int]
    params: SamplingParams
    owner: object = field(default_factory=object, kw_only=True)
    pools: bool = field(default=False, kw_only=True)
    adapter: Adapter | None = field(default=None, kw_only=True)
    output_ids: list[int] = field(default_factory=list)
    cached: int = 0
    kept: int = 0
    sampling: Any = None
    drafting: Any = None

    @property
    def length(self) -> int:
        """Returns the number of tokens of prompt and output so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def need(self) -> int:
        """Returns its tokens at its longest, for which the cache must have room."""
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def token_ids(self) -> list[int]:
        """Returns the ids of prompt and output."""
        return [*self.prompt_ids, *self.output_ids]


@dataclass(frozen=True)
class Output:
    """What one step did for one sequence: a new token, an end, an error, or the vector of a sequence that pools.

    Nothing follows an output with one of the last three.
    """

    sequence: Sequence
    token_id: int | None = None
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    vector: list[float] | None = None

    @property
    def is_last(self) -> bool:
        """Returns whether nothing follows."""
        return self.finish_reason is not None or self.error is not None or self.vector is not None


@dataclass(frozen=True)
class Piece:
    """New text of one choice, and how many tokens it has generated so far. `stopped_by` is the stop string that has
    ended it, and `kept` counts the tokens of its prompt that the prompt cache had."""

    text: str
    tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[Logprobs, ...] = ()
    stopped_by: str | None = None
    kept: int = 0
