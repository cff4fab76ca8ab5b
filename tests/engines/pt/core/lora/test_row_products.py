"""Products of rows with their adapters, beside the same computed row by row."""

import random

import pytest
import torch

from serve_app.engines.pt.core.lora.adapter import Factors
from serve_app.engines.pt.core.lora.buffers import Siblings, Target
from serve_app.engines.pt.core.lora.row_products import RowProducts

CPU = torch.device("cpu")
INPUTS, RANK, WIDTHS = 6, 4, (5, 3, 7)


def written(slots: int, draw: random.Random) -> tuple[Siblings, list[dict[int, Factors]]]:
    """Three modules with the same input, and the factors of each by slot. An adapter may leave modules out and have a
    lower rank, and each slot has had another adapter before."""
    siblings = Siblings(len(WIDTHS), INPUTS, slots, RANK, torch.float32, CPU)
    held: list[dict[int, Factors]] = []
    for width in WIDTHS:
        target = siblings.add(width)
        factors = {}
        for slot in range(slots):
            target.write(slot, Factors(torch.randn(RANK, INPUTS), torch.full((RANK, width), 1e30)))
            rank = draw.randint(1, RANK)
            new = Factors(torch.randn(rank, INPUTS), torch.randn(rank, width)) if draw.random() < 0.7 else None
            target.write(slot, new)
            if new is not None:
                factors[slot] = new
        held.append(factors)
    return siblings, held


def by_row(y: torch.Tensor, x: torch.Tensor, slots: list[int | None], factors: dict[int, Factors]) -> torch.Tensor:
    """The output with what each row's adapter adds."""
    found = y.clone()
    for row, slot in enumerate(slots):
        if slot is not None and slot in factors:
            found[row] += x[row] @ factors[slot].a.T @ factors[slot].b
    return found


@pytest.mark.parametrize("sums_up", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
@torch.inference_mode()
def test_any_mix_of_rows_is_right_beside_a_row_that_is_not_finite(tokens: int, sums_up: bool) -> None:
    """With one slot or many, side by side or not, and rows of the base among them."""
    torch.manual_seed(tokens)
    draw = random.Random(tokens)
    for _ in range(100):
        count = draw.choice((1, 2, 8))
        siblings, held = written(count, draw)
        weights = [draw.random() ** 4 for _ in range(count + 1)]
        slots = draw.choices([None, *range(count)], weights, k=draw.randint(1, 20))
        products = RowProducts(slots, RANK)
        x = torch.randn(len(slots), tokens, INPUTS)
        bad = draw.randrange(len(slots))
        x[bad] = float("inf")  # This row may become anything, and the others may not.
        others = [row for row in range(len(slots)) if row != bad]
        for target, factors, width in zip(siblings.targets, held, WIDTHS, strict=True):
            target.sums_up = sums_up
            y = torch.randn(len(slots), tokens, width)
            wanted, before = by_row(y, x, slots, factors), y.clone()
            found = products.add(target, x, y)
            torch.testing.assert_close(found[others], wanted[others], atol=1e-4, rtol=1e-4)
            untouched = [row for row in range(len(slots)) if slots[row] is None]
            assert torch.equal(found[untouched], before[untouched])


@torch.inference_mode()
def test_siblings_with_different_inputs_are_computed_apart() -> None:
    """They are siblings by what a trial has found, and a model may do something else in a pass."""
    torch.manual_seed(3)
    siblings, held = written(2, random.Random(3))
    slots: list[int | None] = [0, 1, 1, None]
    products = RowProducts(slots, RANK)
    for target, factors, width in zip(siblings.targets, held, WIDTHS, strict=True):
        for tokens in (1, 2, 1):
            x, y = torch.randn(4, tokens, INPUTS), torch.randn(4, tokens, width)
            wanted = by_row(y, x, slots, factors)
            torch.testing.assert_close(products.add(target, x, y), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3])
@torch.inference_mode()
def test_outputs_keep_their_type(tokens: int, dtype: torch.dtype) -> None:
    """Quantised layers may give another type than the buffers have."""
    target: Target = Siblings(1, INPUTS, 2, RANK, torch.float32, CPU).add(5)
    factors = Factors(torch.ones(RANK, INPUTS), torch.ones(RANK, 5))
    target.write(1, factors)
    x, y = torch.ones(3, tokens, INPUTS, dtype=dtype), torch.zeros(3, tokens, 5, dtype=dtype)
    found = RowProducts([1, None, 1], RANK).add(target, x, y)
    assert found.dtype == dtype
    assert found[:, 0, 0].tolist() == [RANK * INPUTS, 0, RANK * INPUTS]
