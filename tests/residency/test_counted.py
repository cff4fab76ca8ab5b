"""What the store counts at least, while writes are on their way, fail, and end."""

from typing import Any

from serve_app.residency.counted import Counted
from serve_app.residency.member import Bytes, Member, Terms


def member(lease: Bytes, has_copy: bool = False) -> Member:
    """A replica that holds this."""
    return Member(Terms("a", "a", ({"cpu": 4},), 1, 1.0, 1.0, 1.0, 1.0, 1.0), "resident", 0.0, lease, has_copy)


def record(size: int, has_copy: bool = False) -> dict[str, Any]:
    """What is written of it."""
    return {"terms": {"replica": "a"}, "lease": {"cpu": size}, "has_copy": has_copy}


def test_what_is_written_is_counted() -> None:
    """And no more than that, for each device and for the copy."""
    counted = Counted([record(4)])
    assert counted.covers(member({"cpu": 4}))
    assert counted.covers(member({}))
    assert not counted.covers(member({"cpu": 5}))
    assert not counted.covers(member({"cpu": 1, "GPU 0": 1}))
    assert not counted.covers(member({"cpu": 4}, has_copy=True))
    assert not Counted([]).covers(member({"cpu": 1}))
    assert Counted([]).covers(member({}))


def test_a_write_on_its_way_counts_only_what_both_do() -> None:
    """It may have arrived or not, whichever of the two says less."""
    counted = Counted([record(4, has_copy=True)])
    counted.begin([record(2)])
    assert counted.covers(member({"cpu": 2}))
    assert not counted.covers(member({"cpu": 4}))
    assert not counted.covers(member({}, has_copy=True))
    counted.begin([record(6)])  # The one before has failed.
    assert counted.covers(member({"cpu": 2}))
    assert not counted.covers(member({"cpu": 3}))
    counted.end([record(6)])
    assert counted.covers(member({"cpu": 6}))
    counted.begin([])
    assert not counted.covers(member({"cpu": 1}))
