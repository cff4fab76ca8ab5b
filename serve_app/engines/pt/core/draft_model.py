"""Drafts with a second, smaller model, whose KV cache follows the rows of the first one.

Laws:
- Drafts are greedy. A drafted token is a guess without a probability of its own, so the sampler accepts it exactly if
  it chooses the same one (`EngineLoop`), and any draft leaves the distribution of the text as it is.
- Every pass computes all rows of the draft's cache. A row that lacks tokens of its text is given those, and any other
  row is given its last drafted token. Only rows that lack fewer tokens than another one are filled up.
- A step computes at most one chunk of prompts and one chunk of what rows have to catch up beside the drafts.
- A row for which the draft's cache has no room, or whose text is longer than the draft's context, gets no drafts.
"""

from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass, replace

from serve_app.engines.pt.core.model_runner import BatchRunner
from serve_app.engines.pt.core.scheduler import Limits, Scheduler
from serve_app.engines.pt.core.sequence import Sequence

# A row always may lack so many tokens and be drafted for, because it lacks two after a draft that has held.
LEAST_READY = 2


@dataclass(eq=False)
class _Row:
    """This is a sequence and its copy, which has the tokens that were given to the draft model. The last `unsure` of
    these were drafted, and may have been refused since."""

    sequence: Sequence
    copy: Sequence
    unsure: int = 0

    @property
    def missing(self) -> list[int]:
        """Returns the tokens of the text that the draft model was not given yet."""
        return self.sequence.output_ids[len(self.copy.output_ids) :]

    @property
    def refused(self) -> int:
        """Returns how many of the last tokens that were given are not in the text. The text's last token counts among
        them, because it has to be given again for what comes after it."""
        given, text = self.copy.output_ids, self.sequence.output_ids
        held = min(len(given) - self.unsure, len(text) - 1)
        while held < min(len(given), len(text) - 1) and given[held] == text[held]:
            held += 1
        return len(given) - held


class DraftModel:
    """Drafts with the model of `runner`, whose cache is held to `limits`. `max_model_len` is the draft's context in
    tokens. It is used on the engine's thread alone."""

    computes_ahead = True
    first_odds = 0.8

    def __init__(self, runner: BatchRunner, limits: Limits, num_speculative_tokens: int, max_model_len: int):
        columns = num_speculative_tokens + 1
        # Rows that end at different tokens are filled up to one column, which the scheduler has to count.
        self._limits = replace(limits, cells=lambda rows, tokens: limits.cells(rows, tokens + columns))
        self._runner = runner
        self._max_model_len = max_model_len
        self._scheduler = Scheduler(self._limits)
        self._rows: dict[Sequence, _Row] = {}
        self.num_speculative_tokens = num_speculative_tokens

    def able(self, sequences: ReadOnlySequence[Sequence]) -> list[bool]:
        """Does what `Drafter` says. It computes a chunk of prompts that it has not seen, and a chunk of what has come
        since its last draft."""
        self._follow(sequences)
        self._compute_prompts()
        rows = self._cached()
        self._take_back(rows)
        most = self._ready_tokens(len(rows))
        if any(len(row.missing) > most for row in rows):
            self._catch_up(rows)
        ready = {row.sequence for row in rows if len(row.missing) <= most}
        return [sequence in ready for sequence in sequences]

    def draft(self, sequences: ReadOnlySequence[Sequence], tokens: ReadOnlySequence[int]) -> list[list[int]]:
        """Does what `Drafter` says, in as many passes as the most tokens that are asked for."""
        rows = self._cached()
        drafts: dict[Sequence, list[int]] = {row.sequence: [] for row in rows}
        columns = self._ready_tokens(len(rows))
        for _ in range(max(tokens)):
            pieces = [(row.missing or drafts[row.sequence][-1:])[:columns] for row in rows]
            best = self._pass(rows, pieces)
            for row, piece, token in zip(rows, pieces, best, strict=True):
                row.unsure += len(piece) if not row.missing and drafts[row.sequence] else 0
                row.copy.output_ids += piece
                if not row.missing:
                    drafts[row.sequence].append(token)
            columns = 1
        return [drafts.get(sequence, [])[:count] for sequence, count in zip(sequences, tokens, strict=True)]

    def drop(self, sequence: Sequence) -> None:
        """Does what `Drafter` says."""
        row = self._rows.pop(sequence, None)
        if row is not None:
            self._scheduler.remove([row.copy])
            self._runner.drop(row.copy)

    def reset(self) -> None:
        """Does what `Drafter` says."""
        if self._rows:
            self._rows, self._scheduler = {}, Scheduler(self._limits)
            self._runner.reset()

    def _follow(self, sequences: ReadOnlySequence[Sequence]) -> None:
        """Drops the rows that have left or become too long, and lets new ones wait for their prompts' turn."""
        fitting = [sequence for sequence in sequences if self._fits(sequence)]
        for gone in self._rows.keys() - set(fitting):
            self.drop(gone)
        for sequence in fitting:
            if sequence not in self._rows:
                copy = Sequence(sequence.prompt_ids, sequence.params, output_ids=sequence.output_ids[:-1])
                self._rows[sequence] = _Row(sequence, copy)
                self._scheduler.add(copy)

    def _fits(self, sequence: Sequence) -> bool:
        return sequence.length + self.num_speculative_tokens < self._max_model_len

    def _compute_prompts(self) -> None:
        step = self._scheduler.schedule()
        if step.prefill:
            self._runner.prefill(step)
            self._scheduler.complete(step)

    def _cached(self) -> list[_Row]:
        """Returns the rows whose prompts are computed."""
        cached = set(self._scheduler.decoding)
        return [row for row in self._rows.values() if row.copy in cached]

    def _ready_tokens(self, rows: int) -> int:
        """Returns how many tokens a row may lack to be drafted for. All of them have logits, as many as the plan has
        counted."""
        within = self._limits.chunk_tokens // max(1, rows)
        return max(LEAST_READY, min(self.num_speculative_tokens + 1, within))

    def _take_back(self, rows: ReadOnlySequence[_Row]) -> None:
        """Removes the drafted tokens that were refused from the cache."""
        taken = {}
        for row in rows:
            if refused := row.refused:
                taken[row.copy] = refused
                del row.copy.output_ids[-refused:]
            row.unsure = 0
        if taken:
            self._runner.take_back(taken)

    def _catch_up(self, rows: ReadOnlySequence[_Row]) -> None:
        """Computes one chunk of the tokens that have come since the last draft, up to the last one of each text."""
        columns = max(1, self._limits.chunk_tokens // len(rows))
        pieces = [row.missing[:-1][:columns] for row in rows]
        given = [piece or row.missing[-1:] for row, piece in zip(rows, pieces, strict=True)]
        copies = [row.copy for row in rows]
        self._runner.extend(copies, given, logits_of=1)
        self._runner.keep({copy: len(piece) for copy, piece in zip(copies, pieces, strict=True)})
        for row, piece in zip(rows, pieces, strict=True):
            row.copy.output_ids += piece

    def _pass(self, rows: ReadOnlySequence[_Row], pieces: ReadOnlySequence[ReadOnlySequence[int]]) -> list[int]:
        """Gives each row its tokens, keeps them, and returns the most likely token after the last one of each."""
        copies = [row.copy for row in rows]
        logits = self._runner.extend(copies, pieces)
        self._runner.keep({copy: len(piece) for copy, piece in zip(copies, pieces, strict=True)})
        best: list[int] = logits[range(len(rows)), [len(piece) - 1 for piece in pieces]].argmax(-1).tolist()
        return best
