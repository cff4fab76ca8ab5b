"""Which inputs a step takes, and which of them share a pass."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engines.pt.core.fair_queue import FairQueue
from serve_app.engines.pt.pooling.batches import LEAST_SHARE, LEAST_TOKENS, next_step, passes_of
from serve_app.engines.pt.pooling.inputs import Input


def made(length: int, owner: object = None) -> Input:
    """An input of so many tokens."""
    return Input(np.zeros(length, np.int32), owner)


def waiting(*inputs: Input) -> FairQueue[Input]:
    """A queue of them."""
    queue = FairQueue[Input]()
    for item in inputs:
        queue.add(item)
    return queue


def test_owners_take_turns() -> None:
    """Each has one input in a step before another has a second one."""
    large, small = [made(10, "large") for _ in range(50)], made(10, "small")
    assert next_step(waiting(*large, small), tokens=30, rows=8) == [large[0], small, large[1]]


def test_a_step_has_bounds_and_always_one_input() -> None:
    """By tokens and by rows. An input that is longer than a step is a step of its own."""
    queue = waiting(*(made(10) for _ in range(10)), made(500))
    assert [len(next_step(queue, 35, 8)) for _ in range(4)] == [3, 3, 3, 1]
    assert len(next_step(queue, 35, 8)[0]) == 500
    assert next_step(queue, 35, 8) == []
    assert len(next_step(waiting(*(made(1) for _ in range(10))), 100, 4)) == 4


@given(st.lists(st.integers(1, 700), max_size=80), st.integers(1, 600))
def test_passes_hold_every_input_once_within_the_tokens(lengths: list[int], tokens: int) -> None:
    """With their padding, unless a pass is one input; and a pass of many tokens is little padded."""
    inputs = [made(length) for length in lengths]
    passes = passes_of(inputs, tokens)
    assert sorted(map(id, inputs)) == sorted(id(item) for group in passes for item in group)
    for group in passes:
        longest, shortest = max(map(len, group)), min(map(len, group))
        assert len(group) == 1 or longest * len(group) <= tokens
        before = longest * (len(group) - 1)
        assert shortest >= LEAST_SHARE * longest or before < LEAST_TOKENS + longest
