"""Chooses the next point to measure by what was measured before. It is pure.

The logarithm of a score is taken for a Gaussian process over the points. Most of it is a sum of what each axis brings
(Duvenaud, Nickisch and Rasmussen, "Additive Gaussian Processes", 2011), because settings mostly multiply throughput,
and the rest is what they bring together. On each axis the kernel falls with the distance, which is that of the binary
logarithms where the values are numbers, and 1 where two values that are no numbers differ. How fast it falls on each
axis, and how far scores are apart at all, is what makes the measured ones likeliest. The next point is the one with the
largest expected improvement (Jones, Schonlau and Welch, 1998). With a dozen points all of it is a few small matrices,
so no library is needed; `benchmarks/tune_search.py` compares it with random choice and with Optuna on recorded grids.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve_app.tuning.space import Axis, Point, Space, key_of

# So many points are chosen before the process chooses: the file's own, and then those that change one field of it. On
# the recorded grids this finds more than points that are far from each other, of which most are far from the best too.
FIRST_POINTS = 4
# A further point is worth a start if it is expected to be better than the best by this share.
LEAST_GAIN = 0.002
# These are the lengths that an axis may have: on a short one nearby values say little of each other, and a long one
# hardly matters.
LENGTHS = (0.3, 1.0, 3.0, 10.0)
SWEEPS = 2
# This is the standard deviation of the logarithm of a score between starts of the same settings, beyond what differs
# within one. `benchmarks.tune_grid --repeat` measured it on a machine with two processors.
START_NOISE = 0.04
# Points whose predicted scores differ by no more than this share are equally good.
AS_GOOD = 0.02
# The standard deviation of the logarithms of scores may be one of these.
DEVIATIONS = (0.03, 0.1, 0.3, 0.6)
# This share of the variance is what the axes bring together, beyond the sum of what each brings.
TOGETHER = 0.3
# This is the worth of a point that has failed beside the worst that has not.
FAILED = math.log(0.7)


@dataclass(frozen=True)
class Known:
    """This is what is known of a point: its score, 0 for one that has failed, and the score's relative noise."""

    point: Point
    value: float
    noise: float = 0.0


class Model:
    """This is the Gaussian process, fitted to what is known of some points of a space."""

    def __init__(self, axes: Sequence[Axis], known: Sequence[Known]):
        """`known` has at least one point that has not failed."""
        self._axes = axes
        logs = [math.log(item.value) for item in known if item.value > 0]
        worst = min(logs) + FAILED
        self._targets = [math.log(item.value) if item.value > 0 else worst for item in known]
        self._mean = sum(self._targets) / len(self._targets)
        self._points = [self._place(item.point) for item in known]
        self._noises = [item.noise**2 + START_NOISE**2 for item in known]
        self._lengths, self._deviation = [1.0] * len(axes), DEVIATIONS[-1]
        self._fit()

    def _place(self, point: Point) -> list[float | str]:
        values = dict(point)
        return [_coordinate(values.get(axis.key), axis) for axis in self._axes]

    def _kernel(self, one: Sequence[float | str], other: Sequence[float | str]) -> float:
        distances = [
            _distance(left, right) / length for left, right, length in zip(one, other, self._lengths, strict=True)
        ]
        alone = sum(math.exp(-distance) for distance in distances) / max(1, len(distances))
        return self._deviation**2 * ((1 - TOGETHER) * alone + TOGETHER * math.exp(-sum(distances)))

    def _fit(self) -> None:
        """Chooses the deviation and the length of each axis in turn by the likelihood of what is known."""
        best = self._factorize()
        for _ in range(SWEEPS):
            for deviation in DEVIATIONS:
                before, self._deviation = self._deviation, deviation
                if (likelihood := self._factorize()) > best:
                    best = likelihood
                else:
                    self._deviation = before
            for number in range(len(self._lengths)):
                for length in LENGTHS:
                    own, self._lengths[number] = self._lengths[number], length
                    if (likelihood := self._factorize()) > best:
                        best = likelihood
                    else:
                        self._lengths[number] = own
        self._factorize()

    def _factorize(self) -> float:
        """Solves the process for the present lengths, and returns the logarithm of the likelihood."""
        matrix = [
            [
                self._kernel(one, other) + (self._noises[row] if row == column else 0.0)
                for column, other in enumerate(self._points)
            ]
            for row, one in enumerate(self._points)
        ]
        self._lower = _cholesky(matrix)
        centred = [target - self._mean for target in self._targets]
        half = _forward(self._lower, centred)
        self._weights = _backward(self._lower, half)
        return -0.5 * sum(value * value for value in half) - sum(math.log(row[-1]) for row in self._lower)

    def predicted(self, point: Point) -> tuple[float, float]:
        """Returns the mean and the standard deviation of the logarithm of a point's score."""
        place = self._place(point)
        near = [self._kernel(place, other) for other in self._points]
        mean = self._mean + sum(weight * value for weight, value in zip(self._weights, near, strict=True))
        half = _forward(self._lower, near)
        variance = self._deviation**2 - sum(value * value for value in half)
        return mean, math.sqrt(max(variance, 1e-12))


