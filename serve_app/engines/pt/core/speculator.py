"""Decides which tokens are drafted in a step, and whether it pays.

Laws:
- It changes only how many tokens a pass computes, and never which tokens come (`EngineLoop`).
- It drafts only if the step is expected to give more tokens in a second than a step without drafts. How long steps take
  is measured for each number of rows, and how many drafted tokens hold is measured for each sequence. So it stops by
  itself when the batch is full or a text does not repeat itself, and tries again later.
- Drafts stay within the step's tokens and within the cache that the scheduler has counted for the rows.
- After a pass that failed, there are no drafts for a while, since a smaller pass may succeed.
"""

import logging
import time
from collections.abc import Mapping
from collections.abc import Sequence as ReadOnlySequence

import torch

from serve_app.engines.draft_counts import DraftCounts
from serve_app.engines.pt.core.drafter import Drafter, drafting_of
from serve_app.engines.pt.core.model_runner import Verifier
from serve_app.engines.pt.core.sequence import Sequence
from serve_app.engines.pt.core.step_times import FEW, StepTimes
from serve_app.engines.torch_internals import is_out_of_memory

logger = logging.getLogger("ray.serve")

# A step with drafts has to be better by this factor, because both times and acceptance are estimates.
WORTH = 1.15
# After so many steps with drafts, one has none. Drafts are compared with its time, which changes with the length of the
# texts and with what else the machine does. After a surprise the next one comes soon, and later ones at twice the
# distance each.
REFRESH_STEPS, MOST_REFRESH_STEPS = 4, 32
# There are no drafts in so many steps after a pass that failed.
REST_STEPS = 256


