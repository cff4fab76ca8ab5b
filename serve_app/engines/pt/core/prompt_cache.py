"""Keeps the keys and values of texts that have ended in the host's memory, for prompts that begin with them.

Laws:
- A text is taken only for prompts of the adapter with which it was computed, and of the same version of it.
- Only whole tokens from a text's first one on are taken, so keys have the positions at which they were computed.
- The kept texts take at most `budget` bytes together. The one that was used longest ago goes first, and a text that is
  larger than the whole budget is not kept.
- It saves time and changes no text: what it brings is what the model would compute.
"""

from collections import OrderedDict
from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass

import numpy
import numpy.typing
import torch

from serve_app.engines.prompt_cache_counts import PromptCacheCounts

Ids = numpy.typing.NDArray[numpy.int64]

# Fewer tokens are computed faster than they are looked up and copied.
LEAST_TOKENS = 64
ID_BYTES = 8


@dataclass(frozen=True, eq=False)
class KeptText:
    """This is a text: its ids, and for each layer its tensors of shape (heads, tokens, size) in the host's memory. It
    was computed with the adapter of this version, or with the base model if that is None."""

    ids: Ids
    layers: ReadOnlySequence[ReadOnlySequence[torch.Tensor]]
    adapter: int | None = None

    @property
    def bytes(self) -> int:
        """Returns the bytes of everything that is kept."""
        tensors: int = sum(tensor.nbytes for layer in self.layers for tensor in layer)
        return tensors + int(self.ids.nbytes)


class PromptCache:
    """Is used on the engine's thread alone, except for `counts`. `budget` is in bytes."""

    def __init__(self, budget: int):
        self._budget = budget
        # The text that was used last comes last.
        self._texts: OrderedDict[KeptText, None] = OrderedDict()
        self.counts = PromptCacheCounts()

    def longest_start(self, ids: ReadOnlySequence[int], adapter: int | None = None) -> tuple[KeptText, int] | None:
        """Returns the kept text that begins as these ids do for the most tokens, with the number of these tokens, or
        None if there are fewer than LEAST_TOKENS. The last id is never among them, because its logits are wanted."""
        wanted = _array(ids)
        best, most = None, LEAST_TOKENS - 1
        for text in self._of(adapter):
            common = min(_common(text.ids, wanted), len(wanted) - 1)
            if common > most:
                best, most = text, common
        if best is None:
            return None
        self._texts.move_to_end(best)
        return best, most

    def wants(self, ids: ReadOnlySequence[int], bytes_per_token: float, adapter: int | None = None) -> bool:
        """Returns whether a text of these ids should be kept. One that a kept text begins with is there already."""
        if len(ids) < LEAST_TOKENS or len(ids) * (bytes_per_token + ID_BYTES) > self._budget:
            return False
        new = _array(ids)
        for text in self._of(adapter):
            if _common(text.ids, new) == len(new):
                self._texts.move_to_end(text)
                return False
        return True

    def make_room(self, ids: ReadOnlySequence[int], bytes_per_token: float, adapter: int | None = None) -> None:
        """Frees the texts that these ids begin with, which one of these ids replaces, and others as the budget asks."""
        new = _array(ids)
        for other in [other for other in self._of(adapter) if _common(other.ids, new) == len(other.ids)]:
            self._forget(other)
        size = int(len(ids) * (bytes_per_token + ID_BYTES))
        while self._texts and self.counts.bytes + size > self._budget:
            self._forget(next(iter(self._texts)))
            self.counts.evictions += 1

    def keep(
        self,
        ids: ReadOnlySequence[int],
        layers: ReadOnlySequence[ReadOnlySequence[torch.Tensor]],
        adapter: int | None = None,
    ) -> None:
        """Keeps a text for which there is room."""
        text = KeptText(_array(ids), layers, adapter)
        self._texts[text] = None
        self.counts.texts, self.counts.bytes = len(self._texts), self.counts.bytes + text.bytes

    def forget_adapter(self, adapter: int) -> None:
        """Frees the texts of an adapter's version that no prompt will have again."""
        for text in self._of(adapter):
            self._forget(text)

    def _of(self, adapter: int | None) -> list[KeptText]:
        return [text for text in self._texts if text.adapter == adapter]

    def _forget(self, text: KeptText) -> None:
        del self._texts[text]
        self.counts.texts, self.counts.bytes = len(self._texts), self.counts.bytes - text.bytes


def _array(ids: ReadOnlySequence[int]) -> Ids:
    return numpy.asarray(ids, dtype=numpy.int64)


def _common(one: Ids, other: Ids) -> int:
    """Returns how many ids both begin with."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length
