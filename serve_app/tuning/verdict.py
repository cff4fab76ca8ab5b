"""Says which of the measured points is the best, by how much, and how sure that is. It is pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.tuning.journal import Trial
from serve_app.tuning.objective import Objective, Score, score
from serve_app.tuning.search import Known, best_of
from serve_app.tuning.space import Point, Space, key_of

# A gain is given with the interval that has it in 95 of 100 cases.
DEVIATIONS = 1.96
# Confirming runs of the best point have a run of the file's own between them (A-B-A), so a machine that becomes slower
# or faster meanwhile shows.
CONFIRMING = ("best", "file", "best")
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


@dataclass(frozen=True)
class Verdict:
    """This is the point to use. `gain` is None if it is the file's own, or if it was not measured again. `why` says it
    in a sentence."""

    point: Point
    score: Score
    gain: Gain | None
    why: str


def score_of(objective: Objective, trial: Trial) -> Score:
    """Returns the score of a trial, which for several models is the geometric mean of theirs."""
    if trial.status == "failed":
        return Score(0.0, why=trial.why)
    models = sorted({found.model for found in trial.measurements})
    scores = [score(objective, [found for found in trial.measurements if found.model == model]) for model in models]
    for model, found in zip(models, scores, strict=True):
        if not found.is_valid:
            return Score(0.0, why=found.why if len(models) == 1 else f"{model}: {found.why}")
    if not scores:
        return Score(0.0, why="nothing was measured")
    value = math.exp(sum(math.log(found.value) for found in scores) / len(scores))
    noise = math.sqrt(sum(found.noise**2 for found in scores)) / len(scores)
    return Score(value, noise, scores[0].level if len(scores) == 1 else None)


def known_of(objective: Objective, trials: Sequence[Trial]) -> list[Known]:
    """Returns what the search knows. A point that missed a limit when it was measured again counts as failed."""
    found: dict[str, Known] = {}
    for trial in trials:
        worth = score_of(objective, trial)
        key = key_of(trial.point)
        if trial.purpose == "search":
            found[key] = Known(trial.point, worth.value, worth.noise)
        elif not worth.is_valid:
            found[key] = Known(trial.point, 0.0)
    return list(found.values())


def to_confirm(objective: Objective, space: Space, trials: Sequence[Trial]) -> Point | None:
    """Returns the point to start next in order to confirm the best, or None if nothing is left to confirm."""
    ranked = best_of(space, known_of(objective, trials))
    if not ranked or key_of(ranked[0].point) == key_of(space.default):
        return None
    confirming = [trial for trial in trials if trial.purpose == "confirm"]
    rejected = {key_of(trial.point) for trial in confirming} - {key_of(ranked[0].point), key_of(space.default)}
    if len(rejected) >= MOST_CONFIRMED:
        return None
    own, of_file = (
        sum(key_of(trial.point) == key_of(point) for trial in confirming) for point in (ranked[0].point, space.default)
    )
    is_usable = any(key_of(item.point) == key_of(space.default) for item in ranked)
    if own >= 1 and of_file < 1 and is_usable:
        return space.default
    return ranked[0].point if own < CONFIRMING.count("best") else None


def verdict(objective: Objective, space: Space, trials: Sequence[Trial]) -> Verdict:
    """Returns the point to use by what was measured so far."""
    ranked = best_of(space, known_of(objective, trials))
    first = next((trial for trial in trials if key_of(trial.point) == key_of(space.default)), None)
    own = score_of(objective, first) if first is not None else Score(0.0, why="it was not measured")
    if not ranked:
        return Verdict(space.default, own, None, f"no setting could be used; of the file's own: {own.why}")
    best = ranked[0].point
    worth = _mean([score_of(objective, trial) for trial in _of(trials, best)])
    if key_of(best) == key_of(space.default):
        return Verdict(best, worth, None, "the file's own settings are the best of those that were measured")
    gain = _gain(objective, trials, best, space.default)
    if not own.is_valid:
        return Verdict(best, worth, gain, f"the file's own settings cannot be used: {own.why}")
    if gain is None:
        return Verdict(best, worth, None, "it was measured once and not confirmed")
    if not gain.is_sure:
        return Verdict(
            space.default, own, gain,
            f"the best other settings have {gain.ratio:.2f} times the score of the file's own, which is within the "
            f"noise ({gain.low:.2f} to {gain.high:.2f}), so the file's own stay",
        )  # fmt: skip
    return Verdict(best, worth, gain, f"{gain.ratio:.2f} times the score of the file's own ({gain.low:.2f} to "
                                      f"{gain.high:.2f} in 95 of 100 cases, from {gain.starts} starts)")  # fmt: skip


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
    theirs = [score_of(objective, trial) for trial in confirming if key_of(trial.point) == key_of(default)]
    ours, theirs = ([found for found in group if found.is_valid] for group in (ours, theirs))
    if not ours or not theirs:
        return None
    logs = [[math.log(found.value) for found in group] for group in (ours, theirs)]
    ratio = sum(logs[0]) / len(logs[0]) - sum(logs[1]) / len(logs[1])
    within = [sum(found.noise**2 for found in group) / len(group) ** 2 for group in (ours, theirs)]
    drift = (max(logs[0]) - min(logs[0])) / 2
    wide = DEVIATIONS * math.sqrt(sum(within) + drift**2)
    return Gain(math.exp(ratio), math.exp(ratio - wide), math.exp(ratio + wide), len(ours) + len(theirs))
