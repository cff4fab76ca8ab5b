"""Decides what the next step computes: one chunk of prompts, then one token for each running sequence.

This is pure bookkeeping without torch, threads or a clock.

Laws:
- requests take turns (`FairQueue`), and nobody is admitted before the one whose turn it is, though it would fit;
- the cache is one rectangle: what its buffers take for all rows at the longest need among them, and beside it those of
  the prompts that are being computed, stays within `max_cache_tokens`; so a sequence that was admitted can always run
  to its end;
- prompts are computed in chunks of at most `chunk_tokens`, one chunk a step, so running sequences wait for one chunk;
  for prompts that pool, which nobody waits for token by token, only for one of `beside_tokens`;
- prompts that are computed together are padded to one length, and padding stays below a third of the group; those that
  pool share no pass with those that generate;
- a group is computed within PT_GROUP_STEPS steps, or it is one prompt: a request of many long prompts holds up the next
  owner's turn for one group and not for all of them;
- one owner that has a row leaves every eighth place to others, whose first tokens do not wait for its last ones;
- tokens that are drafted by speculation count against `chunk_tokens` too, together with the step's chunk of prompts;
- a pass that fails is tried again in smaller parts until the sequence that fails is alone, and that one is given up;
- a sequence that waits for its output format is parked: it holds no place in the batch, so nobody waits for it. One
  that is late for once comes back before those that wait; a format that is slow at every token costs its owner turns,
  and nobody else's;
- a sequence runs only while its adapter has a slot (`AdapterSlots`); one that waits for a slot holds up nobody who
  needs none.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from serve_app.engines.pt.core.fair_queue import FairQueue
from serve_app.engines.pt.core.lora.adapter import Adapter
from serve_app.engines.pt.core.lora.slots import AdapterSlots
from serve_app.engines.pt.core.sequence import Sequence
from serve_app.planning.fit_pt import PT_GROUP_STEPS

# After this many steps without running out of memory, one more sequence is tried.
STEPS_TO_GROW = 32
# One of so many rows is not for an owner that holds all the others.
ROWS_PER_SPARE = 8


@dataclass(frozen=True)
class Limits:
    """Bounds what the engine may hold: sequences, tokens of cache, and tokens of prompts in a step."""

    max_num_seqs: int
    max_cache_tokens: int
    chunk_tokens: int = 512
    # These are for prompts that pool while others get tokens. They take about as long as a token.
    beside_tokens: int = 64
    # This says whether prompts of different lengths may be computed together. States of hybrids do not know padding.
    pad_prompts: bool = True
    # This returns the tokens of cache that buffers take for so many rows of so many tokens.
    cells: Callable[[int, int], int] = operator.mul

    @property
    def longest(self) -> int:
        """Returns the number of tokens of the longest sequence that fits when it is alone."""
        return self.max_cache_tokens - self.cells(1, 0)


@dataclass(frozen=True)
class Step:
    """This is one chunk: columns `begin` to `end` of the prompts in `prefill`, which is empty if none waits or may be
    admitted.

    The prompts end at column `longest`, and shorter ones are padded on the left.
    """

    prefill: tuple[Sequence, ...] = ()
    begin: int = 0
    end: int = 0
    longest: int = 0

    @property
    def completes_prefill(self) -> bool:
        """Returns whether the prompts are computed to their last token."""
        return bool(self.prefill) and self.end == self.longest

    @property
    def pools(self) -> bool:
        """Returns whether the prompts' vectors are asked for, and not their next tokens."""
        return bool(self.prefill) and self.prefill[0].pools


