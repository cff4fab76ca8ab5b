"""Who leaves a pool's memory, as rules and as laws that hold for random pools, requests and deaths."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.residency.member import Demand, Member, Pool, State, Terms
from serve_app.residency.policy import Forget, Leave, Wake, decide, fits_alone, longest_wait_s, value
from tests.residency.pool_simulation import Arrival, Death, Simulation

GIB = 2**30
NOW = 1000.0


def terms(name: str, *options: dict[str, int], **changes: object) -> Terms:
    """Returns what does not change about a replica. It needs 4 bytes of the host unless told otherwise."""
    fields: dict[str, object] = {
        "host_bytes": 1, "wake_s": 1.0, "start_s": 10.0, "leave_s": 0.1, "min_resident_s": 5.0, "drain_s": 10.0,
    }  # fmt: skip
    return Terms(name, name, options or ({"cpu": 4},), **fields | changes)  # type: ignore[arg-type]


def resident(name: str, size: int = 4, since: float = 0.0, demand: Demand | None = None, **changes: object) -> Member:
    """Returns a replica that has been resident since then."""
    return Member(terms(name, {"cpu": size}, **changes), "resident", since, {"cpu": size}, demand=demand or Demand())


def waiting(name: str, size: int = 4, oldest: float = 990.0, state: State = "parked", **changes: object) -> Member:
    """Returns a replica for which one request waits since then."""
    return Member(terms(name, {"cpu": size}, **changes), state, 0.0, {}, state == "parked", Demand(1, oldest))


def pool(*members: Member, budget: int = 8, host: int = 100) -> Pool:
    """Returns a pool of these replicas with one device."""
    return Pool({"cpu": budget}, host, members)


def test_a_waiter_gets_what_is_free() -> None:
    """Nobody leaves for it."""
    assert decide(pool(resident("a"), waiting("b")), NOW) == [Wake("b", {"cpu": 4})]


def test_nobody_leaves_without_a_reason() -> None:
    """A pool that is full of idle replicas stays as it is."""
    idle = Member(terms("c"), "parked")
    assert decide(pool(resident("a"), resident("b"), idle), NOW) == []


def test_the_least_value_leaves() -> None:
    """It counts how long it is idle, what it costs to bring back, its priority and its requests."""
    long_idle, just_used = Demand(last_used=100.0), Demand(last_used=990.0)
    members = resident("a", demand=just_used), resident("b", demand=long_idle), waiting("c")
    assert decide(pool(*members), NOW) == [Leave("b", True, "c")]
    costly = resident("b", demand=long_idle, wake_s=500.0)
    assert decide(pool(resident("a", demand=just_used), costly, waiting("c")), NOW) == [Leave("a", True, "c")]
    first = resident("b", demand=long_idle, priority=20)
    assert decide(pool(resident("a", demand=just_used), first, waiting("c")), NOW) == [Leave("a", True, "c")]
    assert value(resident("a", demand=Demand(running=3, last_used=NOW)), NOW) == 4 * value(
        resident("a", demand=Demand(last_used=NOW)), NOW
    )


def test_only_as_many_leave_as_must() -> None:
    """The one that is enough leaves alone, though another one is worth less."""
    members = resident("a", 2), resident("b", 6), waiting("c", 6)
    assert decide(pool(*members), NOW) == [Leave("b", True, "c")]


def test_a_young_one_stays_and_a_busy_one_for_longer() -> None:
    """The time since it has become resident counts."""
    young = resident("a", 8, since=NOW - 4.9)
    assert decide(pool(young, waiting("b")), NOW) == []
    assert decide(pool(young, waiting("b")), NOW + 0.2) == [Leave("a", True, "b")]
    busy = resident("a", 8, since=NOW - 20, demand=Demand(running=1, last_used=NOW), wake_s=10.0)
    assert decide(pool(busy, waiting("b")), NOW) == []
    assert decide(pool(busy, waiting("b")), NOW + 10) == [Leave("a", True, "b")]


def test_none_leaves_before_all_that_must_may() -> None:
    """Its bytes would lie idle meanwhile."""
    old, young = resident("a"), resident("b", since=NOW - 1)
    assert decide(pool(old, young, waiting("c", 8)), NOW) == []
    assert decide(pool(old, young, waiting("c", 8)), NOW + 5) == [Leave("a", True, "c"), Leave("b", True, "c")]


def test_the_oldest_waiter_is_not_overtaken() -> None:
    """Bytes that are free stay free for it, though they would do for the second one."""
    old, large, small = resident("a", since=NOW - 1), waiting("b", 8, oldest=980), waiting("c", 4, oldest=985)
    assert decide(pool(old, large, small), NOW) == []
    draining = Member(terms("a"), "draining", NOW, {"cpu": 4})
    assert decide(pool(draining, large, small), NOW) == []


def test_a_later_waiter_gets_what_the_oldest_does_not_need() -> None:
    """It waits for one card, and another one is free."""
    cards = {"gpu-0": 4, "gpu-1": 4}
    busy = Member(terms("a", {"gpu-0": 4}), "resident", NOW - 1, {"gpu-0": 4})
    first = Member(terms("b", {"gpu-0": 4}), "parked", demand=Demand(1, 980))
    second = Member(terms("c", {"gpu-1": 4}), "parked", demand=Demand(1, 985))
    assert decide(Pool(cards, 0, (busy, first, second)), NOW) == [Wake("c", {"gpu-1": 4})]


def test_nobody_takes_the_place_of_one_that_must_wait_for_another_to_leave() -> None:
    """What a replica that parks keeps is too much for the oldest, which has to wait until that one can be stopped."""
    leaves = Member(terms("x", {"cpu": 50}, residue={"cpu": 1}), "draining", NOW, {"cpu": 50}, True)
    oldest, later = waiting("a", 100, oldest=980, state="stopped"), waiting("b", 40, oldest=985, state="stopped")
    assert decide(pool(leaves, oldest, later, budget=100), NOW) == []
    too_large = waiting("a", 101, oldest=980, state="stopped")
    assert decide(pool(leaves, too_large, later, budget=100), NOW) == [Wake("b", {"cpu": 40})]


def test_none_parks_and_forgets_at_once() -> None:
    """The host has room for one copy, and the one that leaves first keeps it."""
    first, second = resident("a", 4, wake_s=1.0), resident("e", 4, wake_s=50.0)
    orders = decide(pool(first, second, waiting("c", 8, state="stopped"), host=1), NOW)
    assert orders == [Leave("a", True, "c"), Leave("e", False, "c")]


def test_two_share_what_one_leaves() -> None:
    """No further replica leaves for the second waiter, and what is free now is given once."""
    idle = resident("a", 8)
    assert decide(pool(idle, resident("b", 8), waiting("c"), waiting("d"), budget=16), NOW) == [Leave("a", True, "c")]
    draining = Member(terms("a", {"cpu": 8}), "draining", NOW, {"cpu": 8})
    first, second = waiting("c", oldest=980), waiting("d", oldest=985)
    assert decide(pool(draining, first, second, budget=13), NOW) == [Wake("c", {"cpu": 4})]


def test_it_takes_the_card_whose_model_is_worth_less() -> None:
    """A replica with several leases to choose from is told which one it has."""
    cards = {"gpu-0": 4, "gpu-1": 8}
    busy = Member(terms("a", {"gpu-0": 4}), "resident", 0, {"gpu-0": 4}, demand=Demand(running=2, last_used=NOW))
    idle = Member(terms("b", {"gpu-1": 8}), "resident", 0, {"gpu-1": 8})
    wanted = Member(terms("c", {"gpu-0": 4}, {"gpu-1": 4}), "parked", demand=Demand(1, 980))
    assert decide(Pool(cards, 100, (busy, idle, wanted)), NOW) == [Leave("b", True, "c")]


def test_a_copy_in_the_hosts_memory() -> None:
    """Those that cannot park are stopped, and so is one for whose copy nothing of less value makes room."""
    cannot = resident("a", 8, host_bytes=0)
    assert decide(pool(cannot, waiting("b")), NOW) == [Leave("a", False, "b")]
    assert decide(pool(resident("a", 8), waiting("b", state="stopped"), host=0), NOW) == [Leave("a", False, "b")]
    used = resident("a", 8, demand=Demand(last_used=900.0))
    unused = Member(terms("c"), "parked", has_copy=True)
    both = decide(pool(used, waiting("b", state="stopped"), unused, host=1), NOW)
    assert both == [Forget("c", "a"), Leave("a", True, "b")]
    pair = resident("a"), resident("b"), waiting("c", 8, state="stopped")
    assert decide(pool(*pair, host=1), NOW) == [Leave("a", True, "c"), Leave("b", False, "c")]
    kept = Member(terms("c", wake_s=1e6), "parked", has_copy=True)
    assert decide(pool(used, waiting("b", state="stopped"), kept, host=1), NOW) == [Leave("a", False, "b")]


def test_what_a_parked_one_keeps_of_a_device_counts() -> None:
    """A replica that leaves gives the rest only. If that is too little, another one that is parked is stopped."""
    keeps = {"residue": {"cpu": 1}}
    a = Member(terms("a", {"cpu": 4}, **keeps), "resident", 0.0, {"cpu": 4})
    b = Member(terms("b", {"cpu": 4}, **keeps), "parked", 0.0, {"cpu": 1}, True, Demand(1, 980))
    assert decide(pool(a, b, budget=5), NOW) == [Leave("a", True, "b")]
    gone = Member(terms("a", {"cpu": 4}, **keeps), "parked", 0.0, {"cpu": 1}, True)
    assert decide(pool(gone, b, budget=5), NOW) == [Wake("b", {"cpu": 4})]
    c = Member(terms("c", {"cpu": 4}, **keeps), "parked", 0.0, {"cpu": 1}, True)
    assert decide(pool(gone, b, c, budget=5), NOW) == [Forget("a", "b")]
    whole = Member(terms("b", {"cpu": 5}, **keeps), "stopped", demand=Demand(1, 980))
    assert decide(pool(a, whole, budget=5), NOW) == [Leave("a", False, "b")]
    stopping = Member(terms("a", {"cpu": 4}, **keeps), "draining", NOW, {"cpu": 1})
    assert decide(pool(stopping, b, c, budget=5), NOW) == []


def test_whether_it_fits_alone() -> None:
    """One of its leases must fit in the whole pool."""
    assert fits_alone([{"gpu-0": 9}, {"gpu-1": 4}], {"gpu-0": 8, "gpu-1": 8})
    assert not fits_alone([{"gpu-0": 9}], {"gpu-0": 8, "gpu-1": 8})
    assert longest_wait_s([]) == 0


DURATION = st.floats(0.01, 20.0)


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[Terms], dict[str, int], int]:
    """Returns replicas of one to three devices, each of which fits alone, the budget, and that of the host."""
    budget = {f"gpu-{number}": draw(st.integers(4, 24)) for number in range(draw(st.integers(1, 3)))}
    found = []
    for number in range(draw(st.integers(1, 6))):
        options = []
        for _ in range(draw(st.integers(1, 3))):
            devices = draw(st.sets(st.sampled_from(sorted(budget)), min_size=1))
            options.append({device: draw(st.integers(1, budget[device])) for device in sorted(devices)})
        wake, start, leave, stay, drain = (draw(DURATION) for _ in range(5))
        host, priority = draw(st.integers(0, 8)), draw(st.integers(-3, 3))
        residue = {device: draw(st.integers(0, size)) for device, size in options[0].items()}
        options = options[:1] if any(residue.values()) else options
        kept = residue if any(residue.values()) else {}
        found.append(Terms(f"r{number}", "m", tuple(options), host, wake, start, leave, stay, drain, priority, kept))
    return found, budget, draw(st.integers(0, 24))


@settings(max_examples=150, deadline=None)
@given(st.data(), pools())
def test_the_laws_hold_for_any_pool(data: st.DataObject, made: tuple[list[Terms], dict[str, int], int]) -> None:
    """Leases and copies stay within their budgets, none leaves young, and every request is served within the bound."""
    every, budget, host = made
    at, who = st.floats(0, 200), st.integers(0, len(every) - 1)
    arrivals = data.draw(st.lists(st.builds(Arrival, at, who, st.floats(0.01, 30)), min_size=1, max_size=40))
    deaths = data.draw(st.lists(st.builds(Death, at, who), max_size=3))
    simulation = Simulation(every, budget, host)
    simulation.run([*arrivals, *deaths])
    assert simulation.ended == len(arrivals)


@pytest.mark.parametrize("rate", [2.0, 20.0])
def test_two_models_that_alternate_do_not_thrash(rate: float) -> None:
    """Every request is for the other model. Each stays for its time, so swaps are few, however many requests come."""
    every = [terms(name, {"cpu": 4}, wake_s=1.0, min_resident_s=2.0, drain_s=5.0) for name in ("a", "b")]
    simulation = Simulation(every, {"cpu": 4}, 100)
    simulation.run([Arrival(number / rate, number % 2, 0.2) for number in range(600)])
    assert simulation.swaps <= simulation.now / (3.0 + 1.0) + 1