class Speculator:
    """Has a drafter draft for a runner that can verify. It is used on the engine's thread alone, except for
    `counts`."""

    def __init__(self, runner: Verifier, drafter: Drafter, times: StepTimes | None = None):
        self._runner = runner
        self._drafter = drafter
        self._drafting_s = 0.0
        # The first passes of a draft model prepare kernels, so their times say nothing.
        self._warmups = FEW if drafter.computes_ahead else 0
        self._times = StepTimes() if times is None else times
        self._resting = 0
        self._since_plain, self._refresh_steps = 0, REFRESH_STEPS
        self.counts = DraftCounts(accepted_per_pos=[0] * drafter.num_speculative_tokens)

    def propose(self, sequences: ReadOnlySequence[Sequence], spare: int) -> list[list[int]] | None:
        """Returns the drafted tokens of each sequence, some of which may have none, or None for a step without drafts.

        `spare` is how many tokens the pass may have beside one for each sequence, those that fill up rows included.
        """
        if self._resting:
            self._resting -= 1
            return None
        if self._since_plain >= self._refresh_steps:
            return None
        try:
            return self._drafts(sequences, spare)
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                raise  # Every later call of the device fails.
            if is_out_of_memory(error):
                logger.warning("Out of memory for drafts of %d sequences: %s", len(sequences), error)
            else:
                logger.exception("Drafting failed with %d sequences.", len(sequences))
        self.rest()  # This is outside `except`, whose traceback still holds the tensors.
        return None

    def _drafts(self, sequences: ReadOnlySequence[Sequence], spare: int) -> list[list[int]] | None:
        rows = len(sequences)
        most = min(self._drafter.num_speculative_tokens, spare // rows, _room(sequences))
        if most < 1 or not self._could_pay(rows, most):
            return None
        able = [_left(sequence) > 0 for sequence in sequences]
        if self._drafter.computes_ahead and not self._best(sequences, able, most):
            self._pass_over(sequences, able)
            return None
        able = [
            can and _left(sequence) > 0 for sequence, can in zip(sequences, self._drafter.able(sequences), strict=True)
        ]
        tokens = self._best(sequences, able, most)
        if not tokens:
            self._pass_over(sequences, able)
            return None
        counts = [min(tokens, _left(sequence)) if can else 0 for sequence, can in zip(sequences, able, strict=True)]
        begin = time.monotonic()
        drafts = self._drafter.draft(sequences, counts)
        self._drafting_s = time.monotonic() - begin
        return drafts

    def _pass_over(self, sequences: ReadOnlySequence[Sequence], able: ReadOnlySequence[bool]) -> None:
        """Notes that the drafts of this step would not have paid, so that they are tried again later."""
        if not any(able):
            return
        self._times.forget(len(sequences))
        for sequence, can in zip(sequences, able, strict=True):
            if can:
                drafting_of(sequence).fade()

    def verify(
        self, sequences: ReadOnlySequence[Sequence], drafts: ReadOnlySequence[ReadOnlySequence[int]]
    ) -> torch.Tensor:
        """Does what `Verifier` says."""
        return self._runner.verify(sequences, drafts)

    def keep(self, tokens: Mapping[Sequence, int]) -> None:
        """Does what `Verifier` says."""
        self._runner.keep(tokens)

    def drop(self, sequence: Sequence) -> None:
        """Frees what is kept of a sequence that does not run any more."""
        self._drafter.drop(sequence)

    def rest(self) -> None:
        """Stops drafting for a while and frees what that needs, because a pass has failed."""
        self._resting = REST_STEPS
        self._drafter.reset()

    def note_plain(self, rows: int, seconds: float) -> None:
        """Takes the time of a step without drafts."""
        is_refresh, self._since_plain = self._since_plain >= self._refresh_steps, 0
        if self._times.add_plain(rows, seconds):
            self._refresh_steps = REFRESH_STEPS
        elif is_refresh:
            self._refresh_steps = min(2 * self._refresh_steps, MOST_REFRESH_STEPS)

    def note_drafted(
        self,
        sequences: ReadOnlySequence[Sequence],
        drafts: ReadOnlySequence[ReadOnlySequence[int]],
        tokens: Mapping[Sequence, int],
        seconds: float,
    ) -> None:
        """Takes the time of a step with drafts from its pass on, and how many tokens each sequence has got in it."""
        rows, counts = len(sequences), self.counts
        self._since_plain += 1
        if self._warmups:
            self._warmups -= 1
        else:
            self._times.add_drafted(rows, rows * max(map(len, drafts)), seconds + self._drafting_s)
        for sequence, draft in zip(sequences, drafts, strict=True):
            got = tokens.get(sequence, 0)
            if not draft or not got:  # A sequence that was parked or has failed says nothing of its draft.
                continue
            newest = sequence.output_ids[-got:]
            accepted = sum(one == other for one, other in zip(draft, newest, strict=False))
            drafting_of(sequence).note(min(len(draft), got), accepted)
            counts.drafts += 1
            counts.draft_tokens += len(draft)
            counts.accepted_tokens += accepted
            for place in range(accepted):
                counts.accepted_per_pos[place] += 1

    def _could_pay(self, rows: int, most: int) -> bool:
        """Returns whether drafts pay if all of them hold. Only then is it worth to look for any."""
        ratio = self._times.ratio(rows, rows * most)
        if ratio is None:
            return False
        if (1 + most) / ratio > WORTH:
            return True
        self._times.forget(rows)
        return False

    def _best(self, sequences: ReadOnlySequence[Sequence], able: ReadOnlySequence[bool], most: int) -> int:
        """Returns how many tokens to draft for each sequence: as many as give the most tokens in a second of `most`,
        half of them and so on, or 0."""
        rows, best, best_gain = len(sequences), 0, WORTH
        drafting = [sequence for sequence, can in zip(sequences, able, strict=True) if can]
        tokens = min(most, max(map(_left, drafting), default=0))
        while tokens:
            held = sum(
                drafting_of(sequence).expected(min(tokens, _left(sequence)), self._drafter.first_odds)
                for sequence in drafting
            )
            ratio = self._times.ratio(rows, rows * tokens)
            gain = 0.0 if ratio is None else (1 + held / rows) / ratio
            if gain > best_gain:
                best, best_gain = tokens, gain
            tokens //= 2
        return best


def _left(sequence: Sequence) -> int:
    """Returns how many drafted tokens the sequence can use. One more token comes after them."""
    return sequence.params.max_tokens - len(sequence.output_ids) - 1


def _room(sequences: ReadOnlySequence[Sequence]) -> int:
    """Returns for how many drafted tokens all rows have room in the cache that was counted for them, which is as long
    as the longest need among them. The row that is longest now may need fewer tokens."""
    longest = max(sequence.cached for sequence in sequences)
    return max(sequence.need for sequence in sequences) - longest - 1
