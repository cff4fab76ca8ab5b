"""Runs one pass over a group of inputs, padded on the right to the longest of them."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from serve_app.engines.pt.pooling.head import Head
from serve_app.engines.pt.pooling.inputs import Input


class PoolingRunner:
    """Computes vectors with a `head`, or the scores of a classifier without one.

    Padding is on the right, so it changes nothing for causal models, whose tokens see only what is before them, and for
    encoders that count positions from the left. Other tokens are kept from seeing it by the mask.
    """

    def __init__(self, model: PreTrainedModel, head: Head | None, device: torch.device, padding: int):
        self.head = head
        self.model, self._device, self._padding = model, device, padding
        # A decoder with a classifier takes the last token that is not padding by its id, which may be one of the text.
        self._score = None if head is not None else getattr(model, "score", None)
        called = model if self._score is None else model.base_model
        self._called = called
        self._arguments = frozenset(inspect.signature(called.forward).parameters)

    def run(self, inputs: Sequence[Input]) -> torch.Tensor:
        """Returns float32 of shape (inputs, size) on the CPU, which are vectors before they are shortened or scaled, or
        logits."""
        lengths = torch.tensor([len(item) for item in inputs])
        skipped = torch.tensor([item.skipped for item in inputs])
        ids = self._padded([item.ids for item in inputs], self._padding)
        arguments: dict[str, Any] = {"input_ids": ids}
        if "attention_mask" in self._arguments and lengths.min() != lengths.max():
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            arguments["attention_mask"] = mask.long().to(self._device)
        if "token_type_ids" in self._arguments and inputs[0].types is not None:
            types = [item.types for item in inputs if item.types is not None]
            arguments["token_type_ids"] = self._padded(types, 0)
        if "use_cache" in self._arguments:
            arguments["use_cache"] = False
        return self._made_of(self._called(**arguments), lengths, skipped).float().cpu()

    def run_ids(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Does what `run` does for plain token ids."""
        return self.run([Input(np.array(row, dtype=np.int32), None) for row in rows])

    def _made_of(self, found: Any, lengths: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
        if self.head is not None:
            return self.head(found.last_hidden_state, lengths, skipped)
        if self._score is None:
            logits: torch.Tensor = found.logits
            return logits
        states = found.last_hidden_state
        last = states[torch.arange(len(lengths), device=states.device), lengths.to(states.device) - 1]
        scores: torch.Tensor = self._score(last)
        return scores

    def _padded(self, rows: Sequence[Any], value: int) -> torch.Tensor:
        width = max(row.size for row in rows)
        table = np.full((len(rows), width), value, dtype=np.int64)
        for number, row in enumerate(rows):
            table[number, : row.size] = row
        return torch.from_numpy(table).to(self._device)
