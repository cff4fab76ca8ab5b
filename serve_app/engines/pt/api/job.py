"""Describes a checked request, and gathers what its choices have generated."""

from dataclasses import dataclass, replace
from functools import cached_property

from serve_app.engines.pt.api.protocol import ChatRequest, CompletionRequest
from serve_app.engines.pt.api.tool_calls import Delta, MessageReader
from serve_app.engines.pt.core.sequence import FinishReason, Logprobs, Piece, SamplingParams


@dataclass(frozen=True)
class Job:
    """One checked request says what to generate. `n` choices follow each prompt.

    Each choice has one of `readers`, and of `openings`, the texts that the choices begin with. `model` is the name of
    the model or adapter that answers.
    """

    request: ChatRequest | CompletionRequest
    prompts: list[list[int]]
    params: SamplingParams
    readers: list[MessageReader]
    openings: list[str]
    model: str

    @property
    def prompt_tokens(self) -> int:
        """Returns the number of tokens of all prompts together."""
        return sum(map(len, self.prompts))

    @cached_property
    def choices(self) -> list[tuple[list[int], SamplingParams]]:
        """Returns prompt and sampling of each choice. With a seed, each choice of a prompt has a seed of its own."""
        n, seed = self.request.choices, self.params.seed
        return [
            (prompt, self.params if seed is None or number == 0 else replace(self.params, seed=seed + number))
            for prompt in self.prompts
            for number in range(n)
        ]


def is_nothing(piece: Piece, delta: Delta) -> bool:
    """Returns whether a piece that means `delta` has nothing to send yet, because its reader waits for the end of a
    call."""
    return delta == Delta() and piece.finish_reason is None and not piece.logprobs


class ChoiceProgress:
    """Keeps how far one choice is, and nothing that grows with it."""

    def __init__(self) -> None:
        self.tokens = 0
        self.reasoning_tokens = 0
        self.kept = 0
        self.characters = 0
        self.stopped_by: str | None = None
        self._has_calls = False
        self._reason: FinishReason | None = None

    def add(self, piece: Piece, delta: Delta) -> None:
        """Takes the next piece of the choice, and the meaning of its text."""
        self.tokens = piece.tokens
        self.characters += len(delta.content)
        self.stopped_by = piece.stopped_by
        self.kept = piece.kept
        if delta.reasoning:  # The tags count as thinking.
            self.reasoning_tokens = piece.tokens
        self._has_calls = self._has_calls or bool(delta.calls)
        self._reason = piece.finish_reason

    def finish_reason(self, job: Job) -> str | None:
        """Returns OpenAI's reason: `tool_calls` if the model chose to call. A call that was demanded by name just
        stops."""
        named = isinstance(job.request, ChatRequest) and job.request.named_tool is not None
        return "tool_calls" if self._reason == "stop" and self._has_calls and not named else self._reason


class ContentLogprobs:
    """Tells which log probabilities belong to the text of the answer: not those of the thinking, its tags and calls.
    An entry may come before its text, which waits for the next token."""

    def __init__(self) -> None:
        self._waiting: list[Logprobs] = []

    def add(self, piece: Piece, delta: Delta) -> list[Logprobs]:
        """Takes the next piece and its meaning, and returns the entries of the content that came with it."""
        self._waiting += piece.logprobs
        if not (delta.content or delta.reasoning or delta.calls or delta.is_thinking):
            return []
        found, self._waiting = self._waiting, []
        return found if delta.content else []


class WholeChoice(ChoiceProgress):
    """Gathers one choice as a whole. Its pieces are joined once."""

    def __init__(self, opening: str = ""):
        super().__init__()
        self._deltas = [Delta(opening)]
        self._size = len(opening)
        self._content = ContentLogprobs()
        self.logprobs: list[Logprobs] = []
        self.content_logprobs: list[Logprobs] = []

    def add(self, piece: Piece, delta: Delta) -> None:
        """Takes the next piece of the choice, and the meaning of its text."""
        super().add(piece, delta)
        self._deltas.append(delta)
        self._size += len(piece.text) + 64 * sum(1 + len(item.top) for item in piece.logprobs)
        self.logprobs += piece.logprobs
        self.content_logprobs += self._content.add(piece, delta)

    @property
    def size(self) -> int:
        """Returns about how many bytes its JSON has. An entry of log probabilities has some 64."""
        return self._size

    @property
    def delta(self) -> Delta:
        """Joins the whole answer. The work grows with it."""
        return Delta.join(self._deltas)
