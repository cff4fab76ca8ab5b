"""Computes attention with fewer key heads than query heads, without copies of keys and values.

transformers' `sdpa` repeats keys and values to the number of query heads whenever there is a mask, because CUDA's fast
kernels need it. The CPU kernel takes groups as they are. In a batch there is nearly always a mask, and the copies cost
more than the attention: 0.6 instead of 0.24 ms a layer with 32 rows of 100 tokens, and 22 instead of 0.9 ms with 400.

A step that computes one token has one query for each query head, and the kernel then multiplies matrices of one row. In
float32, batched products of the query heads of each group with its keys and values are 1.3 to 1.4 times as fast, for 17
and 32 rows of 100 to 180 tokens. To pass a group's heads to the kernel as the queries of one head makes it slower. In
smaller types the kernel keeps its scores in float32 and the products would not, so these stay with the kernel.

CUDA's kernels that take groups take no mask, and the one that takes a mask takes no groups. So there, the heads of a
group become further queries of their key head, and the mask is repeated for them. It is small if there are few
queries, as when all rows get a token. The copies of keys and values would take several times a layer's cache of all
rows. A chunk of a prompt has many queries and few columns, so its keys and values are repeated, as the plan counts it
for up to MOST_REPEATED columns. Beyond these, its heads are computed one after the other.
"""

from typing import Any

import torch
from torch import nn

from serve_app.engines.pt.transformers_internals import replace_attention, stock_attention
from serve_app.planning.fit_pt import MOST_REPEATED, PT_CHUNK_TOKENS

# So many queries of a key head are computed at once on CUDA where heads are folded. A chunk of a prompt has as many, so
# the repeated mask of a step without prompts is hardly larger than that of a chunk.
MOST_FOLDED = PT_CHUNK_TOKENS


def use_grouped_attention() -> None:
    """Puts `grouped_sdpa` in the place of transformers' `sdpa`, for every model of this process."""
    replace_attention(grouped_sdpa)


def grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Returns what transformers' attention function returns: (rows, tokens, heads, size) for a query of (rows, heads,
    tokens, size).

    It leaves what it does not do better to the stock function.
    """
    is_grouped = query.shape[1] != key.shape[1]
    if not is_grouped or attention_mask is None or options.get("position_bias") is not None or options.get("cache"):
        return stock_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    if query.device.type != "cpu":
        if not may_fold(query, key, attention_mask):
            return stock_attention(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
            )
        return folded_sdpa(query, key, value, attention_mask, dropout, scaling), None
    if query.shape[2] == 1 and query.dtype == torch.float32 and dropout == 0 and attention_mask.shape[1] == 1:
        return _by_products(query, key, value, attention_mask, scaling), None
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


def may_fold(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> bool:
    """Returns whether heads are folded, instead of keys and values being repeated: if there are few queries, or more
    columns of all rows than the plan has room for. A mask that differs by head cannot be folded."""
    heads, queries = query.shape[1:3]
    rows, groups, columns = key.shape[:3]
    holds_for_all: bool = mask.shape[1] == 1
    return holds_for_all and (heads // groups * queries <= MOST_FOLDED or rows * columns > MOST_REPEATED)


def folded_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> torch.Tensor:
    """Returns the attention, of shape (rows, tokens, heads, size of a value), where the heads of a group are further
    queries of their key head, so that keys and values are read where they are. At most MOST_FOLDED queries of a key
    head are computed at once, or those of one head.

    The mask, of shape (rows, 1, tokens, columns), holds for all heads. It says which columns count, or is added to the
    scores.
    """
    rows, heads, queries, size = query.shape
    groups = key.shape[1]
    by_group = query.reshape(rows, groups, heads // groups, queries, size)
    outputs = []
    for part in by_group.split(max(1, MOST_FOLDED // queries), dim=2):
        count = part.shape[2]
        repeated = mask.expand(-1, -1, queries, -1).repeat(1, 1, count, 1) if count > 1 else mask
        output = nn.functional.scaled_dot_product_attention(
            part.reshape(rows, groups, count * queries, size),
            key,
            value,
            attn_mask=repeated,
            dropout_p=dropout,
            scale=scaling,
        )
        outputs.append(output.reshape(rows, groups, count, queries, -1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return joined.permute(0, 3, 1, 2, 4).reshape(rows, queries, heads, value.shape[-1])


def _by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Returns the attention of one query for each head, of shape (rows, 1, heads, size of a value).

    The mask, of shape (rows, 1, 1, columns), holds for all heads. It says which columns count, or is added to the
    scores.
    """
    rows, heads, _, size = query.shape
    groups, columns = key.shape[1:3]
    scaled = query * (size**-0.5 if scaling is None else scaling)
    # The window of a cache can be seen as (rows x groups, columns, size) without a copy.
    keys, values = key.reshape(rows * groups, columns, size), value.reshape(rows * groups, columns, value.shape[-1])
    scores = scaled.reshape(rows * groups, heads // groups, size) @ keys.transpose(1, 2)
    by_row = scores.view(rows, 1, heads, columns)
    if mask.dtype == torch.bool:
        by_row.masked_fill_(mask.logical_not(), -torch.inf)
    else:
        by_row += mask
    return (scores.softmax(-1) @ values).view(rows, 1, heads, value.shape[-1])
