"""Chooses what is started next: a point that may be better, or one that is started again to confirm it. It is pure."""

from collections.abc import Callable, Sequence

from serve_app.tuning.journal import Purpose, Trial
from serve_app.tuning.objective import Objective
from serve_app.tuning.search import propose
from serve_app.tuning.space import Point, Space
from serve_app.tuning.verdict import CONFIRMING, MOST_STARTS_OF_EACH, known_of, to_confirm

# Of all starts, one in so many is kept to confirm the best, until there are enough. Beyond these, one in so many is
# kept to start again what noise hides.
START_PER_CONFIRMING, START_PER_REPEAT = 3, 4


def next_start(
    objective: Objective,
    space: Space,
    trials: Sequence[Trial],
    max_starts: int,
    has_time_for: Callable[[int], bool] = lambda starts: True,
) -> tuple[Point, Purpose] | None:
    """Returns what to start next: a point that may be better, and once there is none, or no time for one, the best
    again. Confirming has its share of the starts and of the time, and once it has begun it is ended first.
    `has_time_for` is asked whether so many more starts end within the budget. None means that nothing is left to do."""
    if not trials:
        return space.default, "search"
    unconfirmed = to_confirm(objective, space, trials)
    is_confirming = unconfirmed is not None and any(trial.purpose == "confirm" for trial in trials)
    starts_left = max_starts - len(trials)
    kept = kept_of(max_starts, objective.has_limits)
    if not is_confirming and starts_left > kept and has_time_for(1 + kept):
        point = propose(space, known_of(objective, space, trials))
        if point is not None:
            return point, "search"
    if unconfirmed is not None and starts_left > 0 and has_time_for(1):
        return unconfirmed, "confirm"
    return None


def kept_of(max_starts: int, has_limits: bool) -> int:
    """Returns how many starts are kept to confirm. With limits there is one at least, because a point counts only if it
    keeps to them in another start."""
    first = min(len(CONFIRMING), max_starts // START_PER_CONFIRMING)
    return max(first, min(2 * MOST_STARTS_OF_EACH, max_starts // START_PER_REPEAT), int(has_limits))
