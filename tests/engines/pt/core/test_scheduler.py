"""What the next step computes."""

from typing import Any

from serve_app.engines.pt.core.scheduler import STEPS_TO_GROW, Limits, Scheduler, Step
from serve_app.engines.pt.core.sequence import SamplingParams, Sequence


def sequence(prompt: int = 4, max_tokens: int = 4, **fields: Any) -> Sequence:
    """A sequence with a prompt of so many tokens."""
    return Sequence([1] * prompt, SamplingParams(max_tokens=max_tokens), **fields)


def scheduler(
    *sequences: Sequence, rows: int = 8, tokens: int = 10_000, chunk: int = 512, pad: bool = True
) -> Scheduler:
    """A scheduler with these waiting."""
    result = Scheduler(Limits(rows, tokens, chunk, pad_prompts=pad))
    for item in sequences:
        result.add(item)
    return result


def advance(scheduled: Scheduler, count: int = 1) -> Step:
    """Computes steps; returns the last."""
    for _ in range(count):
        step = scheduled.schedule()
        scheduled.complete(step)
    return step


def test_waiting_prompts_are_computed_together_and_then_decode() -> None:
    """One pass for both prompts, then one token each a step."""
    a, b = sequence(), sequence(5)
    scheduled = scheduler(a, b)
    assert scheduled.decoding == ()
    step = advance(scheduled)
    assert (step.prefill, step.begin, step.end) == ((a, b), 0, 5)
    assert scheduled.decoding == (a, b)


def test_nobody_is_admitted_before_one_that_came_earlier() -> None:
    """A long one at the head holds the short ones behind it back, though they would fit."""
    running, long, short = sequence(4, 96), sequence(4, 196), sequence(1, 1)
    scheduled = scheduler(running, tokens=399)
    advance(scheduled)
    scheduled.add(long)  # 2 rows of 200 are over 399
    scheduled.add(short)
    assert advance(scheduled).prefill == ()
    scheduled.remove([running])
    assert advance(scheduled).prefill == (long,)


def test_the_rectangle_of_the_longest_needs_stays_within_the_budget() -> None:
    """Two rows of ten fit into twenty tokens, three do not."""
    a, b, c = (sequence(5, 5) for _ in range(3))
    assert scheduler(a, b, c, tokens=20).schedule().prefill == (a, b)


def test_one_alone_is_admitted_whatever_it_needs() -> None:
    """Requests over the budget are refused at the door; here a lone one must not wait for ever."""
    a = sequence(50, 50)
    assert scheduler(a, tokens=20).schedule().prefill == (a,)


def test_long_prompts_come_in_chunks_while_others_decode() -> None:
    """The running row gets its token in every step."""
    a, long = sequence(4, 100), sequence(20)
    scheduled = scheduler(a, chunk=8)
    advance(scheduled)
    scheduled.add(long)
    steps = [advance(scheduled) for _ in range(4)]
    assert [(step.begin, step.end) for step in steps[:3]] == [(0, 8), (8, 16), (16, 20)]
    assert [step.completes_prefill for step in steps] == [False, False, True, False]
    assert scheduled.decoding == (a, long)


def test_a_chunk_is_shared_by_the_group() -> None:
    """Four prompts of 16 tokens with 32 a step: eight columns each."""
    scheduled = scheduler(*(sequence(16) for _ in range(4)), chunk=32)
    assert (scheduled.schedule().begin, scheduled.schedule().end) == (0, 8)


def test_prompts_of_very_different_length_are_not_padded_to_one() -> None:
    """Padding stays below a third."""
    short, long, medium = sequence(4), sequence(40), sequence(30)
    scheduled = scheduler(short, long, medium)
    assert advance(scheduled).prefill == (short,)
    assert advance(scheduled).prefill == (long, medium)


def test_without_padding_only_equal_lengths_share_a_pass() -> None:
    """States of hybrids do not know padding."""
    a, b, c = sequence(4), sequence(4), sequence(5)
    assert scheduler(a, b, c, pad=False).schedule().prefill == (a, b)


def test_a_cancelled_prompt_does_not_shift_the_others() -> None:
    """The longest of a group leaves between two chunks: the columns stay as they were."""
    a, longest = sequence(18), sequence(20)
    scheduled = scheduler(a, longest, chunk=16)
    advance(scheduled)
    scheduled.remove([longest])
    step = scheduled.schedule()
    assert (step.prefill, step.begin, step.longest) == ((a,), 8, 20)
    advance(scheduled)
    advance(scheduled)
    assert scheduled.decoding == (a,)


def test_out_of_memory_puts_all_back_in_order_and_halves_the_batch() -> None:
    """Those that came later still come later."""
    a, b, c, d, late = (sequence(4, 50) for _ in range(5))
    scheduled = scheduler(a, b, c, d, late, rows=4)
    advance(scheduled)
    assert scheduled.retreat() == []
    assert scheduled.batch_limit == 2
    assert scheduled.schedule().prefill == (a, b)
    assert scheduled.sequences == [a, b, c, d, late]


def test_the_batch_grows_back() -> None:
    """One more after each calm stretch, up to the configured limit."""
    scheduled = scheduler(*(sequence(4, 1000) for _ in range(4)), rows=4)
    advance(scheduled)
    scheduled.retreat()
    advance(scheduled, STEPS_TO_GROW)
    assert scheduled.batch_limit == 3
    advance(scheduled, 3 * STEPS_TO_GROW)
    assert scheduled.batch_limit == 4


