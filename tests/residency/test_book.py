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


def test_an_operator_wakes_a_model_for_which_nobody_waits() -> None:
    """Once, with the reason, and by the policy: another one leaves for it as it would for a request."""
    made = book(Report(terms("a"), "resident", {"cpu": 4 * GIB}, idle_s=60.0), Report(terms("b"), "parked"))
    assert made.wake("model-b", NOW + 10) == "parked"
    assert [decision.order for decision in made.decide(NOW + 10, AT)] == [Leave("a", True, "b")]
    assert made.wake("model-b", NOW + 11) == "waking"  # It is on its way, and is not asked for twice.
    made.update(Report(terms("a"), "parked", has_copy=True, orders_seen=1), NOW + 12)
    (decision,) = made.decide(NOW + 12, AT)
    assert decision.order == Wake("b", {"cpu": 4 * GIB})
    assert decision.reason == "'model-b' gets 4.00 GiB of cpu, because an operator wants it to be resident."
    made.update(Report(terms("b"), "resident", {"cpu": 4 * GIB}, orders_seen=1), NOW + 13)
    assert made.wake("model-b", NOW + 13) == "resident"
    assert made.decide(NOW + 60, AT) == []
    assert made.wake("model-x", NOW) is None


def test_a_request_that_waits_longer_comes_before_the_wish_of_an_operator() -> None:
    """The wish is as old as it is."""
    made = book(Report(terms("a"), "stopped", waiting=1, oldest_age_s=3.0), Report(terms("b"), "stopped"))
    made.wake("model-b", NOW - 1)
    assert [decision.order.replica for decision in made.decide(NOW, AT)] == ["a"]
    made = book(Report(terms("a"), "stopped", waiting=1, oldest_age_s=3.0), Report(terms("b"), "stopped"))
    made.wake("model-b", NOW - 5)
    assert [decision.order.replica for decision in made.decide(NOW, AT)] == ["b"]


def test_an_operator_parks_a_model_once_its_requests_have_ended() -> None:
    """Before its time, though nobody waits for its memory, and not while it has requests."""
    held = {"cpu": 4 * GIB}
    made = book(Report(terms("a"), "resident", held, running=1))
    assert made.park("model-a") == ["resident"]
    assert made.decide(NOW + 1, AT) == []
    made.update(Report(terms("a"), "resident", held, idle_s=0.0), NOW + 2)
    (decision,) = made.decide(NOW + 2, AT)
    assert decision.order == Leave("a", True, "a")
    assert decision.reason == (
        "'model-a' is parked and gives back 4.00 GiB of cpu, because an operator wants it to leave."
    )
    made.update(Report(terms("a"), "parked", has_copy=True, orders_seen=1), NOW + 3)
    assert made.park("model-a") == ["parked"]
    made.update(Report(terms("a"), "parked", has_copy=True, waiting=1, orders_seen=1), NOW + 4)
    assert [decision.order for decision in made.decide(NOW + 4, AT)] == [Wake("a", held)]
    made.update(Report(terms("a"), "resident", held, has_copy=True, orders_seen=2), NOW + 5)
    assert made.decide(NOW + 99, AT) == []  # The wish has been fulfilled.


def test_the_last_wish_counts_also_after_a_replica_has_joined_again() -> None:
    """Wake takes back park, and the other way round."""
    held = {"cpu": 4 * GIB}
    busy = Report(terms("a"), "resident", held, running=1)
    made = book(busy)
    made.park("model-a")
    made.wake("model-a", NOW)
    made.update(Report(terms("a"), "resident", held), NOW + 1)
    assert made.decide(NOW + 1, AT) == []
    made.update(busy, NOW + 2)
    made.park("model-a")
    made.join(busy, NOW + 3)
    made.update(Report(terms("a"), "resident", held), NOW + 4)
    assert [decision.order for decision in made.decide(NOW + 4, AT)] == [Leave("a", True, "a")]


def test_what_an_operator_parks_takes_no_copy_of_greater_value() -> None:
    """It is stopped if the host has no room for its copy."""
    made = Book({"cpu": 8 * GIB}, GIB)
    valuable = replace(terms("b"), priority=5)
    made.join(Report(valuable, "resident", {"cpu": 4 * GIB}, has_copy=True), NOW)
    made.join(Report(terms("a"), "resident", {"cpu": 4 * GIB}, idle_s=60.0), NOW)
    made.park("model-a")
    assert [decision.order for decision in made.decide(NOW, AT)] == [Leave("a", False, "a")]


def test_one_of_several_replicas_wakes_and_all_of_them_park() -> None:
    """The nearest to its memory is chosen."""
    made = Book({"cpu": 8 * GIB}, 8 * GIB)
    for name, state in (("a", "stopped"), ("b", "parked")):
        made.join(Report(replace(terms(name), model="m"), state), NOW)  # type: ignore[arg-type]
    assert made.wake("m", NOW) == "parked"
    assert [decision.order.replica for decision in made.decide(NOW, AT)] == ["b"]
    for name in "ab":
        made.join(Report(replace(terms(name), model="m"), "resident", {"cpu": 4 * GIB}), NOW)
    assert made.park("m") == ["resident", "resident"]
    assert {decision.order.replica for decision in made.decide(NOW, AT)} == {"a", "b"}
