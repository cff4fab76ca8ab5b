"""Runs forward passes: prompts in chunks, and one token for each running sequence.

`BatchRunner` joins all sequences in one pass. `SerialRunner` computes one sequence from its first token each time,
which is slow but right for every model. It is used if the probe finds that joining changes the answers.
"""

import gc
import inspect
from collections.abc import Mapping, Set
from collections.abc import Sequence as ReadOnlySequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from serve_app.engines.pt.core.cache_codec import WHOLE, CacheCodec
from serve_app.engines.pt.core.embedding import Pool
from serve_app.engines.pt.core.kv_cache import BatchCache
from serve_app.engines.pt.core.lora.bank import AdapterBank
from serve_app.engines.pt.core.scheduler import Step
from serve_app.engines.pt.core.sequence import Sequence
from serve_app.planning.pt_kv_buffers import cells

# These are keys and values of one text: for each layer its tensors of shape (heads, tokens, size).
Layers = ReadOnlySequence[ReadOnlySequence[torch.Tensor]]


class Runner(Protocol):
    """Computes logits, and knows which sequences are in its cache.

    `max_cells` is how many tokens its buffers may have room for, or None for no limit. `adapters` has the adapters of
    the sequences, if the model has room for any.
    """

    max_cells: int | None
    adapters: AdapterBank | None

    def prefill(self, step: Step) -> torch.Tensor | None:
        """Computes one chunk of the prompts, and returns None unless it was the last.

        After the last it returns logits of shape (sequences, vocabulary), or vectors of shape (sequences, hidden size)
        for prompts that pool.
        """
        ...

    def drop_prompts(self) -> None:
        """Frees the cache of the prompts that are being computed."""
        ...

    def decode(self, sequences: ReadOnlySequence[Sequence]) -> torch.Tensor:
        """Returns the logits for the next token of each sequence, of shape (sequences, vocabulary)."""
        ...

    def drop(self, sequence: Sequence) -> None:
        """Frees the sequence's part of the cache."""
        ...

    def reset(self) -> None:
        """Frees the whole cache."""
        ...

    def cache_tensors(self) -> list[torch.Tensor]:
        """Returns all tensors of the cache, which are of no use without their numbers."""
        ...


class Verifier(Runner, Protocol):
    """This is a runner that can also compute several tokens of each running sequence at once and take some back."""

    def verify(
        self, sequences: ReadOnlySequence[Sequence], drafts: ReadOnlySequence[ReadOnlySequence[int]]
    ) -> torch.Tensor:
        """Computes the last token of each sequence and its drafted tokens in one pass.

        Returns logits of shape (sequences, 1 + the most drafted tokens, vocabulary). Those at place j are for the token
        after the last one and j drafted ones, and mean nothing beyond a sequence's own draft. `keep` has to follow.
        """
        ...

    def keep(self, tokens: Mapping[Sequence, int]) -> None:
        """Takes all tokens of the last `verify` back, except so many of each sequence, counted from its last token
        before that pass. Sequences that were dropped since then are left out."""
        ...


class TextKeeper(Runner, Protocol):
    """This is a runner that can also hand out the keys and values of a text, and begin another text with them."""

    @property
    def bytes_per_token(self) -> float:
        """Returns the bytes of a running sequence's keys and values for one token."""
        ...

    def kept(self, sequence: Sequence) -> Layers | None:
        """Returns copies of the sequence's keys and values in the host's memory, or None if it is not running."""
        ...

    def begin_with(self, step: Step, layers: Layers, tokens: int) -> None:
        """Begins the only prompt of the step, of which the first `tokens` tokens are those of `layers`. Its next chunk
        has to begin after them."""
        ...