def propose(space: Space, known: Sequence[Known], least_gain: float = LEAST_GAIN) -> Point | None:
    """Returns the point to measure next, or None if no other one is expected to be better by `least_gain`. The first is
    the file's own. A point that is known is not measured again."""
    seen = {key_of(item.point) for item in known}
    left = [point for point in space.points if key_of(point) not in seen]
    if not left:
        return None
    if not known:
        return space.default
    if len(known) < FIRST_POINTS or all(item.value <= 0 for item in known):
        return _one_change(space, left, [item.point for item in known])
    model = Model(space.axes, known)
    # What is best is judged by the process, because the best of several noisy scores is too high.
    best = max(model.predicted(item.point)[0] for item in known if item.value > 0)
    gains = [(_expected_gain(*model.predicted(point), best), point) for point in left]
    gain, point = max(gains, key=lambda pair: pair[0])
    return point if gain >= least_gain else None


def best_of(space: Space, known: Sequence[Known]) -> list[Known]:
    """Returns the points that have not failed, the best first, by what the process makes of their scores. Of those that
    are as good as the best one, because starts differ by more, the one that changes the fewest fields comes first."""
    good = [item for item in known if item.value > 0]
    if len(good) < 2:
        return good
    model, own = Model(space.axes, known), dict(space.default)
    means = {key_of(item.point): model.predicted(item.point)[0] for item in good}
    best = max(means.values())

    def place(item: Known) -> tuple[bool, int, float]:
        mean = means[key_of(item.point)]
        is_worse = mean < best - AS_GOOD
        changed = sum(value != own[key] for key, value in item.point)
        return is_worse, 0 if is_worse else changed, -mean

    return sorted(good, key=place)


def field_gains(space: Space, known: Sequence[Known], point: Point) -> Mapping[tuple[str, str], float]:
    """Returns for each field that a point changes the factor that it is estimated to bring, beside the point's other
    changes. It is empty if no point could be used."""
    if not any(item.value > 0 for item in known):
        return {}
    model, own = Model(space.axes, known), dict(space.default)
    mean, _ = model.predicted(point)
    found = {}
    for key, value in point:
        if value != own[key]:
            without = tuple((name, own[key] if name == key else item) for name, item in point)
            found[key] = math.exp(mean - model.predicted(without)[0])
    return found


def _one_change(space: Space, left: Sequence[Point], known: Sequence[Point]) -> Point:
    """Returns the point that changes the fewest fields of the file's own, to the nearest values. One that changes a
    field that no known point changes goes first."""
    own = dict(space.default)
    seen = {key for point in known for key, value in point if value != own[key]}

    def place(point: Point) -> tuple[bool, int, float]:
        values = dict(point)
        axes = [axis for axis in space.axes if values.get(axis.key) != own.get(axis.key)]
        far = sum(
            _distance(_coordinate(values.get(axis.key), axis), _coordinate(own.get(axis.key), axis)) for axis in axes
        )
        return {axis.key for axis in axes} <= seen, len(axes), far

    return min(left, key=place)


def _coordinate(value: object, axis: Axis) -> float | str:
    """Returns where a value is on its axis: the binary logarithm of a number, or a text for anything else. A field that
    the file leaves out is where what it means is, and apart from all its values if that is not known."""
    if value is None:
        value = axis.meant
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return math.log2(value)
    return repr(value)


def _distance(one: float | str, other: float | str) -> float:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other)
    return float(one != other)


def _expected_gain(mean: float, deviation: float, best: float) -> float:
    """Returns the expected improvement over the best, as a share of it."""
    ahead = (mean - best) / deviation
    density = math.exp(-0.5 * ahead * ahead) / math.sqrt(2 * math.pi)
    return deviation * (ahead * 0.5 * (1 + math.erf(ahead / math.sqrt(2))) + density)


def _cholesky(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """Returns the rows of the lower triangle."""
    lower: list[list[float]] = []
    for row, values in enumerate(matrix):
        found: list[float] = []
        for column in range(row):
            known = sum(found[number] * lower[column][number] for number in range(column))
            found.append((values[column] - known) / lower[column][column])
        rest = values[row] - sum(value * value for value in found)
        found.append(math.sqrt(max(rest, 1e-12)))
        lower.append(found)
    return lower


def _forward(lower: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    found: list[float] = []
    for row, value in zip(lower, values, strict=True):
        found.append((value - sum(part * known for part, known in zip(row, found, strict=False))) / row[-1])
    return found


def _backward(lower: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    found = [0.0] * len(values)
    for row in range(len(values) - 1, -1, -1):
        rest = values[row] - sum(lower[below][row] * found[below] for below in range(row + 1, len(values)))
        found[row] = rest / lower[row][row]
    return found
