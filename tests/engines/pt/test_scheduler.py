"""Which sequences run."""

from serve_app.engines.pt.scheduler import Scheduler
from serve_app.engines.pt.sequence import SamplingParams, Sequence


def sequences(count: int) -> list[Sequence]:
    """`count` different sequences."""
    return [Sequence([1], SamplingParams(max_tokens=1)) for _ in range(count)]


def test_first_come_first_served_up_to_the_limit() -> None:
    """The third waits while two run, and takes the place that becomes free."""
    scheduler = Scheduler(max_num_seqs=2)
    first, second, third = sequences(3)
    for sequence in (first, second, third):
        scheduler.add(sequence)
    assert scheduler.schedule() == [first, second]
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    assert scheduler.remove(first)
    assert scheduler.schedule() == [second, third]


def test_a_waiting_sequence_can_be_removed() -> None:
    """A client may leave before its turn."""
    scheduler = Scheduler(max_num_seqs=1)
    first, second = sequences(2)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.schedule() == [first]
    assert scheduler.remove(second)
    assert scheduler.sequences == [first]


def test_removing_twice_is_harmless() -> None:
    """A cancel may cross the end of a sequence."""
    scheduler = Scheduler(max_num_seqs=1)
    (only,) = sequences(1)
    scheduler.add(only)
    assert scheduler.remove(only)
    assert not scheduler.remove(only)
