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


def taken(waiting: FairQueue, count: int) -> list[Sequence]:
    """So many, as they are admitted."""
    found = []
    for _ in range(count):
        head = waiting.head()
        assert head is not None
        waiting.take(head)
        found.append(head)
    return found


def drained(waiting: FairQueue) -> list[Sequence]:
    """All, as they are admitted."""
    return taken(waiting, len(waiting))


def test_owners_take_turns() -> None:
    """A request of three choices delays one that comes later by one turn."""
    many, one, two = sequences("many", 3), sequences("one", 1), sequences("two", 2)
    waiting = queue(*many, *one, *two)
    order = [many[0], one[0], two[0], many[1], two[1], many[2]]
    assert list(waiting) == order
    assert drained(waiting) == order
    assert waiting.head() is None


def test_a_new_owner_waits_for_one_turn_of_each() -> None:
    """It does not pass those that wait, and not one of them is served twice before it."""
    a, b, late = sequences("a", 3), sequences("b", 3), sequences("late", 1)
    waiting = queue(*a, *b)
    assert taken(waiting, 1) == [a[0]]
    waiting.add(late[0])
    assert taken(waiting, 3) == [b[0], a[1], late[0]]


def test_what_is_put_back_first_has_the_first_turns() -> None:
    """It was admitted once, so it comes before those that were not, each owner's in order."""
    a, b, c = sequences("a", 2), sequences("b", 2), sequences("c", 1)
    waiting = queue(*c, a[1])
    waiting.put_back([*b, a[0]], first=True)
    assert drained(waiting) == [b[0], a[0], c[0], b[1], a[1]]


def test_what_is_put_back_otherwise_is_the_next_of_its_owner() -> None:
    """Owners that wait keep their turns, and owners that come back are the last."""
    a, b, c = sequences("a", 2), sequences("b", 2), sequences("c", 1)
    waiting = queue(*c, a[1])
    waiting.put_back([*b, a[0]], first=False)
    assert drained(waiting) == [c[0], a[0], b[0], a[1], b[1]]


def test_owners_can_be_passed_over() -> None:
    """Others' sequences are taken, one from each in turn, and theirs keep their place and are not asked for again."""
    a, b, c = sequences("a", 2), sequences("b", 2), sequences("c", 1)
    waiting = queue(*a, *b, *c)
    seen = []
    for head in waiting.turns():
        seen.append(head)
        if head.owner != "a":
            waiting.take(head)
    assert seen == [a[0], b[0], c[0], b[1]]
    assert drained(waiting) == a


def test_removal_finds_them_in_every_line() -> None:
    """And leaves alone what is not there."""
    a, b, back = sequences("a", 2), sequences("b", 1), sequences("a", 1)
    waiting = queue(*a, *b)
    waiting.put_back(back, first=True)
    waiting.remove({a[0], b[0], back[0], *sequences("c", 1)})
    assert drained(waiting) == [a[1]]
