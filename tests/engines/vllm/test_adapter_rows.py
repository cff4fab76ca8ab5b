"""Rows of several adapters and of none in one product, as vLLM has them on the CPU."""

import pytest
import torch

from serve_app.engines.vllm.adapter_rows import expand, masks, shrunk

SLOTS, RANK, INPUTS, OUTPUTS = 3, 4, 10, 6


@pytest.mark.parametrize("width", [OUTPUTS, OUTPUTS - 2, OUTPUTS + 2])
@torch.inference_mode()
def test_each_row_gets_its_own_adapter(width: int) -> None:
    """And a row without one exactly nothing. The head may have more or fewer outputs than the factors."""
    torch.manual_seed(1)
    a, b = torch.randn(SLOTS, 1, RANK, INPUTS), torch.randn(SLOTS, 1, OUTPUTS, RANK)
    slots = torch.tensor([2, -1, 0, 0, 1, -1])
    x, y = torch.randn(len(slots), INPUTS), torch.randn(len(slots), width)
    expected = y.clone()
    common = min(width, OUTPUTS)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[row, :common] += (0.5 * b[slot, 0] @ (a[slot, 0] @ x[row]))[:common]
    without = y[slots < 0].clone()
    expand(y, shrunk(x, a, masks(slots, SLOTS, RANK, x.dtype), 0.5), b)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(y[slots < 0], without)


@torch.inference_mode()
def test_a_mask_has_the_columns_of_a_rows_slot() -> None:
    """All zeros for no adapter."""
    assert masks(torch.tensor([1, -1]), 2, 2, torch.float32).tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