class Scheduler:
    """Keeps the sequences that wait, those whose prompts are being computed, those that run, and those that are
    parked."""

    def __init__(self, limits: Limits, slots: AdapterSlots | None = None):
        self._limits = limits
        self._slots = slots
        self._batch_limit = limits.max_num_seqs
        self._calm_steps = 0
        self._waiting = FairQueue[Sequence]()
        self._prefilling: list[Sequence] = []
        self._position = 0
        self._longest = 0
        self._failed_alone: set[Sequence] = set()
        self._apart: set[Sequence] = set()
        self._running: list[Sequence] = []
        self._parked: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of its owner's line."""
        self._waiting.add(sequence)

    def schedule(self) -> Step:
        """Returns the chunk of prompts that comes next. After it, all `decoding` sequences get a token."""
        if not self._prefilling:
            self._prefilling, self._position = self._admit(), 0
            self._longest = max((sequence.length for sequence in self._prefilling), default=0)
        return self._chunk()

    def skip(self, tokens: int) -> Step:
        """Returns the first chunk of the prompt that is being computed by itself, after its first `tokens` tokens,
        which are in the cache already."""
        self._position = tokens
        return self._chunk()

    def set_apart(self, sequence: Sequence) -> None:
        """Has a waiting sequence's prompt be computed by itself."""
        self._apart.add(sequence)

    def _chunk(self) -> Step:
        group = tuple(self._prefilling)
        if not group:
            return Step()
        end = min(self._longest, self._position + max(1, self._step_tokens(group[0]) // len(group)))
        return Step(group, self._position, end, self._longest)

    def spare_tokens(self, step: Step) -> int:
        """Returns how many tokens the step may compute beside its chunk of prompts and one token for each running
        sequence. Drafted tokens share the chunk's budget, so nobody waits for them longer than for a chunk."""
        return max(0, self._limits.chunk_tokens - len(step.prefill) * (step.end - step.begin))

    def complete(self, step: Step) -> None:
        """Notes that the chunk was computed."""
        if step.completes_prefill:
            if not step.pools:
                self._running += self._prefilling
            self._prefilling, self._position = [], 0
        elif step.prefill:
            self._position = step.end
        self._calm_steps += 1
        if self._batch_limit < self._limits.max_num_seqs and self._calm_steps >= STEPS_TO_GROW:
            self._batch_limit, self._calm_steps = self._batch_limit + 1, 0

    def retreat(self) -> list[Sequence]:
        """Puts all sequences back at the head of the queue and halves the batch, because a pass failed.

        Returns the sequence that was alone and failed for the second time, which must be given up, or else nothing.
        """
        live = [*self._running, *self._prefilling]
        self._running, self._prefilling, self._position = [], [], 0
        self._batch_limit, self._calm_steps = max(1, min(self._batch_limit, len(live)) // 2), 0
        if len(live) == 1:
            if live[0] in self._failed_alone:
                return live
            self._failed_alone.add(live[0])
        self._waiting.put_back(live, first=True)
        return []

    def separate(self) -> list[Sequence]:
        """Puts the prompts that are being computed back into their owners' lines, each to be computed by itself.

        Returns the one that was by itself already, which must be given up, or else nothing.
        """
        group, self._prefilling, self._position = self._prefilling, [], 0
        if len(group) == 1:
            return group
        self._apart.update(group)
        self._waiting.put_back(group, first=False)
        return []

    def park(self, sequences: Iterable[Sequence]) -> None:
        """Takes running sequences out of the batch until `unpark`."""
        gone = set(sequences)
        self._parked += [sequence for sequence in self._running if sequence in gone]
        self._running = [sequence for sequence in self._running if sequence not in gone]

    def unpark(self, sequences: Iterable[Sequence], *, first: bool) -> None:
        """Puts parked sequences back into their owners' lines. Their texts so far are computed again. Those that are
        `first` come before all that wait, the others at their owners' turns."""
        back = [sequence for sequence in sequences if sequence in self._parked]
        self._parked = [sequence for sequence in self._parked if sequence not in back]
        self._waiting.put_back(back, first=first)

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Removes sequences, wherever they are, and ignores those that are not here."""
        gone = set(sequences)
        self._failed_alone -= gone
        self._apart -= gone
        self._running = [sequence for sequence in self._running if sequence not in gone]
        self._prefilling = [sequence for sequence in self._prefilling if sequence not in gone]
        self._parked = [sequence for sequence in self._parked if sequence not in gone]
        self._waiting.remove(gone)

    @property
    def decoding(self) -> tuple[Sequence, ...]:
        """Returns the sequences whose prompts are computed. Each gets one token in a step."""
        return tuple(self._running)

    @property
    def sequences(self) -> list[Sequence]:
        """Returns all sequences: first running, then prefilling, then waiting, then parked ones."""
        return [*self._running, *self._prefilling, *self._waiting, *self._parked]

    @property
    def parked(self) -> tuple[Sequence, ...]:
        """Returns the sequences that wait for their output format."""
        return tuple(self._parked)

    @property
    def running(self) -> int:
        """Returns how many sequences have a place in the batch."""
        return len(self._running) + len(self._prefilling)

    @property
    def waiting(self) -> int:
        """Returns how many sequences have no place in the batch yet."""
        return len(self._waiting)

    @property
    def batch_limit(self) -> int:
        """Returns how many sequences may have a place in the batch now."""
        return self._batch_limit

    def _admit(self) -> list[Sequence]:
        """Takes the sequences that wait for the next group. Its work grows with the sequences that run and with the
        lines that wait, and not with their product, because it is done at every step."""
        batch, refused = _Batch(self._running), set[Adapter]()
        if self._slots is not None and self._slots.waiting:
            self._slots.keep_waiting({sequence.adapter for sequence in self._waiting})
        for head in self._waiting.turns():
            if head.adapter in refused:
                continue
            if not self._joins(batch, head) or not self._has_room(batch, head):
                break
            if not self._has_room(batch, head, self._spare(batch, head)):
                continue
            if self._has_slot(batch, head.adapter):
                self._waiting.take(head)
                batch.join(head)
            elif head.adapter is not None:
                refused.add(head.adapter)
        return batch.group

    def _has_slot(self, batch: "_Batch", adapter: Adapter | None) -> bool:
        """Returns whether a candidate's adapter has a slot, which it gets if it can."""
        if adapter is None:
            return True
        if self._slots is None:
            raise ValueError("a model without room for adapters has no sequence with one")
        return self._slots.admit(adapter, batch.adapters)

    def _spare(self, batch: "_Batch", candidate: Sequence) -> int:
        """Returns how many rows must be left to other owners, which is 0 if the candidate's owner has none yet.

        It is one of ROWS_PER_SPARE rows that fit, also into the cache. With room for fewer, a request's choices still
        run together.
        """
        own = batch.owners[candidate.owner]
        need = max(batch.need, candidate.need)
        fitting = min(self._batch_limit, self._limits.max_cache_tokens // self._limits.cells(1, need))
        return max(0, fitting // ROWS_PER_SPARE - (batch.rows - own)) if own else 0

    def _has_room(self, batch: "_Batch", candidate: Sequence, spare: int = 0) -> bool:
        rows, need = batch.rows + 1 + spare, max(batch.need, candidate.need)
        total = self._limits.cells(rows, need)
        if self._running:  # The prompts have their own buffers until they join, and the first ones stay in theirs.
            total += self._limits.cells(len(batch.group) + 1, max(batch.longest, candidate.length))
        return rows <= self._batch_limit and (rows == 1 or total <= self._limits.max_cache_tokens)

    def _joins(self, batch: "_Batch", candidate: Sequence) -> bool:
        """Returns whether the candidate may share the group's pass."""
        if not batch.group:
            return True
        first = batch.group[0]
        if candidate.pools != first.pools or candidate in self._apart or first in self._apart:
            return False
        tokens, most = batch.tokens + candidate.length, self._group_tokens(candidate)
        if not self._limits.pad_prompts:
            return candidate.length == first.length and tokens <= most
        padded = (len(batch.group) + 1) * max(batch.longest, candidate.length)
        return padded <= 1.5 * tokens and padded <= most

    def _group_tokens(self, candidate: Sequence) -> int:
        return PT_GROUP_STEPS * self._step_tokens(candidate)

    def _step_tokens(self, sequence: Sequence) -> int:
        """Returns how many tokens of prompts like this one a step may compute."""
        return self._limits.beside_tokens if sequence.pools and self._running else self._limits.chunk_tokens


class _Batch:
    """Is what runs and the group that joins it, counted once and not again for each candidate.

    `need` is the longest need of all of them, `adapters` has the most tokens that a sequence of each adapter may still
    get, and `longest` and `tokens` are of the group's prompts.
    """

    def __init__(self, running: Iterable[Sequence]):
        self.rows = 0
        self.need = 0
        self.owners = Counter[object]()
        self.adapters: dict[Adapter, int] = {}
        self.group: list[Sequence] = []
        self.longest = 0
        self.tokens = 0
        for sequence in running:
            self._count(sequence)

    def join(self, sequence: Sequence) -> None:
        """Puts a sequence into the group."""
        self._count(sequence)
        self.group.append(sequence)
        self.longest = max(self.longest, sequence.length)
        self.tokens += sequence.length

    def _count(self, sequence: Sequence) -> None:
        self.rows += 1
        self.need = max(self.need, sequence.need)
        self.owners[sequence.owner] += 1
        if (adapter := sequence.adapter) is not None:
            self.adapters[adapter] = max(sequence.need - sequence.length, self.adapters.get(adapter, 0))