def test_one_that_is_alone_and_too_big_is_given_up() -> None:
    """At the second time: the first may have been somebody else's doing."""
    alone = sequence()
    scheduled = scheduler(alone)
    advance(scheduled)
    assert scheduled.retreat() == []
    advance(scheduled)
    assert scheduled.retreat() == [alone]
    assert scheduled.sequences == []


def test_removing_what_is_not_there_is_harmless() -> None:
    """A cancel may cross the end of a sequence."""
    scheduled = scheduler(sequence())
    scheduled.remove([sequence()])
    assert scheduled.waiting == 1


def test_prompts_that_pool_share_no_pass_with_others_and_never_run() -> None:
    """Their vectors are there when their prompts are computed."""
    text, first, second = sequence(), sequence(pools=True), sequence(pools=True)
    scheduled = scheduler(text, first, second)
    assert advance(scheduled).prefill == (text,)
    step = advance(scheduled)
    assert (step.prefill, step.pools) == ((first, second), True)
    assert scheduled.decoding == (text,)
    assert scheduled.sequences == [text]


def test_prompts_that_pool_take_small_chunks_beside_others() -> None:
    """And usual ones where nobody gets tokens."""
    running, pooling = sequence(4, 50), sequence(100, pools=True)
    scheduled = scheduler(running)
    advance(scheduled)
    scheduled.add(pooling)
    step = advance(scheduled)
    assert (step.begin, step.end) == (0, 64)
    scheduled.remove([running])
    assert scheduled.schedule().end == 100
    assert scheduler(sequence(100, pools=True)).schedule().end == 100


def test_a_group_of_long_prompts_ends_before_the_next_owners_turn() -> None:
    """Of sixty long inputs or choices of one request, another request waits for one group, which is a few steps."""
    for pools in (True, False):
        running, other = sequence(4, 5000), sequence(owner="other")
        scheduled = scheduler(running, rows=128, tokens=10**7)
        advance(scheduled)
        for _ in range(60):
            scheduled.add(sequence(500, 50, owner="many", pools=pools))
        scheduled.add(other)
        steps = 0
        while other not in scheduled.decoding:
            advance(scheduled)
            steps += 1
        assert steps <= 10


def test_a_sequence_that_comes_back_in_its_owners_line_is_the_next_of_it() -> None:
    """Its later sequences stay behind it, and the owners' turns stay as they were."""
    late, later, other = sequence(owner="a"), sequence(owner="a"), sequence(owner="b")
    scheduled = scheduler(late, rows=1)
    advance(scheduled)
    scheduled.park([late])
    scheduled.add(other)
    scheduled.add(later)
    scheduled.unpark([late], first=False)
    assert scheduled.sequences == [other, late, later]


def test_one_owner_leaves_a_row_of_eight_to_others() -> None:
    """A request that fills the batch for a long time does not keep another one from its first token."""
    many = [sequence(4, 5000, owner="many") for _ in range(20)]
    scheduled = scheduler(*many, rows=16, tokens=10**7)
    advance(scheduled, 8)
    assert scheduled.running == 14
    other = sequence(owner="other")
    scheduled.add(other)
    advance(scheduled)
    assert other in scheduled.decoding


def test_choices_of_one_request_run_together_where_the_cache_has_few_rows() -> None:
    """Eight rows would leave one to others; seven, six and fewer are too few for that."""
    many = [sequence(4, 96, owner="many") for _ in range(4)]
    assert len(advance(scheduler(*many, rows=32, tokens=400)).prefill) == 4
    many = [sequence(4, 96, owner="many") for _ in range(9)]
    assert len(advance(scheduler(*many, rows=32, tokens=800)).prefill) == 7


def test_a_request_of_many_prompts_leaves_turns_to_others() -> None:
    """With one row, the other request is second and not hundredth."""
    many = [sequence(owner="many", pools=True) for _ in range(100)]
    other = sequence(owner="other")
    scheduled = scheduler(*many, other, rows=1)
    assert advance(scheduled).prefill == (many[0],)
    assert advance(scheduled).prefill == (other,)


def test_prompts_that_failed_together_are_computed_apart() -> None:
    """Those that fail by themselves are given up; the running ones stay."""
    running, a, b = sequence(4, 50), sequence(), sequence()
    scheduled = scheduler(running)
    advance(scheduled)
    scheduled.add(a)
    scheduled.add(b)
    assert scheduled.schedule().prefill == (a, b)
    assert scheduled.separate() == []
    assert scheduled.schedule().prefill == (a,)
    assert scheduled.separate() == [a]
    assert scheduled.schedule().prefill == (b,)
    assert scheduled.decoding == (running,)


def test_the_parked_hold_no_place() -> None:
    """The next in line takes it; one that is slow at each token comes back at its owner's turn and holds up nobody, and
    one that was late for once comes back first."""
    slow, next_one, last = (sequence(4, 50) for _ in range(3))
    scheduled = scheduler(slow, next_one, last, rows=1)
    advance(scheduled)
    scheduled.park([slow])
    assert scheduled.parked == (slow,)
    assert advance(scheduled).prefill == (next_one,)
    scheduled.unpark([slow], first=True)
    assert scheduled.sequences == [next_one, slow, last]
    scheduled.remove([next_one])
    advance(scheduled)
    scheduled.park([slow])
    scheduled.unpark([slow], first=False)
    assert scheduled.sequences == [last, slow]
    scheduled.remove([last])
    assert advance(scheduled).prefill == (slow,)
    scheduled.park([slow])
    scheduled.remove([slow])
    assert scheduled.parked == ()
