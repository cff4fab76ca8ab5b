"""Makes one vector of a text, which is the mean of the last hidden states over all tokens, scaled to length 1."""

import torch


class Pool:
    """Sums a group's hidden states as the chunks of its prompts are computed."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None

    def add(self, states: torch.Tensor, is_text: torch.Tensor) -> None:
        """Adds hidden states of shape (rows, columns, hidden size). `is_text`, (rows, columns), is false for
        padding."""
        kept = is_text.to(states.device)
        # Zeros are written instead of multiplied, because the states of padding may be NaN.
        sums = states.float().masked_fill(~kept[..., None], 0).sum(1)
        counts = kept.sum(1, keepdim=True)
        self._sums = sums if self._sums is None else self._sums + sums
        self._counts = counts if self._counts is None else self._counts + counts

    def remove(self, row: int) -> None:
        """Removes one row. The last row takes its number."""
        for values in (self._sums, self._counts):
            if values is not None:
                values[row] = values[-1]
        if self._sums is not None and self._counts is not None:
            self._sums, self._counts = self._sums[:-1], self._counts[:-1]

    def vectors(self) -> torch.Tensor:
        """Returns the vectors, float32 of shape (rows, hidden size). At least one chunk must have been added."""
        assert self._sums is not None, "a group has a chunk"
        assert self._counts is not None, "sums and counts are kept together"
        return torch.nn.functional.normalize(self._sums / self._counts, dim=-1)
