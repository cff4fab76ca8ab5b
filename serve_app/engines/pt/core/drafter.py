"""Defines a drafter, which guesses how texts go on, and holds what the speculator knows of each text."""

from collections.abc import Sequence as ReadOnlySequence
from functools import cached_property
from typing import Protocol

from serve_app.engines.pt.core.ngram import TokenArray
from serve_app.engines.pt.core.sequence import Sequence

# What a sequence has seen of its drafts counts by this much less after each draft, and after each step in which it had
# a draft that was not used.
FADE, FADE_UNUSED = 0.9, 63 / 64


class Drafter(Protocol):
    """Guesses the next tokens of the running sequences. A wrong guess costs time and changes no text."""

    num_speculative_tokens: int
    # This says that `able` computes so much that it is called only where drafts are expected to pay for all sequences.
    computes_ahead: bool
    # A token that is drafted for a new text is expected to hold with this probability.
    first_odds: float

    def able(self, sequences: ReadOnlySequence[Sequence]) -> list[bool]:
        """Returns for which of the running sequences it can draft in this step. It may compute for a while to be able
        to draft later."""
        ...

    def draft(self, sequences: ReadOnlySequence[Sequence], tokens: ReadOnlySequence[int]) -> list[list[int]]:
        """Returns so many drafted tokens of each sequence. The sequences are those of the last call of `able`, and the
        number is 0 for each that could not be drafted for."""
        ...

    def drop(self, sequence: Sequence) -> None:
        """Frees what is kept of a sequence that does not run any more."""
        ...

    def reset(self) -> None:
        """Frees what is kept of all sequences."""
        ...


class Drafting:
    """Is what is known of one sequence: its tokens, and how many of its drafted tokens have held."""

    def __init__(self, sequence: Sequence):
        self._sequence = sequence
        self._held = 0.0
        self._tried = 0.0

    @cached_property
    def tokens(self) -> TokenArray:
        """Returns the ids of its text, for drafters that search in them."""
        return TokenArray(self._sequence)

    def expected(self, tokens: int, first_odds: float) -> float:
        """Returns how many of so many drafted tokens are expected to hold. `first_odds` are those of one that was never
        tried."""
        odds = (self._held + 2 * first_odds) / (self._tried + 2)
        return sum(odds**place for place in range(1, tokens + 1))

    def note(self, tried: int, accepted: int) -> None:
        """Takes how many tokens of a draft were compared and how many of them have held. What comes after the first
        wrong one is not compared."""
        self._held = FADE * self._held + accepted
        self._tried = FADE * self._tried + tried

    def fade(self) -> None:
        """Forgets a little, so that a text that begins to repeat itself later is noticed."""
        self._held *= FADE_UNUSED
        self._tried *= FADE_UNUSED


def drafting_of(sequence: Sequence) -> Drafting:
    """Returns what is known of a sequence, which is made at the first call."""
    if sequence.drafting is None:
        sequence.drafting = Drafting(sequence)
    found: Drafting = sequence.drafting
    return found
