"""Chooses the next token of every row of a batch, each row in its own way.

The order is vLLM's: first log probabilities of the raw logits, then what is allowed (grammar, min_tokens) and
logit_bias, then penalties, then temperature, then min_p, top_k and top_p. A row that asks for nothing costs nothing.

A sequence draws one number for each token from its own random generator, so that a seed gives the same text whatever
else is in the batch.
"""

import random
import time
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from serve_app.engines.pt.core.sequence import FinishReason, Logprobs, SamplingParams, Sequence
from serve_app.engines.pt.grammar.compiler import constrain
from serve_app.engines.pt.grammar.process import Matcher
from serve_app.errors import RequestError


@dataclass
class SamplingState:
    """Keeps what the sampler remembers of a sequence. Counts have shape (vocabulary,), or are None without a
    penalty."""

    random: random.Random
    prompt_seen: torch.Tensor | None = None
    output_counts: torch.Tensor | None = None
    bias: tuple[torch.Tensor, torch.Tensor] | None = None
    matcher: Matcher | None = None


class Sampled(NamedTuple):
    """This is one row's next token, or the reason why its output format allows none."""

    token_id: int
    logprobs: Logprobs | None = None
    problem: RequestError | None = None


@dataclass(frozen=True)
class Sampler:
    """Samples the next tokens. `eos_ids` end a text, and are forbidden until `min_tokens`."""

    eos_ids: frozenset[int] = field(default_factory=frozenset)

    def late(self, sequences: ReadOnlySequence[Sequence], wait_s: float) -> list[Sequence]:
        """Returns the sequences whose masks are not ready after waiting at most `wait_s` seconds for all of them
        together."""
        until = time.monotonic() + wait_s
        matchers = [(sequence, matcher) for sequence in sequences if (matcher := _matcher(sequence)) is not None]
        return [sequence for sequence, matcher in matchers if not matcher.is_ready(until)]

    def problem(self, sequence: Sequence) -> RequestError | None:
        """Returns why the sequence's format cannot be followed any more, or None if it can."""
        matcher = _matcher(sequence)
        return None if matcher is None else matcher.problem

    def finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        """Returns why the text ends with `token`, which comes next, or None if it goes on."""
        if token in self.eos_ids and not sequence.params.ignore_eos:
            return "stop"
        return "length" if len(sequence.output_ids) + 1 >= sequence.params.max_tokens else None

    def is_slow(self, sequence: Sequence) -> bool:
        """Returns whether the mask before the one that the sequence waits for was late too."""
        matcher = _matcher(sequence)
        return matcher is not None and matcher.was_late

    def forget(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended."""
        if (matcher := _matcher(sequence)) is not None:
            matcher.close()
        sequence.sampling = None

    def sample(self, sequences: list[Sequence], logits: torch.Tensor) -> list[Sampled]:
        """Returns the next token and log probabilities of each row of `logits`, of shape (sequences, vocabulary).

        No sequence may be `late`.
        """
        logits = logits.float()
        if all(_is_plain(sequence.params) for sequence in sequences):
            return [Sampled(token) for token in logits.argmax(-1).tolist()]
        states = [_state(sequence, logits.shape[-1], logits.device) for sequence in sequences]
        scores = self._adjusted(sequences, states, logits)
        tokens = _choose(sequences, states, scores)
        reports = _logprobs(sequences, logits, tokens)
        for state, token in zip(states, tokens, strict=True):
            if state.output_counts is not None:
                state.output_counts[token] += 1
        problems = [state.matcher.problem if state.matcher else None for state in states]
        for sequence, state, token in zip(sequences, states, tokens, strict=True):
            # A mask that nothing would read is not asked for.
            if state.matcher and not state.matcher.problem and not self.finish_reason(sequence, token):
                state.matcher.accept(token)
        return list(map(Sampled, tokens, reports, problems))

    def _adjusted(self, sequences: list[Sequence], states: list[SamplingState], logits: torch.Tensor) -> torch.Tensor:
        scores = logits.clone()
        masks = {row: state.matcher.mask for row, state in enumerate(states) if state.matcher and state.matcher.mask}
        if masks:
            constrain(scores, masks)
        for row, (sequence, state) in enumerate(zip(sequences, states, strict=True)):
            params = sequence.params
            if len(sequence.output_ids) < params.min_tokens:
                scores[row, [token for token in self.eos_ids if token < scores.shape[-1]]] = -torch.inf
            if state.bias is not None:
                scores[row, state.bias[0]] += state.bias[1]
            if state.output_counts is not None and state.prompt_seen is not None:
                _penalize(scores[row], params, state.prompt_seen, state.output_counts)
        return scores


def _matcher(sequence: Sequence) -> Matcher | None:
    state: SamplingState | None = sequence.sampling
    return None if state is None else state.matcher


def _is_plain(params: SamplingParams) -> bool:
    """Returns whether the row is greedy and asks for nothing else."""
    return (
        params.temperature == 0
        and params.logprobs is None
        and not params.logit_bias
        and params.min_tokens == 0
        and params.grammar is None
        and not _has_penalty(params)
    )


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _state(sequence: Sequence, vocabulary: int, device: torch.device) -> SamplingState:
    if sequence.sampling is None:
        params = sequence.params
        # A random choice of tokens is no secret, and Python's generator is cheap to make and to draw from.
        state = SamplingState(random.Random(params.seed))  # noqa: S311
        if _has_penalty(params):
            state.output_counts = _counts(sequence.output_ids, vocabulary, device)
            state.prompt_seen = _counts(list(sequence.prompt_ids), vocabulary, device) > 0
        if params.logit_bias:
            known = {token: bias for token, bias in params.logit_bias.items() if token < vocabulary}
            ids = torch.tensor(list(known), dtype=torch.long, device=device)
            state.bias = ids, torch.tensor(list(known.values()), dtype=torch.float, device=device)
        if params.grammar is not None:
            state.matcher = params.grammar.matcher()
        sequence.sampling = state
    found: SamplingState = sequence.sampling
    return found


def _counts(ids: list[int], vocabulary: int, device: torch.device) -> torch.Tensor:
    return torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=vocabulary)[:vocabulary].to(device)


def _penalize(scores: torch.Tensor, params: SamplingParams, prompt_seen: torch.Tensor, counts: torch.Tensor) -> None:
    """Applies the repetition penalty (Keskar et al. 2019) for prompt and output, and OpenAI's presence and frequency
    penalties for the output."""
    if params.repetition_penalty != 1:
        seen = prompt_seen | (counts > 0)
        penalty = params.repetition_penalty
        scores.copy_(torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores))
    scores -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _choose(sequences: list[Sequence], states: list[SamplingState], scores: torch.Tensor) -> list[int]:
    tokens: list[int] = scores.argmax(-1).tolist()
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.temperature > 0]
    if not rows:
        return tokens
    params = [sequences[row].params for row in rows]
    column = _columns(params, scores.device)
    scaled = scores[rows] / column(lambda item: item.temperature)
    probabilities = _truncate(scaled, params, column).softmax(-1)
    # By inverse transform, it takes the first token whose cumulated probability is over the number that was drawn.
    cumulated = probabilities.double().cumsum(-1)
    drawn = torch.tensor([[states[row].random.random()] for row in rows], dtype=torch.double, device=scores.device)
    chosen = torch.searchsorted(cumulated, drawn * cumulated[:, -1:], right=True)[:, 0]
    for row, token in zip(rows, chosen.clamp(max=scores.shape[-1] - 1).tolist(), strict=True):
        tokens[row] = token
    return tokens


def _columns(params: list[SamplingParams], device: torch.device) -> Callable[[Callable[[SamplingParams], float]], Any]:
    """Returns a function that turns one value for each row into a column tensor of shape (rows, 1)."""

    def column(value: Callable[[SamplingParams], float]) -> torch.Tensor:
        return torch.tensor([[value(item)] for item in params], device=device)

    return column


def _truncate(scaled: torch.Tensor, params: list[SamplingParams], column: Any) -> torch.Tensor:
    """Sets what min_p, top_k and top_p exclude to minus infinity."""
    if any(item.min_p > 0 for item in params):
        # p < min_p · p_max, in logarithms.
        floor = scaled.amax(-1, keepdim=True) + column(lambda item: item.min_p).log()
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    if all(item.top_k == 0 and item.top_p == 1 for item in params):
        return scaled
    ordered, order = scaled.sort(-1, descending=True)
    places = torch.arange(scaled.shape[-1], device=scaled.device)[None]
    excluded = places >= column(lambda item: min(item.top_k or scaled.shape[-1], scaled.shape[-1]))
    before = ordered.masked_fill(excluded, -torch.inf).softmax(-1).cumsum(-1)
    before = before - before.diff(dim=-1, prepend=torch.zeros_like(before[:, :1]))  # what stands before each token
    excluded |= (before >= column(lambda item: item.top_p)) & (places > 0)
    return torch.empty_like(scaled).scatter_(-1, order, ordered.masked_fill(excluded, -torch.inf))


def _logprobs(sequences: list[Sequence], logits: torch.Tensor, tokens: list[int]) -> list[Logprobs | None]:
    reports: list[Logprobs | None] = [None] * len(sequences)
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
    if not rows:
        return reports
    logs = logits[rows].log_softmax(-1)
    most = max(sequences[row].params.logprobs or 0 for row in rows)
    best = logs.topk(min(max(most, 1), logs.shape[-1]), -1)
    for place, row in enumerate(rows):
        count = sequences[row].params.logprobs or 0
        pairs = zip(best.indices[place, :count].tolist(), best.values[place, :count].tolist(), strict=True)
        reports[row] = Logprobs(tokens[row], float(logs[place, tokens[row]]), tuple(pairs))
    return reports
