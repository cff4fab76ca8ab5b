"""Says which of the measured points is the best, by how much, and how sure that is. It is pure."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.tuning.journal import Trial
from serve_app.tuning.objective import Objective, Score, score
from serve_app.tuning.search import START_NOISE, Known, best_of
from serve_app.tuning.space import Point, Space, key_of

# A gain is given with the interval that has it in 95 of 100 cases if starts differ as much as `BETWEEN_STARTS` says,
# which is the standard deviation of the logarithm of a score between two starts on a machine of two processors.
DEVIATIONS, BETWEEN_STARTS = 1.96, 0.04
# Confirming runs of the best point have a run of the file's own between them (A-B-A), so a machine that becomes slower
# or faster meanwhile shows.
CONFIRMING = ("best", "file", "best")
# If they leave it open whether the best is better, the two are started again in turn while starts are left, up to so
# many of each. Each further look is a further chance to be wrong, so there are few: see
# `test_equal_settings_are_rarely_called_better`.
MOST_STARTS_OF_EACH = 4
NOISE_OF_A_LOOK = 0.1
# So many points are confirmed in turn if they miss the limits when they are measured again.
MOST_CONFIRMED = 3


@dataclass(frozen=True)
class Gain:
    """This is how many times the file's own score a point has, with the bounds of that, from so many starts of each."""

    ratio: float
    low: float
    high: float
    starts: int

    @property
    def is_sure(self) -> bool:
        """Returns whether the point is better beyond what the noise could be."""
        return self.low > 1

    @property
    def is_open(self) -> bool:
        """Returns whether more starts could show that the point is better by more than what is not worth a change."""
        return not self.is_sure and self.ratio > math.exp(START_NOISE)


@dataclass(frozen=True)
class Verdict:
    """This is the point to use. `gain` is None if it is the file's own, or if it was not measured again. `why` says it
    in a sentence. `is_final` is false for one that has not kept to the limits in another start yet."""

    point: Point
    score: Score
    gain: Gain | None
    why: str
    is_final: bool = True


def score_of(objective: Objective, trial: Trial) -> Score:
    """Returns the score of a trial, which is that of all its models together."""
    return Score(0.0, why=trial.why) if trial.status == "failed" else score(objective, trial.measurements)


def known_of(objective: Objective, trials: Sequence[Trial]) -> list[Known]:
    """Returns what the search knows. A point that missed a limit when it was measured again counts as failed."""
    found: dict[str, Known] = {}
    for trial in trials:
        worth = score_of(objective, trial)
        key = key_of(trial.point)
        if trial.purpose == "search":
            # A first look is shorter, and it comes while caches fill.
            noise = worth.noise + (NOISE_OF_A_LOOK if trial.status == "stopped" else 0.0)
            found[key] = Known(trial.point, worth.value, noise)
        elif not worth.is_valid:
            found[key] = Known(trial.point, 0.0)
    return list(found.values())


def to_confirm(objective: Objective, space: Space, trials: Sequence[Trial]) -> Point | None:
    """Returns the point to start next in order to confirm the best, or None if nothing is left to confirm. The file's
    own point, if it is the best, is confirmed only if there are limits that it has to keep to."""
    ranked = best_of(space, known_of(objective, trials))
    if not ranked:
        return None
    best, default = key_of(ranked[0].point), key_of(space.default)
    confirming = [key_of(trial.point) for trial in trials if trial.purpose == "confirm"]
    if best == default:
        return space.default if objective.has_limits and default not in confirming else None
    if len({*confirming} - {best, default}) >= MOST_CONFIRMED:
        return None
    own, of_file = confirming.count(best), confirming.count(default)
    if own >= 1 and of_file < 1 and any(key_of(item.point) == default for item in ranked):
        return space.default
    if own < CONFIRMING.count("best"):
        return ranked[0].point
    gain = _gain(objective, trials, ranked[0].point, space.default)
    if gain is None or not gain.is_open or of_file >= MOST_STARTS_OF_EACH:
        return None
    return space.default if of_file < own else ranked[0].point


