"""Grouped attention is transformers' own, without the copies, on the CPU and in the form for CUDA."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from serve_app.engines.pt.load.attention import MOST_FOLDED, folded_sdpa, grouped_sdpa, may_fold


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


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("queries", [1, 3, MOST_FOLDED // 4, MOST_FOLDED + 1])
@pytest.mark.parametrize("added", [True, False])
@torch.inference_mode()
def test_folded_heads_equal_repeated_keys(dtype: torch.dtype, groups: int, queries: int, added: bool) -> None:
    """One query, drafts, a short chunk and one of which one head at a time is computed, over the window of a cache,
    with a mask of either kind that differs by row and by query."""
    rows = 3 if queries < 4 else 1
    buffers = torch.randn(2, rows + 1, 2, 40, 8, dtype=dtype)
    key, value = buffers[:, :rows, :, 7:36]
    query = torch.randn(rows, queries, 2 * groups, 8, dtype=dtype).transpose(1, 2)  # As a model makes it.
    mask = torch.rand(rows, 1, queries, 29) > 0.3
    mask[..., -1] = True
    if added:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    expected, _ = sdpa_attention_forward(Groups(groups), query, key, value, mask, scaling=0.5)
    got = folded_sdpa(query, key, value, mask, scaling=0.5)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@torch.inference_mode()
def test_a_mask_may_hold_for_all_rows_and_queries() -> None:
    """It is repeated for the folded heads all the same, and values may be of another size than keys."""
    query, key, value = torch.randn(4, 6, 3, 8), torch.randn(4, 2, 20, 8), torch.randn(4, 2, 20, 5)
    mask = torch.randn(1, 1, 1, 20)
    expected, _ = sdpa_attention_forward(Groups(3), query, key, value, mask)
    torch.testing.assert_close(folded_sdpa(query, key, value, mask), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "queries", "columns", "heads_of_mask", "folds"),
    [
        (32, 1, 4096, 1, True),  # A step of all rows.
        (32, 5, 4096, 1, True),  # Drafts are among them.
        (1, 512, 4096, 1, False),  # A chunk, whose copies the plan counts.
        (4, 128, 512, 1, False),  # A group of prompts.
        (1, 512, 4097, 1, True),  # A long prompt.
        (32, 1, 4096, 28, False),
    ],
)
def test_copies_are_made_only_where_the_plan_counts_them(
    rows: int, queries: int, columns: int, heads_of_mask: int, folds: bool
) -> None:
    """Heads of Qwen2-7B's shape."""
    with torch.device("meta"):
        query, key = torch.empty(rows, 28, queries, 128), torch.empty(rows, 4, columns, 128)
        assert may_fold(query, key, torch.empty(rows, heads_of_mask, queries, columns)) == folds


@torch.inference_mode()
def test_a_gpu_folds_and_repeats_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of a tensor decides. The meta device stands for a GPU, and shapes are all that it has."""
    asked = []

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        asked.append((tuple(query.shape), tuple(key.shape), key.data_ptr(), tuple(options["attn_mask"].shape)))
        return query

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    with torch.device("meta"):
        query, key, mask = torch.empty(4, 6, 1, 8), torch.empty(4, 2, 20, 8), torch.empty(4, 1, 1, 20)
        output, _ = grouped_sdpa(Groups(3), query, key, key, mask)
    assert output.shape == (4, 1, 6, 8)
    assert asked == [((4, 2, 3, 8), (4, 2, 20, 8), key.data_ptr(), (4, 1, 3, 20))]
