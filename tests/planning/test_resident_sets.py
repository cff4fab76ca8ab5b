"""Which models of a pool are resident together at most."""

from itertools import combinations, product

from hypothesis import given
from hypothesis import strategies as st

from serve_app.planning.resident_sets import MOST_SHOWN, ResidentSets, resident_sets

DEVICES = ("n1:0", "n1:1")
Leases = dict[str, list[dict[str, int]]]


def fits(names: tuple[str, ...], leases: Leases, budget: dict[str, int]) -> bool:
    """Whether each can have one of its leases, by trying all."""
    return any(
        all(sum(lease.get(device, 0) for lease in chosen) <= size for device, size in budget.items())
        for chosen in product(*(leases[name] for name in names))
    )


def all_maximal(leases: Leases, budget: dict[str, int]) -> set[tuple[str, ...]]:
    """The maximal sets, by trying all sets."""
    names = sorted(leases)
    fitting = [
        set(chosen)
        for count in range(1, len(names) + 1)
        for chosen in combinations(names, count)
        if fits(chosen, leases, budget)
    ]
    return {tuple(sorted(one)) for one in fitting if not any(one < other for other in fitting)}


lease = st.dictionaries(st.sampled_from(DEVICES), st.integers(1, 12), min_size=1)
pools = st.dictionaries(st.sampled_from("abcdef"), st.lists(lease, min_size=1, max_size=3), max_size=5)


@given(pools, st.fixed_dictionaries({device: st.integers(0, 20) for device in DEVICES}))
def test_the_sets_are_those_that_trying_all_finds(leases: Leases, budget: dict[str, int]) -> None:
    """Each fits, none is a part of another, and none is missing; those of most models come first."""
    found = resident_sets(leases, budget)
    expected = all_maximal(leases, budget)
    assert len(found.shown) + found.more == len(expected)
    assert set(found.shown) <= expected
    assert not found.is_cut
    counts = [len(names) for names in found.shown]
    assert counts == sorted(map(len, expected), reverse=True)[:MOST_SHOWN]


def test_models_that_are_alike_do_not_make_the_search_endless() -> None:
    """Half of 24 equal models fit, in 2.7 million ways: the search ends at its bound and says so."""
    found = resident_sets({f"m{number:02}": [{"n1:0": 2}] for number in range(24)}, {"n1:0": 24})
    assert (len(found.shown), found.is_cut) == (MOST_SHOWN, True)
    assert all(len(names) == 12 for names in found.shown)


def test_a_model_that_does_not_fit_alone_is_in_no_set() -> None:
    """And one set of all others means that none of them has to leave."""
    found = resident_sets({"a": [{"n1:0": 5}], "b": [{"n1:0": 11}, {"n1:1": 3}]}, {"n1:0": 10})
    assert found == ResidentSets((("a",),))
    assert found.are_all_together
    assert resident_sets({}, {"n1:0": 1}) == ResidentSets(())


def test_a_model_that_may_go_elsewhere_goes_where_the_others_leave_room() -> None:
    """a can have either card, and b only the first."""
    either: Leases = {"a": [{"n1:0": 8}, {"n1:1": 8}], "b": [{"n1:0": 8}]}
    assert resident_sets(either, {"n1:0": 10, "n1:1": 10}).shown == (("a", "b"),)
    assert resident_sets(either, {"n1:0": 10, "n1:1": 7}).shown == (("a",), ("b",))
