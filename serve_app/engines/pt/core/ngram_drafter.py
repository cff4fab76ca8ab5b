"""Drafts by n-gram lookup in the text so far (`ngram.py`), without a second model."""

from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass

from serve_app.engines.pt.core.drafter import drafting_of
from serve_app.engines.pt.core.ngram import continuation, look_up
from serve_app.engines.pt.core.sequence import Sequence


@dataclass(frozen=True)
class NgramSettings:
    """Says how to draft. The names are vLLM's: at most `num_speculative_tokens` after a match of `prompt_lookup_min` to
    `prompt_lookup_max` tokens."""

    num_speculative_tokens: int
    prompt_lookup_max: int
    prompt_lookup_min: int


class NgramDrafter:
    """Drafts what stood after an earlier occurrence of a text's last tokens. It keeps nothing between steps."""

    computes_ahead = False
    first_odds = 0.5

    def __init__(self, settings: NgramSettings):
        self._settings = settings
        self._places: list[int | None] = []
        self.num_speculative_tokens = settings.num_speculative_tokens

    def able(self, sequences: ReadOnlySequence[Sequence]) -> list[bool]:
        """Does what `Drafter` says. It can draft where the text's last tokens stood before."""
        longest, shortest = self._settings.prompt_lookup_max, self._settings.prompt_lookup_min
        self._places = [look_up(drafting_of(sequence).tokens.ids(), longest, shortest) for sequence in sequences]
        return [place is not None for place in self._places]

    def draft(self, sequences: ReadOnlySequence[Sequence], tokens: ReadOnlySequence[int]) -> list[list[int]]:
        """Does what `Drafter` says."""
        return [
            [] if place is None else continuation(drafting_of(sequence).tokens.ids(), place, count)
            for sequence, place, count in zip(sequences, self._places, tokens, strict=True)
        ]

    def drop(self, sequence: Sequence) -> None:
        """Does nothing, because nothing is kept."""

    def reset(self) -> None:
        """Does nothing, because nothing is kept."""