def verdict(objective: Objective, space: Space, trials: Sequence[Trial]) -> Verdict:
    """Returns the point to use by what was measured so far."""
    ranked = best_of(space, known_of(objective, trials))
    own = _own(objective, space, trials)
    if not ranked:
        return Verdict(space.default, own, None, f"no setting could be used; of the file's own: {own.why}")
    best = ranked[0].point
    worth = _mean([score_of(objective, trial) for trial in _of(trials, best)])
    is_again = any(trial.purpose == "confirm" for trial in _of(trials, best))
    if objective.has_limits and not is_again:
        why = "it was measured once, and no other start has confirmed that it keeps to the limits"
        return Verdict(best, worth, None, why, is_final=False)
    at = f" at {worth.level.title}" if worth.level is not None else ""
    if key_of(best) == key_of(space.default):
        why = f"the file's own settings are the best of those that were measured{at}"
        return Verdict(best, worth, None, why)
    gain = _gain(objective, trials, best, space.default)
    if not own.is_valid:
        return Verdict(best, worth, gain, f"the file's own settings cannot be used: {own.why}")
    if gain is None:
        return Verdict(best, worth, None, "it was measured once and not confirmed")
    bounds = f"{gain.low:.2f} to {gain.high:.2f}"
    if not gain.is_sure:
        how = "is surely worse" if gain.high < 1 else "is within the noise"
        is_final = not objective.has_limits or any(trial.purpose == "confirm" for trial in _of(trials, space.default))
        return Verdict(
            space.default, own, gain,
            f"the best other settings have {gain.ratio:.2f} times the score of the file's own, which {how} ({bounds}), "
            "so the file's own stay", is_final,
        )  # fmt: skip
    return Verdict(best, worth, gain, f"{gain.ratio:.2f} times the score of the file's own{at} ({bounds} in 95 of 100 "
                                      f"cases, from {gain.starts} starts)")  # fmt: skip


def _own(objective: Objective, space: Space, trials: Sequence[Trial]) -> Score:
    """Returns the score of the file's own settings. What missed a limit once does not keep to it."""
    found = [trial for trial in trials if key_of(trial.point) == key_of(space.default)]
    scores = [score_of(objective, trial) for trial in found]
    if not scores:
        return Score(0.0, why="it was not measured")
    bad = next((one for one in scores if not one.is_valid), None)
    if bad is not None and scores[0].is_valid:
        return Score(0.0, why=f"when they were measured again, {bad.why}")
    return bad or scores[0]


def _of(trials: Sequence[Trial], point: Point) -> list[Trial]:
    """Returns the confirming trials of a point, or all if there are none. The trial by which it was chosen is better
    than it is on average, because it was chosen by it."""
    found = [trial for trial in trials if key_of(trial.point) == key_of(point)]
    return [trial for trial in found if trial.purpose == "confirm"] or found


def _mean(scores: Sequence[Score]) -> Score:
    good = [found for found in scores if found.is_valid]
    if not good:
        return scores[0]
    value = math.exp(sum(math.log(found.value) for found in good) / len(good))
    return Score(value, math.sqrt(sum(found.noise**2 for found in good)) / len(good), good[0].level)


def _gain(objective: Objective, trials: Sequence[Trial], best: Point, default: Point) -> Gain | None:
    """Returns how much better the best point is by its confirming runs and those of the file's own between them."""
    confirming = [trial for trial in trials if trial.purpose == "confirm"]
    ours = [score_of(objective, trial) for trial in confirming if key_of(trial.point) == key_of(best)]
    # The file's own first start did not decide that it was chosen, so it may stand for one between the others.
    theirs = [score_of(objective, trial) for trial in _of(trials, default)]
    ours, theirs = ([found for found in group if found.is_valid] for group in (ours, theirs))
    if not ours or not theirs:
        return None
    logs = [[math.log(found.value) for found in group] for group in (ours, theirs)]
    ratio = sum(logs[0]) / len(logs[0]) - sum(logs[1]) / len(logs[1])
    variance = sum(
        _variance(group, [found.noise for found in scores]) for group, scores in zip(logs, (ours, theirs), strict=True)
    )
    wide = DEVIATIONS * math.sqrt(variance)
    return Gain(math.exp(ratio), math.exp(ratio - wide), math.exp(ratio + wide), len(ours) + len(theirs))


def _variance(logs: Sequence[float], noises: Sequence[float]) -> float:
    """Returns the variance of the mean of the logarithms of scores: of the noise within the starts, of what starts
    usually differ, and of what these ones differ. The last is not taken instead of the others, because two or three
    starts can be alike by chance."""
    count = len(logs)
    spread = statistics.variance(logs) if count > 1 else 0.0
    return (sum(noise**2 for noise in noises) / count + BETWEEN_STARTS**2 + spread) / count
