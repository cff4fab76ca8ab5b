"""What the next step computes: one chunk of prompts, then one token for each running sequence.

Pure bookkeeping: no torch, no threads, no clock.

Laws:
- first come, first served: nobody is admitted before one that came earlier and still waits;
- the cache is one rectangle: what its buffers take for all rows at the longest need among them, and beside it those of
  the prompts that are being computed, stays within `max_cache_tokens`; so a sequence that was admitted can always run
  to its end;
- prompts are computed in chunks of at most `chunk_tokens`, one chunk a step, so running sequences wait for one chunk;
- prompts that are computed together are padded to one length, and padding stays below a third of the group.
"""

import operator
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from serve_app.engines.pt.sequence import Sequence

# Steps without running out of memory after which one more sequence is tried.
STEPS_TO_GROW = 32


@dataclass(frozen=True)
class Limits:
    """What the engine may hold: sequences, tokens of cache, and tokens of prompts a step."""

    max_num_seqs: int
    max_cache_tokens: int
    chunk_tokens: int = 512
    # Whether prompts of different lengths may be computed together; states of hybrids do not know padding.
    pad_prompts: bool = True
    # Tokens of cache that buffers take for so many rows of so many tokens.
    cells: Callable[[int, int], int] = operator.mul

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that fits when it is alone."""
        return self.max_cache_tokens - self.cells(1, 0)


@dataclass(frozen=True)
class Step:
    """One chunk: columns `begin` to `end` of the prompts in `prefill`; none where nobody waits or may be admitted.

    The prompts end at column `longest`, and shorter ones are padded on the left.
    """

    prefill: tuple[Sequence, ...] = ()
    begin: int = 0
    end: int = 0
    longest: int = 0

    @property
    def completes_prefill(self) -> bool:
        """Whether the prompts are computed to their last token."""
        return bool(self.prefill) and self.end == self.longest


class Scheduler:
    """The waiting, those whose prompts are being computed, and the running."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._batch_limit = limits.max_num_seqs
        self._calm_steps = 0
        self._waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []
        self._position = 0
        self._longest = 0
        self._failed_alone: set[Sequence] = set()
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue."""
        self._waiting.append(sequence)

    def schedule(self) -> Step:
        """The chunk of prompts that comes next; after it, all `decoding` sequences get a token."""
        if not self._prefilling:
            self._prefilling, self._position = self._admit(), 0
            self._longest = max((sequence.length for sequence in self._prefilling), default=0)
        group = tuple(self._prefilling)
        if not group:
            return Step()
        end = min(self._longest, self._position + max(1, self._limits.chunk_tokens // len(group)))
        return Step(group, self._position, end, self._longest)

    def complete(self, step: Step) -> None:
        """Notes that the chunk was computed."""
        if step.completes_prefill:
            self._running += self._prefilling
            self._prefilling, self._position = [], 0
        elif step.prefill:
            self._position = step.end
        self._calm_steps += 1
        if self._batch_limit < self._limits.max_num_seqs and self._calm_steps >= STEPS_TO_GROW:
            self._batch_limit, self._calm_steps = self._batch_limit + 1, 0

    def out_of_memory(self) -> list[Sequence]:
        """Puts everybody back at the head of the queue and halves the batch.

        Returns the sequence that was alone and too big for the second time, which must be given up; else nothing.
        """
        live = [*self._running, *self._prefilling]
        self._running, self._prefilling, self._position = [], [], 0
        self._batch_limit, self._calm_steps = max(1, min(self._batch_limit, len(live)) // 2), 0
        if len(live) == 1:
            if live[0] in self._failed_alone:
                return live
            self._failed_alone.add(live[0])
        self._waiting.extendleft(reversed(live))
        return []

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Takes sequences out, wherever they are; those that are not here are left alone."""
        gone = set(sequences)
        self._failed_alone -= gone
        self._running = [sequence for sequence in self._running if sequence not in gone]
        self._prefilling = [sequence for sequence in self._prefilling if sequence not in gone]
        if any(sequence in gone for sequence in self._waiting):
            self._waiting = deque(sequence for sequence in self._waiting if sequence not in gone)

    @property
    def decoding(self) -> tuple[Sequence, ...]:
        """Those whose prompts are computed: each gets one token a step."""
        return tuple(self._running)

    @property
    def sequences(self) -> list[Sequence]:
        """All of them: running, then prefilling, then waiting."""
        return [*self._running, *self._prefilling, *self._waiting]

    @property
    def running(self) -> int:
        """How many have a place in the batch."""
        return len(self._running) + len(self._prefilling)

    @property
    def waiting(self) -> int:
        """How many have none yet."""
        return len(self._waiting)

    @property
    def batch_limit(self) -> int:
        """How many may have a place now."""
        return self._batch_limit

    def _admit(self) -> list[Sequence]:
        group: list[Sequence] = []
        while self._waiting and self._has_room(group, self._waiting[0]) and self._pads_little(group, self._waiting[0]):
            group.append(self._waiting.popleft())
        return group

    def _has_room(self, group: list[Sequence], candidate: Sequence) -> bool:
        present = [*self._running, *group]
        rows, need = len(present) + 1, max(sequence.need for sequence in (*present, candidate))
        total = self._limits.cells(rows, need)
        if self._running:  # The prompts have buffers of their own until they join; the first ones just stay in theirs.
            prompts = [*group, candidate]
            total += self._limits.cells(len(prompts), max(sequence.length for sequence in prompts))
        return rows <= self._batch_limit and (rows == 1 or total <= self._limits.max_cache_tokens)

    def _pads_little(self, group: list[Sequence], candidate: Sequence) -> bool:
        if not group:
            return True
        lengths = [sequence.length for sequence in (*group, candidate)]
        if not self._limits.pad_prompts:
            return lengths[-1] == lengths[0]
        return len(lengths) * max(lengths) <= 1.5 * sum(lengths)