class BatchRunner:
    """Computes all sequences in one pass, with every device map: hooks move activations, and layers keep their own
    cache.

    The scheduler admits no more than `max_cells`. What earlier sequences have left behind in the buffers is given back
    before it would be too much.
    """

    max_cells: int | None = None
    adapters: AdapterBank | None = None

    def __init__(self, model: PreTrainedModel, input_device: torch.device, codec: CacheCodec = WHOLE):
        self._model = model
        self._device = input_device
        self._codec = codec
        self._takes = arguments_of(model)
        self._batch = self._new_cache()
        self._rows: list[Sequence] = []
        self._group = self._new_cache()
        self._group_rows: list[Sequence] = []
        self._pool = Pool()
        self._unverified = 0  # These columns at the end are of a `verify` without its `keep`.
        self._most_cells = 0
        self.most_cache_bytes: dict[torch.device, int] = {}

    def _new_cache(self) -> BatchCache:
        return BatchCache(self._model.config, self._codec)

    @property
    def is_joinable(self) -> bool:
        """Returns whether the model's cache has only layers that can be joined."""
        return self._batch.is_joinable

    @property
    def has_keys(self) -> bool:
        """Returns whether the model's cache has keys and values, and not only states."""
        return self._batch.has_keys

    @property
    def pad_prompts(self) -> bool:
        """Returns whether prompts of different lengths may share a pass."""
        return not self._batch.has_states

    @property
    def can_roll_back(self) -> bool:
        """Returns whether the last tokens of a sequence can be taken back, as speculation needs it."""
        return self._batch.can_roll_back

    @property
    def bytes_per_cell(self) -> dict[torch.device, float]:
        """Returns the bytes of the running sequences' cache for one token by device, at the moment when a layer is
        moved or read."""
        largest = self._batch.transient_bytes
        sizes = self._batch.bytes_by_device
        return {device: (size + largest[device]) / max(1, self._batch.cells) for device, size in sizes.items()}

    @property
    def cache_bytes(self) -> dict[torch.device, int]:
        """Returns the bytes of all buffers by device."""
        running, group = self._batch.bytes_by_device, self._group.bytes_by_device
        return {device: running.get(device, 0) + group.get(device, 0) for device in {*running, *group}}

    def prefill(self, step: Step) -> torch.Tensor | None:
        """Does what `Runner` says."""
        if step.begin == 0:
            self._begin(step)
        group, rows, longest = self._group, self._group_rows, step.longest
        ids = torch.zeros(len(rows), step.end - step.begin, dtype=torch.long)
        pads = torch.tensor([longest - sequence.length for sequence in rows])
        for row, sequence in enumerate(rows):
            pad = longest - sequence.length
            piece = sequence.token_ids[max(0, step.begin - pad) : max(0, step.end - pad)]
            if piece:
                ids[row, -len(piece) :] = torch.tensor(piece)
        columns = torch.arange(step.begin, step.end)
        positions = (columns[None] - pads[:, None]).clamp(min=0)
        mask = None if not pads.any() else torch.arange(step.end)[None] >= pads[:, None]
        if step.pools:
            self._pool.add(self._hidden(rows, ids, positions, mask, group), columns[None] >= pads[:, None])
        else:
            logits = self._logits(rows, ids, positions, mask, group, last=1)[:, -1]
        self._note_cache()
        if not step.completes_prefill:
            return None
        if step.pools:
            vectors = _in_order(self._pool.vectors(), rows, step.prefill)
            self.drop_prompts()
            return vectors
        for sequence in rows:
            sequence.cached = sequence.length
        self._batch.join(group)
        self._rows += rows
        self._group, self._group_rows = self._new_cache(), []
        return _in_order(logits, rows, step.prefill)

    def _begin(self, step: Step) -> None:
        """Makes a cache for the prompts of a new group."""
        self._group, self._group_rows = self._new_cache(), list(step.prefill)
        self._pool = Pool()
        self._group.window.rows = len(step.prefill)
        more = cells(len(step.prefill), step.longest)
        if self.max_cells is not None and self._batch.cells + more > self.max_cells:
            self._batch.compact()
        self._group.reserve(len(step.prefill), step.longest)

    @property
    def bytes_per_token(self) -> float:
        """Does what `TextKeeper` says."""
        return self._batch.buffer_bytes / max(1, self._batch.cells)

    def kept(self, sequence: Sequence) -> Layers | None:
        """Does what `TextKeeper` says. States have all tokens of a text in them, so a cache with states cannot."""
        if sequence not in self._rows or not self.can_roll_back:
            return None
        return self._batch.row(self._rows.index(sequence), sequence.cached)

    def begin_with(self, step: Step, layers: Layers, tokens: int) -> None:
        """Does what `TextKeeper` says."""
        self._begin(step)
        self._group.begin_with(layers, tokens)

    def drop_prompts(self) -> None:
        """Does what `Runner` says."""
        self._group, self._group_rows, self._pool = self._new_cache(), [], Pool()

    def decode(self, sequences: ReadOnlySequence[Sequence]) -> torch.Tensor:
        """Does what `Runner` says. The sequences are those in the cache, in any order."""
        rows = self._rows
        logits = self._extend([[sequence.output_ids[-1]] for sequence in rows])[:, -1]
        for sequence in rows:
            sequence.cached += 1
        return _in_order(logits, rows, sequences)

    def verify(
        self, sequences: ReadOnlySequence[Sequence], drafts: ReadOnlySequence[ReadOnlySequence[int]]
    ) -> torch.Tensor:
        """Does what `Verifier` says. The sequences are those in the cache, in any order."""
        pairs = zip(sequences, drafts, strict=True)
        return self.extend(sequences, [[sequence.output_ids[-1], *draft] for sequence, draft in pairs])

    def extend(
        self,
        sequences: ReadOnlySequence[Sequence],
        tokens: ReadOnlySequence[ReadOnlySequence[int]],
        logits_of: int | None = None,
    ) -> torch.Tensor:
        """Computes the next tokens of each sequence, of which each needs one at least, in one pass. The sequences are
        those in the cache, in any order.

        Returns logits of shape (sequences, the most tokens, vocabulary), or those of the last `logits_of` places alone.
        They mean nothing beyond a sequence's own tokens. `keep` has to follow.
        """
        rows, tokens_of = self._rows, dict(zip(sequences, tokens, strict=True))
        logits = self._extend([tokens_of[sequence] for sequence in rows], logits_of)
        self._unverified = max(map(len, tokens))
        return _in_order(logits, rows, sequences)

    def take_back(self, tokens: Mapping[Sequence, int]) -> None:
        """Takes so many of the last tokens of each sequence back, and none of those that are not named."""
        rows = self._rows
        for sequence in rows:
            sequence.cached -= tokens.get(sequence, 0)
        self._batch.roll_back([tokens.get(sequence, 0) for sequence in rows], [sequence.cached for sequence in rows])

    def keep(self, tokens: Mapping[Sequence, int]) -> None:
        """Does what `Verifier` says."""
        rows, computed = self._rows, self._unverified
        self._unverified = 0
        for sequence in rows:
            sequence.cached += tokens.get(sequence, 0)
        taken = [computed - tokens.get(sequence, 0) for sequence in rows]
        self._batch.roll_back(taken, [sequence.cached for sequence in rows])

    def _extend(self, tokens: ReadOnlySequence[ReadOnlySequence[int]], logits_of: int | None = None) -> torch.Tensor:
        """Computes the next tokens of each row in one pass, and returns their logits, of shape (rows, columns,
        vocabulary), or those of the last `logits_of` columns. Rows with fewer tokens are filled up on the right, where
        causal attention hides it from them."""
        batch, columns = self._batch, max(map(len, tokens))
        cached = [sequence.cached for sequence in self._rows]
        batch.shrink(max(cached))
        batch.reserve(len(tokens), columns)
        ids = torch.tensor([[*row, *[row[-1]] * (columns - len(row))] for row in tokens])
        # What fills up has the position of the last token, because a model may know no later one.
        places = torch.arange(columns)[None].minimum(torch.tensor([[len(row) - 1] for row in tokens]))
        lengths, width = torch.tensor(cached), batch.window.width
        mask = None
        if min(cached) < width and batch.has_keys:  # A state has no columns to hide.
            mask = torch.arange(width + columns)[None] >= (width - lengths)[:, None]
        logits = self._logits(self._rows, ids, lengths[:, None] + places, mask, batch, logits_of or columns)
        self._note_cache()
        return logits

    def _note_cache(self) -> None:
        """Keeps in `most_cache_bytes` the most that the cache may have held so far. A group exists twice while it is
        joined, and one layer exists twice while it is moved, or in the model's type too while it is read."""
        if (room := self._batch.cells + self._group.cells) <= self._most_cells:
            return
        self._most_cells = room
        running, group = self._batch.bytes_by_device, self._group.bytes_by_device
        largest = self._batch.transient_bytes
        for device in {*running, *group}:
            size = running.get(device, 0) + 2 * group.get(device, 0) + largest.get(device, 0)
            self.most_cache_bytes[device] = max(size, self.most_cache_bytes.get(device, 0))

    def drop(self, sequence: Sequence) -> None:
        """Does what `Runner` says."""
        for rows, cache in ((self._rows, self._batch), (self._group_rows, self._group)):
            if sequence in rows:
                row = rows.index(sequence)
                cache.remove(row)
                if cache is self._group:
                    self._pool.remove(row)
                rows[row] = rows[-1]
                rows.pop()
        sequence.cached = 0

    def reset(self) -> None:
        """Does what `Runner` says."""
        for sequence in (*self._rows, *self._group_rows):
            sequence.cached = 0
        self._rows, self._group_rows, self._unverified = [], [], 0
        self._batch, self._group = self._new_cache(), self._new_cache()
        free_memory()

    def cache_tensors(self) -> list[torch.Tensor]:
        """Does what `Runner` says."""
        return self._batch.tensors() + self._group.tensors()

    def _logits(
        self,
        rows: ReadOnlySequence[Sequence],
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: BatchCache,
        last: int,
    ) -> torch.Tensor:
        """Returns the logits of the `last` columns, of shape (rows, `last`, vocabulary)."""
        inputs = self._inputs(ids, positions, mask, cache)
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = last
        with _adapters_of(rows, self.adapters):
            logits: torch.Tensor = self._model(**inputs).logits[:, -last:]
        cache.advance(ids.shape[1])
        return logits

    def _hidden(
        self,
        rows: ReadOnlySequence[Sequence],
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: BatchCache,
    ) -> torch.Tensor:
        """Returns the last hidden states, of shape (rows, columns, hidden size)."""
        inputs = self._inputs(ids, positions, mask, cache)
        with _adapters_of(rows, self.adapters):
            states: torch.Tensor = self._model.get_decoder()(**inputs).last_hidden_state
        cache.advance(ids.shape[1])
        return states

    def _inputs(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, cache: BatchCache
    ) -> dict[str, Any]:
        return forward_inputs(self._takes, self._device, ids, positions, mask, cache)


