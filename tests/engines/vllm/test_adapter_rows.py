"""Rows of several adapters and of none in batched products, as vLLM has them on the CPU."""

import random

import pytest
import torch

from serve_app.engines.vllm.adapter_rows import AdapterRows, StepRows

SLOTS, RANK, INPUTS, OUTPUTS = 3, 4, 10, 6


def expected(
    y: torch.Tensor, x: torch.Tensor, slots: list[int], a: torch.Tensor, b: torch.Tensor, scale: float = 1
) -> torch.Tensor:
    """The output, row by row. It may have more or fewer columns than the factors."""
    found, common = y.clone(), min(y.shape[1], b.shape[2])
    for row, slot in enumerate(slots):
        if slot >= 0:
            found[row, :common] += (scale * b[slot, 0] @ (a[slot, 0] @ x[row]))[:common]
    return found


@pytest.mark.parametrize("width", [OUTPUTS, OUTPUTS - 2, OUTPUTS + 2])
@torch.inference_mode()
def test_each_row_gets_its_own_adapter(width: int) -> None:
    """And a row without one exactly nothing. The head may have more or fewer outputs than the factors."""
    torch.manual_seed(1)
    a, b = torch.randn(SLOTS, 1, RANK, INPUTS), torch.randn(SLOTS, 1, OUTPUTS, RANK)
    slots = [2, -1, 0, 0, 1, -1]
    x, y = torch.randn(len(slots), INPUTS), torch.randn(len(slots), width)
    wanted, before = expected(y, x, slots, a, b, 0.5), y.clone()
    rows = StepRows(torch.tensor(slots), {}).of(len(slots), (b,))
    assert rows is not None
    rows.add(y, x, (a,), (b,), 0.5, [width])
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(y[[1, 5]], before[[1, 5]])


@torch.inference_mode()
def test_any_mix_of_rows_is_right_beside_numbers_that_are_not_finite() -> None:
    """With modules of three widths in one output, as queries, keys and values are, and adapters that change some."""
    torch.manual_seed(2)
    draw, widths = random.Random(2), [8, 4, 4]
    for _ in range(200):
        count = draw.choice((1, 3, 8))
        a = [torch.randn(count, 1, RANK, INPUTS) for _ in widths]
        b = [torch.randn(count, 1, width, RANK) for width in widths]
        for stacked in b:
            stacked[draw.randrange(count)] = 0
        slots = draw.choices(range(-1, count), [draw.random() ** 4 for _ in range(count + 1)], k=draw.randint(1, 30))
        x, y = torch.randn(len(slots), INPUTS), torch.randn(len(slots), sum(widths))
        x[0] = float("inf")  # This row may become anything, and the others may not.
        wanted = torch.cat(
            [expected(part, x, slots, *own) for part, *own in zip(y.split(widths, 1), a, b, strict=True)], 1
        )
        if (rows := StepRows(torch.tensor(slots), {}).of(len(slots), b)) is not None:
            rows.add(y, x, a, b, 1, widths)
        torch.testing.assert_close(y[1:], wanted[1:], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_an_embedding_has_only_the_second_product() -> None:
    """Its first factors were looked up."""
    torch.manual_seed(3)
    b, slots = torch.randn(SLOTS, 1, OUTPUTS, RANK), [1, -1, 2, 1]
    x, y = torch.randn(len(slots), RANK), torch.zeros(len(slots), OUTPUTS)
    AdapterRows(slots, 0b110).expand(y, x, b)
    for row, slot in enumerate(slots):
        wanted = b[slot, 0] @ x[row] if slot >= 0 else torch.zeros(OUTPUTS)
        torch.testing.assert_close(y[row], wanted, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_what_no_row_s_adapter_changes_is_left_out() -> None:
    """Which slots have numbers is asked once, until somebody says that slots were written."""
    b, written = torch.zeros(SLOTS, 1, OUTPUTS, RANK), dict[int, int]()
    b[1] = 1
    assert StepRows(torch.tensor([0, 2, -1]), written).of(3, (b,)) is None
    assert StepRows(torch.tensor([0, 2, 1]), written).of(3, (b,)) is not None
    assert StepRows(torch.tensor([0, 2, 1]), written).of(2, (b,)) is None
    b[2] = 1
    assert StepRows(torch.tensor([2]), written).of(1, (b,)) is None
    written.clear()
    assert StepRows(torch.tensor([2]), written).of(1, (b,)) is not None
