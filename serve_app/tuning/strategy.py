"""Chooses what is started next: a point that may be better, or one that is started again to confirm it. It is pure."""

from collections.abc import Sequence

from serve_app.tuning.journal import Purpose, Trial
from serve_app.tuning.objective import Objective
from serve_app.tuning.search import propose
from serve_app.tuning.space import Point, Space
from serve_app.tuning.verdict import MOST_STARTS_OF_EACH, known_of, to_confirm

# So many starts are for the search alone. Of the others, half are kept to confirm, up to the most that it takes. On the
# recorded grids 7 of 12 starts find as much as 9, and three to confirm often leave a gain of a fifth open where starts
# differ by a tenth.
FOR_SEARCH = 2


def next_start(
    objective: Objective, space: Space, trials: Sequence[Trial], max_starts: int, in_time: int | None = None
) -> tuple[Point, Purpose] | None:
    """Returns what to start next: a point that may be better, and once there is none, or no time for one, the best
    again. Confirming has its share of the starts, and once it has begun it is ended first. `in_time` more starts end
    within the budget, if it is known. None means that nothing is left to do."""
    if not trials:
        return space.default, "search"
    unconfirmed = to_confirm(objective, space, trials)
    confirmed = sum(trial.purpose == "confirm" for trial in trials)
    is_confirming = unconfirmed is not None and confirmed > 0
    left = max_starts - len(trials)
    if in_time is not None:
        left = min(left, in_time)
    kept = max(kept_of(len(trials) + left) - confirmed, int(objective.has_limits))
    if not is_confirming and left > kept:
        point = propose(space, known_of(objective, space, trials))
        if point is not None:
            return point, "search"
    return (unconfirmed, "confirm") if unconfirmed is not None and left > 0 else None


def kept_of(max_starts: int) -> int:
    """Returns how many of all starts are kept to confirm. With limits one is always left for it, because a point counts
    only if it keeps to them in another start."""
    return max(0, min(2 * MOST_STARTS_OF_EACH, (max_starts - FOR_SEARCH) // 2))