def _adapters_of(rows: ReadOnlySequence[Sequence], bank: AdapterBank | None) -> AbstractContextManager[None]:
    """Returns a context in which a pass over these sequences computes each with its adapter."""
    return nullcontext() if bank is None else bank.rows([sequence.adapter for sequence in rows])


def arguments_of(model: PreTrainedModel) -> frozenset[str]:
    """Returns the names of the arguments that the model's forward pass takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def forward_inputs(
    takes: Set[str],
    device: torch.device,
    ids: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    cache: BatchCache,
) -> dict[str, Any]:
    """Returns the arguments of a forward pass with a cache, of which the model takes those in `takes`.

    Ids and positions have the shape (rows, columns). A mask hides the padding, and has a column for each cached token
    too.
    """
    # Models without attention have another name for it, and would drop the usual one in silence.
    name = "cache_params" if "cache_params" in takes else "past_key_values"
    inputs: dict[str, Any] = {"input_ids": ids.to(device), name: cache.cache, "use_cache": True}
    if "position_ids" in takes:
        inputs["position_ids"] = positions.to(device)
    if mask is not None:
        inputs["attention_mask"] = mask.long().to(device)
    return inputs


def _in_order(
    logits: torch.Tensor, rows: ReadOnlySequence[Sequence], wanted: ReadOnlySequence[Sequence]
) -> torch.Tensor:
    """Returns the rows of `logits` in the order of `wanted`, since rows change places when one leaves the cache."""
    if list(rows) == list(wanted):
        return logits
    place = {sequence: row for row, sequence in enumerate(rows)}
    return logits[[place[sequence] for sequence in wanted]]


class SerialRunner:
    """Computes one sequence at a time without a cache, so each token costs a pass over the whole text."""

    max_cells: int | None = None
    adapters: AdapterBank | None = None

    def __init__(self, model: PreTrainedModel, input_device: torch.device):
        self._model = model
        self._device = input_device
        self._takes = arguments_of(model)

    def prefill(self, step: Step) -> torch.Tensor | None:
        """Does what `Runner` says."""
        if not step.completes_prefill:
            return None
        return (
            torch.cat([self._vector(sequence) for sequence in step.prefill])
            if step.pools
            else self.decode(step.prefill)
        )

    def drop_prompts(self) -> None:
        """Does nothing, because there is no cache."""

    def decode(self, sequences: ReadOnlySequence[Sequence]) -> torch.Tensor:
        """Does what `Runner` says."""
        return torch.cat([self._pass(sequence) for sequence in sequences])

    def drop(self, sequence: Sequence) -> None:
        """Does nothing, because there is no cache."""

    def reset(self) -> None:
        """Does what `Runner` says."""
        free_memory()

    def cache_tensors(self) -> list[torch.Tensor]:
        """Returns nothing, because there is no cache."""
        return []

    def _pass(self, sequence: Sequence) -> torch.Tensor:
        inputs: dict[str, Any] = {"input_ids": torch.tensor([sequence.token_ids], device=self._device)}
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        with _adapters_of([sequence], self.adapters):
            logits: torch.Tensor = self._model(**inputs, use_cache=False).logits[:, -1]
        return logits

    def _vector(self, sequence: Sequence) -> torch.Tensor:
        ids = torch.tensor([sequence.token_ids], device=self._device)
        pool = Pool()
        with _adapters_of([sequence], self.adapters):
            states = self._model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        pool.add(states, torch.ones(ids.shape, dtype=torch.bool))
        return pool.vectors()


def free_memory() -> None:
    """Gives memory that is not referenced any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
