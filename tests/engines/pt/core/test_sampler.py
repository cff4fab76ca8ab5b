"""Choosing tokens, each row in its own way."""

import math

import pytest
import torch

from serve_app.engines.pt.core.sampler import Sampler
from serve_app.engines.pt.core.sequence import SamplingParams, Sequence

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def sequence(prompt: tuple[int, ...] = (3,), output: tuple[int, ...] = (), **params: object) -> Sequence:
    """A sequence with such parameters."""
    return Sequence(prompt, SamplingParams(max_tokens=9, **params), list(output))  # type: ignore[arg-type]


def draw(count: int, **params: object) -> list[int]:
    """What one sampled sequence draws again and again from the same logits."""
    drawing = sequence(**params)
    sampler = Sampler()
    return [sampler.sample([drawing], LOGITS[None])[0][0] for _ in range(count)]


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    """A greedy row takes the best token whatever stands beside it."""
    rows = [sequence(temperature=0), sequence(seed=1), sequence(temperature=0)]
    tokens = [row.token_id for row in Sampler().sample(rows, torch.stack([LOGITS, LOGITS, LOGITS.flip(0)]))]
    assert (tokens[0], tokens[2]) == (0, 3)


def test_a_seed_repeats_whatever_else_is_in_the_batch() -> None:
    """Alone, and between other rows."""
    alone = draw(20, seed=7)
    seeded, other = sequence(seed=7), sequence(seed=8)
    sampler = Sampler()
    beside = [sampler.sample([other, seeded], LOGITS.repeat(2, 1))[1][0] for _ in range(20)]
    assert alone == beside
    assert alone != draw(20, seed=9)


def test_frequencies_follow_the_probabilities() -> None:
    """A thousand draws are within four standard deviations of what softmax says."""
    tokens = draw(1000, seed=1)
    for token, probability in enumerate(LOGITS.softmax(-1).tolist()):
        deviation = math.sqrt(1000 * probability * (1 - probability))
        assert abs(tokens.count(token) - 1000 * probability) < 4 * deviation


@pytest.mark.parametrize(
    ("params", "possible"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),  # 0.64 alone is enough
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 1e-6}, {0}),
        ({"min_p": 0.3}, {0, 1}),  # e⁻¹ = 0.37 of the best, e⁻² = 0.14
        ({"temperature": 1e-4}, {0}),
        ({"logit_bias": {2: 100.0}}, {2}),
        ({"logit_bias": {0: -100.0}, "top_k": 1}, {1}),
    ],
)
def test_what_is_excluded_is_never_drawn(params: dict[str, object], possible: set[int]) -> None:
    """And all the rest is, sooner or later."""
    assert set(draw(300, seed=3, **params)) == possible


def test_the_end_is_forbidden_until_min_tokens() -> None:
    """Then it is free again."""
    sampler = Sampler(frozenset({0}))
    early, late = (
        sequence(temperature=0, min_tokens=2, output=(1,)),
        sequence(temperature=0, min_tokens=2, output=(1, 1)),
    )
    assert [row.token_id for row in sampler.sample([early, late], LOGITS.repeat(2, 1))] == [1, 0]


def test_repetition_counts_prompt_and_output() -> None:
    """A positive logit is divided, a negative one multiplied (Keskar et al. 2019)."""
    row = sequence(prompt=(0,), output=(1,), temperature=0, repetition_penalty=10.0)
    logits = torch.tensor([[2.0, 1.0, 0.3, -1.0]])
    assert Sampler().sample([row], logits)[0][0] == 2


def test_presence_and_frequency_count_the_output_only() -> None:
    """The prompt's token 0 is not punished; the output's token 0, three times there, is."""
    fresh = sequence(prompt=(0,), temperature=0, presence_penalty=2.0)
    spent = sequence(output=(0, 0, 0), temperature=0, frequency_penalty=0.5)
    assert [row.token_id for row in Sampler().sample([fresh, spent], LOGITS.repeat(2, 1))] == [0, 1]


def test_penalties_count_what_was_drawn_since() -> None:
    """Each drawn token is punished at the next draw."""
    row = sequence(temperature=0, presence_penalty=2.0)
    sampler = Sampler()
    assert [sampler.sample([row], LOGITS[None])[0][0] for _ in range(2)] == [0, 1]


def test_log_probabilities_are_of_the_raw_logits() -> None:
    """Neither temperature nor bias changes them; the chosen token is reported even if it is not among the best."""
    row = sequence(temperature=0, logprobs=2, logit_bias={3: 100.0})
    ((token, report, _),) = Sampler().sample([row], LOGITS[None])
    expected = LOGITS.log_softmax(-1)
    assert report is not None
    assert (token, report.token_id) == (3, 3)
    assert report.logprob == pytest.approx(float(expected[3]))
    assert [place for place, _ in report.top] == [0, 1]
    assert report.top[0][1] == pytest.approx(float(expected[0]))
