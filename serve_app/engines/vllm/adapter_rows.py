"""Multiplies the rows of a step with the factors of their LoRA adapters, for vLLM on the CPU.

vLLM 0.32's own functions for the CPU take the last slot's adapter for rows without one, and copy an adapter's factors
for each row. Here all slots are multiplied at once, and what does not belong to a row's adapter is masked. So a row
without an adapter gets exactly nothing, if all factors are finite, which is checked when an adapter is loaded.
"""

import torch


def masks(slots: torch.Tensor, count: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns for each row a one in the columns of its slot, of `rank` columns for each of `count` slots, and zeros
    elsewhere. The slot -1 stands for no adapter."""
    chosen = torch.nn.functional.one_hot(slots + 1, count + 1)[:, 1:]
    return chosen.to(dtype).repeat_interleave(rank, dim=1)


def shrunk(x: torch.Tensor, a: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns the rows times the first factors of their adapters, in the columns of their slots. `a` has the shape
    (slots, 1, rank, inputs)."""
    found = torch.mm(x, a.flatten(0, 2).t().to(x.dtype)) * mask
    return found if scale == 1 else found * scale


def expand(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> None:
    """Adds the second factors' part to the rows of `y`. `b` has the shape (slots, 1, outputs, rank), of which `y` may
    have fewer or more outputs."""
    factors = b[:, 0].permute(0, 2, 1).flatten(0, 1)
    width = min(y.shape[1], factors.shape[1])
    y[:, :width].addmm_(h.to(y.dtype), factors[:, :width].to(y.dtype))
