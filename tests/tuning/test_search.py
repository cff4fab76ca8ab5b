"""Which point is measured next."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from serve_app.tuning.search import Known, Model, best_of, field_gains, propose
from serve_app.tuning.space import Axis, Point, Space, key_of, space_of
from tests.tuning.builders import BATCH, CPUS, MACHINE, point, space

WIDE = (
    Axis("m", "max_num_seqs", (None, 4, 8, 16), 32),
    Axis("m", "num_cpus", (None, 2, 4), 1),
    Axis("m", "prompt_cache_memory", (None, "1GiB")),
    Axis("m", "speculative", (None, {"method": "ngram"})),
)


FOUR_CPUS = replace(MACHINE, cpus=4)


def rate(at: Point) -> float:
    """A made machine: batches help less and less, processors too, the cache a little, and drafts cost."""
    values = dict(at)
    batch, cpus = values.get(BATCH) or 32, values.get(CPUS) or 1
    cache = values.get(("m", "prompt_cache_memory")) is not None
    drafts = values.get(("m", "speculative")) is not None
    return 100 * batch**0.6 * cpus**0.5 * (1.07 if cache else 1) * (0.8 if drafts else 1) * (1 if cpus < 4 else 0.6)


def found_after(starts: int, where: Space, worth: Callable[[Point], float], seed: int) -> float:
    """The best of the points that the search chose, as a share of the best of all."""
    draw, known = random.Random(seed), list[Known]()
    while len(known) < starts and (at := propose(where, known)) is not None:
        known.append(Known(at, worth(at) * math.exp(draw.gauss(0, 0.02)) if worth(at) else 0.0, 0.01))
    chosen = best_of(where, known)[0].point
    return worth(chosen) / max(map(worth, where.points))


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_best_in_nine_starts(seed: int) -> None:
    """Or one that is nearly as good, of more than forty points."""
    where = space_of(WIDE, FOUR_CPUS, {"m": "pt"}, lambda points: [""] * len(points))
    assert len(where.points) > 40
    assert found_after(9, where, rate, seed) >= 0.95


def test_of_equal_points_the_one_that_changes_least_is_the_best() -> None:
    """A gain that starts of the same settings have by themselves is no reason to change a field."""
    where = space()
    worths = [100.0 * (1.01 if index else 1.0) for index, _ in enumerate(where.points)]
    known = [Known(at, worth, 0.01) for at, worth in zip(where.points, worths, strict=True)]
    assert key_of(best_of(where, known)[0].point) == key_of(where.default)
    better = [replace(item, value=item.value * 1.5) if key_of(item.point) != key_of(where.default) else item
              for item in known]  # fmt: skip
    assert sum(value != dict(where.default)[key] for key, value in best_of(where, better)[0].point) == 1


def test_the_file_comes_first_and_nothing_twice() -> None:
    """Until nothing is left."""
    where, known = space(), list[Known]()
    while (at := propose(where, known, least_gain=0.0)) is not None:
        known.append(Known(at, rate(at), 0.01))
    assert key_of(known[0].point) == key_of(where.default)
    assert len({key_of(item.point) for item in known}) == len(known) == len(where.points)


def test_it_ends_when_nothing_is_expected_to_be_better() -> None:
    """Long before all points are measured, of which most are far from the best."""
    where, known = space_of(WIDE, FOUR_CPUS, {"m": "pt"}, lambda points: [""] * len(points)), list[Known]()
    while (at := propose(where, known)) is not None:
        known.append(Known(at, rate(at), 0.01))
    assert len(known) < len(where.points) / 2


def test_points_that_fail_are_left_and_so_are_those_beside_them() -> None:
    """The best of the others is found."""
    where = space_of(WIDE, FOUR_CPUS, {"m": "pt"}, lambda points: [""] * len(points))

    def worth(at: Point) -> float:
        return 0.0 if dict(at).get(CPUS) == 2 else rate(at)

    assert found_after(9, where, worth, 1) >= 0.9


def test_if_everything_has_failed_it_goes_on() -> None:
    """Far from what has failed."""
    known = [Known(point(None), 0.0), Known(point(4), 0.0), Known(point(8), 0.0), Known(point(16), 0.0)]
    at = propose(space(), known)
    assert at is not None
    assert dict(at)[CPUS] == 2
    assert best_of(space(), known) == []


def test_the_model_passes_near_what_is_known_and_is_unsure_elsewhere() -> None:
    """As a Gaussian process does."""
    known = [Known(point(4), 100.0, 0.001), Known(point(16), 200.0, 0.001)]
    model = Model(space().axes, known)
    mean, deviation = model.predicted(point(16))
    assert math.exp(mean) == pytest.approx(200, rel=0.05)
    assert deviation < model.predicted(point(None, 2))[1]


def test_the_gain_of_each_field_is_told() -> None:
    """Beside the other changes of the point."""
    where = space()
    known = [Known(at, rate(at), 0.001) for at in where.points]
    gains = field_gains(where, known, point(4, 2))
    assert gains[CPUS] == pytest.approx(2**0.5, rel=0.1)
    assert gains[BATCH] == pytest.approx((4 / 32) ** 0.6, rel=0.15)
