"""The cheapest path is the one that trying all of them finds, and a search compares no more than it says."""

from collections.abc import Callable
from itertools import combinations, permutations
from operator import add

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.planning.pipeline.path import cheapest_path, most_compared


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[dict[tuple[int, int], int]], tuple[int, ...], int]:
    """Costs without any order, some of which are missing, for up to four stages of up to three kinds."""
    layers = draw(st.integers(1, 6))
    spans = [(start, end) for start in range(layers) for end in range(start + 1, layers + 1)]
    cost = st.none() | st.integers(0, 9)
    tables = [{span: found for span in spans if (found := draw(cost)) is not None} for _ in range(3)]
    return tables, tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))), layers


@pytest.mark.parametrize("fold", [max, add])
@pytest.mark.parametrize("may_reorder", [False, True])
def test_no_path_is_cheaper(fold: Callable[[int, int], int], may_reorder: bool) -> None:
    """Whatever the costs are: they need not grow with the layers."""

    @settings(max_examples=200, deadline=None)
    @given(problems())
    def check(problem: tuple[list[dict[tuple[int, int], int]], tuple[int, ...], int]) -> None:
        tables, kinds, layers = problem
        path, compared = cheapest_path(tables, kinds, layers, fold, may_reorder)
        costs = []
        for order in set(permutations(kinds)) if may_reorder else {kinds}:
            for cuts in combinations(range(1, layers), len(kinds) - 1):
                ends = (*cuts, layers)
                spans = list(zip((0, *cuts), ends, strict=True))
                if all(span in tables[kind] for kind, span in zip(order, spans, strict=True)):
                    total = 0
                    for kind, span in zip(order, spans, strict=True):
                        total = fold(total, tables[kind][span])
                    costs.append(total)
        assert (path.cost if path else None) == min(costs, default=None)
        assert compared <= most_compared(kinds, layers)
        if path is not None:
            assert sorted(path.kinds) == sorted(kinds)
            assert may_reorder or path.kinds == kinds
            total = 0
            for kind, span in zip(path.kinds, path.spans, strict=True):
                total = fold(total, tables[kind][span])
            assert total == path.cost

    check()


def test_cards_of_one_kind_take_no_more_comparisons_than_one_order() -> None:
    """Their orders are one."""
    table = {(start, end): end - start for start in range(20) for end in range(start + 1, 21)}
    equal, in_order = (cheapest_path([table], (0,) * 8, 20, max, may_reorder) for may_reorder in (True, False))
    assert equal == in_order
    _, differing = cheapest_path([table] * 8, tuple(range(8)), 20, max, True)
    assert differing > 20 * equal[1]
