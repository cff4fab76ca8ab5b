"""What a keeper knows of its replicas, and what it tells them."""

from dataclasses import replace

from serve_app.residency.book import Book, Report
from serve_app.residency.member import Terms
from serve_app.residency.policy import Leave, Wake

GIB = 2**30
NOW, AT = 100.0, 1.7e9


def terms(name: str, size: int = 4 * GIB) -> Terms:
    """A replica that needs so much of the processor's memory."""
    return Terms(name, f"model-{name}", ({"cpu": size},), GIB, 1.0, 10.0, 0.5, 5.0, 10.0)


def book(*reports: Report) -> Book:
    """A pool of 4 GiB in which these have joined."""
    made = Book({"cpu": 4 * GIB}, 8 * GIB)
    for report in reports:
        made.join(report, NOW)
    return made


def test_a_waiter_gets_a_lease_and_is_told_once() -> None:
    """The decision says why."""
    made = book(Report(terms("a"), "stopped", waiting=2, oldest_age_s=3.0))
    (decision,) = made.decide(NOW, AT)
    assert decision.order == Wake("a", {"cpu": 4 * GIB})
    assert decision.reason == (
        "'model-a' gets 4.00 GiB of cpu: 2 requests waiting, the oldest for 3.0 s. It takes about 10.0 s from stopped."
    )
    assert made.take("a") == [decision.order]
    assert made.take("a") == []
    assert made.decide(NOW, AT) == []


def test_a_report_from_before_an_order_says_nothing_of_the_state() -> None:
    """It was on its way when the order was given. The counts of requests hold all the same."""
    made = book(Report(terms("a"), "stopped", waiting=1))
    made.decide(NOW, AT)
    made.update(Report(terms("a"), "stopped", waiting=5, orders_seen=0), NOW + 1)
    (member,) = made.pool.members
    assert (member.state, member.lease, member.demand.waiting) == ("waking", {"cpu": 4 * GIB}, 5)
    made.update(Report(terms("a"), "resident", {"cpu": 4 * GIB}, orders_seen=1), NOW + 2)
    (member,) = made.pool.members
    assert (member.state, member.since) == ("resident", NOW + 2)


def test_a_lease_ends_only_when_the_memory_is_free() -> None:
    """That is when the replica says so."""
    made = book(Report(terms("a"), "resident", {"cpu": 4 * GIB}, idle_s=60.0), Report(terms("b"), "stopped", waiting=1))
    assert [decision.order for decision in made.decide(NOW + 10, AT)] == [Leave("a", True, "b")]
    assert made.decide(NOW + 11, AT) == []
    made.update(Report(terms("a"), "draining", {"cpu": 4 * GIB}, orders_seen=1), NOW + 12)
    assert made.decide(NOW + 12, AT) == []
    made.update(Report(terms("a"), "parked", has_copy=True, orders_seen=1), NOW + 13)
    assert [decision.order for decision in made.decide(NOW + 13, AT)] == [Wake("b", {"cpu": 4 * GIB})]


def test_the_room_for_a_copy_is_taken_while_its_replica_drains() -> None:
    """It makes the copy only at the end, and says until then that it has none."""
    small = replace(terms("a"), host_bytes=GIB)
    made = Book({"cpu": 8 * GIB}, GIB)
    for name in "ab":
        made.join(Report(replace(small, replica=name), "resident", {"cpu": 4 * GIB}, idle_s=60.0), NOW)
    made.join(Report(terms("c", 4 * GIB), "stopped", waiting=1, oldest_age_s=9.0), NOW)
    (first,) = made.decide(NOW + 10, AT)
    assert first.order == Leave("a", True, "c")
    made.update(Report(replace(small, replica="a"), "draining", {"cpu": 4 * GIB}, orders_seen=1), NOW + 11)
    made.join(Report(terms("d", 4 * GIB), "stopped", waiting=1, oldest_age_s=8.0), NOW + 11)
    assert [decision.order for decision in made.decide(NOW + 11, AT)] == [Leave("b", False, "d")]


def test_what_the_processes_of_others_keep_is_not_there() -> None:
    """A replica that could never run beside them is refused when it joins."""
    keeps = replace(terms("a", 2 * GIB), residue={"cpu": GIB}, keeps_residue=True)
    made = book(Report(keeps, "parked", {"cpu": GIB}))
    assert made.problem(terms("b", 3 * GIB)) is None
    assert made.problem(terms("b", 4 * GIB)) == (
        "'model-b' needs 4.00 GiB of cpu, and the whole pool has 4.00 GiB of cpu, of which the processes of others "
        "leave 3.00 GiB of cpu."
    )


def test_another_keeper_counts_the_leases_of_all() -> None:
    """Also of a replica that has not joined it yet, until that one joins or dies."""
    first = book(Report(terms("a"), "stopped", waiting=1))
    first.decide(NOW, AT)
    second = Book({"cpu": 4 * GIB}, 8 * GIB)
    second.restore(first.records()[0], NOW)
    second.join(Report(terms("b"), "stopped", waiting=1), NOW)
    assert not second.knows("a")
    assert second.decide(NOW + 1, AT) == []
    second.join(Report(terms("a"), "parked"), NOW + 2)  # It has never got the order.
    assert [decision.order.replica for decision in second.decide(NOW + 2, AT)] == ["b"]
    third = Book({"cpu": 4 * GIB}, 8 * GIB)
    third.restore(first.records()[0], NOW)
    third.join(Report(terms("b"), "stopped", waiting=1), NOW)
    third.remove("a")
    assert [decision.order.replica for decision in third.decide(NOW + 1, AT)] == ["b"]


def test_a_replica_that_fits_nowhere_is_told_so() -> None:
    """With what it needs and what there is."""
    assert (
        book().problem(terms("a", 5 * GIB))
        == "'model-a' needs 5.00 GiB of cpu, and the whole pool has 4.00 GiB of cpu."
    )
    assert book().problem(terms("a")) is None
