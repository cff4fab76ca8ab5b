"""Chooses the next token from logits."""

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serve_app.engines.pt.sequence import SamplingParams, Sequence


def sample(sequence: Sequence, logits: torch.Tensor) -> int:
    """The next token of one sequence. `logits` is float32 on the CPU, shape (vocabulary,).

    Each sequence has a random generator of its own, so that a seed gives the same text whatever else runs.
    """
    params = sequence.params
    scores = logits[None]
    if params.repetition_penalty != 1.0:
        seen = torch.tensor([[*sequence.prompt_ids, *sequence.output_ids]])
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(seen, scores)
    if params.temperature == 0:
        return int(scores.argmax())
    probabilities = _warpers(params)(None, scores).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=_generator(sequence)))


def _warpers(params: SamplingParams) -> LogitsProcessorList:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers


def _generator(sequence: Sequence) -> torch.Generator:
    if sequence.random is None:
        sequence.random = torch.Generator()
        if sequence.params.seed is None:
            sequence.random.seed()
        else:
            sequence.random.manual_seed(sequence.params.seed)
    generator: torch.Generator = sequence.random
    return generator
