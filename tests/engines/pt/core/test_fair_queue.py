"""Whose turn it is."""

from serve_app.engines.pt.core.fair_queue import FairQueue
from serve_app.engines.pt.core.sequence import SamplingParams, Sequence


def sequences(owner: str, count: int) -> list[Sequence]:
    """So many of one owner."""
    return [Sequence([1], SamplingParams(max_tokens=1), owner=owner) for _ in range(count)]


def queue(*items: Sequence) -> FairQueue:
    """A queue to which these were added in order."""
    made = FairQueue()
    for item in items:
        made.add(item)
    return made


def drained(waiting: FairQueue) -> list[Sequence]:
    """All, as they are admitted."""
    return [waiting.pop() for _ in range(len(waiting))]


def test_owners_take_turns() -> None:
    """A request of three choices delays one that comes later by one turn."""
    many, one, two = sequences("many", 3), sequences("one", 1), sequences("two", 2)
    waiting = queue(*many, *one, *two)
    order = [many[0], one[0], two[0], many[1], two[1], many[2]]
    assert list(waiting) == order
    assert drained(waiting) == order
    assert waiting.head is None


def test_a_new_owner_waits_for_one_turn_of_each() -> None:
    """It does not pass those that wait, and not one of them is served twice before it."""
    a, b, late = sequences("a", 3), sequences("b", 3), sequences("late", 1)
    waiting = queue(*a, *b)
    assert waiting.pop() is a[0]
    waiting.add(late[0])
    assert [waiting.pop() for _ in range(3)] == [b[0], a[1], late[0]]


def test_what_is_put_back_comes_first_and_in_order() -> None:
    """It was admitted once."""
    a, b = sequences("a", 2), sequences("b", 2)
    waiting = queue(*a)
    waiting.put_back(b)
    assert drained(waiting) == [*b, *a]


def test_removal_finds_them_in_every_line() -> None:
    """And leaves alone what is not there."""
    a, b, back = sequences("a", 2), sequences("b", 1), sequences("a", 1)
    waiting = queue(*a, *b)
    waiting.put_back(back)
    waiting.remove({a[0], b[0], back[0], *sequences("c", 1)})
    assert drained(waiting) == [a[1]]
