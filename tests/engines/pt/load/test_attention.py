"""Grouped attention on the CPU is transformers' own, without the copies."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from serve_app.engines.pt.load.attention import grouped_sdpa


class Groups(nn.Module):
    """What transformers' function reads of an attention module."""

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("masked", [True, False])
@torch.inference_mode()
def test_it_equals_the_stock_function(groups: int, queries: int, masked: bool) -> None:
    """With and without a mask, one query or a chunk, one group or several."""
    query = torch.randn(4, 2 * groups, queries, 8)
    key, value = torch.randn(4, 2, 20, 8), torch.randn(4, 2, 20, 8)
    mask = None
    if masked:
        mask = torch.rand(4, 1, queries, 20) > 0.3
        mask[..., -1] = True
    module = Groups(groups)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.5)
    got, _ = grouped_sdpa(module, query, key, value, mask, scaling=0.5)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads_of_mask", [1, 6])
@torch.inference_mode()
def test_masks_may_be_added_and_differ_by_head(heads_of_mask: int) -> None:
    """One query with a mask of numbers, for all heads or for each head, and values of another size than the keys."""
    query, key, value = torch.randn(4, 6, 1, 8), torch.randn(4, 2, 20, 8), torch.randn(4, 2, 20, 5)
    mask = torch.randn(4, heads_of_mask, 1, 20)
    module = Groups(3)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.5)
    got, _ = grouped_sdpa(module, query, key, value, mask, scaling=0.5)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_window_of_a_cache_is_read_in_place() -> None:
    """Rows and columns around the window count nothing, whatever they hold."""
    buffers = torch.full((2, 6, 2, 32, 8), torch.nan)
    buffers[:, :4, :, 7:27] = torch.randn(2, 4, 2, 20, 8)
    key, value = buffers[:, :4, :, 7:27]
    query, mask = torch.randn(4, 6, 1, 8), torch.rand(4, 1, 1, 20) > 0.3
    mask[..., -1] = True
    expected, _ = sdpa_attention_forward(Groups(3), query, key.clone(), value.clone(), mask)
    got, _ = grouped_sdpa(Groups(3), query, key, value, mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
