"""Says which of the measured points is the best, by how much, and how sure that is. It is pure."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.tuning.journal import Trial
from serve_app.tuning.objective import Objective, Score, score
from serve_app.tuning.search import AS_GOOD, START_NOISE, Known, best_of
from serve_app.tuning.space import Point, Space, key_of

# A gain is given with the interval that has it in 95 of 100 cases if starts differ at least as much as `START_NOISE`
# says.
DEVIATIONS = 1.96
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
        return not self.is_sure and self.ratio > math.exp(AS_GOOD)


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


def known_of(objective: Objective, space: Space, trials: Sequence[Trial]) -> list[Known]:
    """Returns what the search knows of each point that was started: the mean of its confirming starts once it has all
    of them, and what its first start has shown until then. One that is refuted counts as failed."""
    found = []
    for own in _by_point(trials).values():
        point = own[0].point
        if _refuting(objective, space, own) is not None:
            found.append(Known(point, 0.0))
            continue
        judged = _unbiased(space, own)
        if len(judged) < CONFIRMING.count("best"):
            judged = own[:1]
        worth = _mean([score_of(objective, trial) for trial in judged])
        # A first look is shorter, and it comes while caches fill.
        noise = worth.noise + (NOISE_OF_A_LOOK if own[0].status == "stopped" else 0.0)
        found.append(Known(point, worth.value, noise))
    return found


def to_confirm(objective: Objective, space: Space, trials: Sequence[Trial]) -> Point | None:
    """Returns the point to start next in order to confirm the best, or None if nothing is left to confirm. The file's
    own point, if it is the best, is confirmed only if there are limits that it has to keep to."""
    ranked = best_of(space, known_of(objective, space, trials))
    if not ranked:
        return None
    point = ranked[0].point
    best, default = key_of(point), key_of(space.default)
    confirming = [trial for trial in trials if trial.purpose == "confirm"]
    if best == default:
        is_new = default not in map(_key, confirming)
        return space.default if objective.has_limits and is_new else None
    if len({*map(_key, confirming)} - {best, default}) >= MOST_CONFIRMED:
        return None
    own, of_file = (_valid(objective, group) for group in _side_by_side(trials, point, space.default))
    if own and not of_file and any(key_of(item.point) == default for item in ranked):
        return space.default
    if len(own) < CONFIRMING.count("best"):
        return point
    gain = _gain(objective, space, trials, point)
    if gain is None or not gain.is_open or len(of_file) >= MOST_STARTS_OF_EACH:
        return None
    return space.default if len(of_file) < len(own) else point


def verdict(objective: Objective, space: Space, trials: Sequence[Trial]) -> Verdict:
    """Returns the point to use by what was measured so far."""
    ranked = best_of(space, known_of(objective, space, trials))
    own = _own(objective, space, trials)
    if not ranked:
        return Verdict(space.default, own, None, f"no setting could be used; of the file's own: {own.why}")
    best = _winner(objective, space, trials, ranked)
    started = _of(trials, best)
    worth = _mean([score_of(objective, trial) for trial in _unbiased(space, started)])
    is_again = any(trial.purpose == "confirm" for trial in started)
    if objective.has_limits and not is_again:
        why = "it was measured once, and no other start has confirmed that it keeps to the limits"
        return Verdict(best, worth, None, why, is_final=False)
    at = f" at {worth.level.title}" if worth.level is not None else ""
    if key_of(best) == key_of(space.default):
        why = f"the file's own settings are the best of those that were measured{at}"
        return Verdict(best, worth, None, why)
    gain = _gain(objective, space, trials, best)
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


def _winner(objective: Objective, space: Space, trials: Sequence[Trial], ranked: Sequence[Known]) -> Point:
    """Returns the point that a verdict is about: the one with the largest sure gain, or else the best one that was
    confirmed, or else the best one. What was measured once does not go before what was confirmed."""
    again = {_key(trial) for trial in trials if trial.purpose == "confirm"} - {key_of(space.default)}
    confirmed = [item.point for item in ranked if key_of(item.point) in again]
    gains = [(gain, point) for point in confirmed if (gain := _gain(objective, space, trials, point)) is not None]
    sure = [(gain.ratio, point) for gain, point in gains if gain.is_sure]
    if sure:
        return max(sure, key=lambda pair: pair[0])[1]
    return confirmed[0] if confirmed else ranked[0].point


def _own(objective: Objective, space: Space, trials: Sequence[Trial]) -> Score:
    """Returns the score of the file's own settings."""
    found = _of(trials, space.default)
    if not found:
        return Score(0.0, why="it was not measured")
    refuting = _refuting(objective, space, found)
    if refuting is None:
        return _mean([score_of(objective, trial) for trial in found])
    first = score_of(objective, found[0])
    return Score(0.0, why=f"when they were measured again, {refuting.why}") if first.is_valid else first


def _refuting(objective: Objective, space: Space, trials: Sequence[Trial]) -> Score | None:
    """Returns the score that refutes a point when it is started again, or None. What misses a limit once does not keep
    to it, and what crashes once is left. Of the file's own, one crash may be chance, because it has to be compared."""
    bad = [trial for trial in trials if trial.purpose == "confirm" and not score_of(objective, trial).is_valid]
    is_own = key_of(trials[0].point) == key_of(space.default)
    enough = 2 if is_own and all(trial.status == "failed" for trial in bad) else 1
    return score_of(objective, bad[0]) if len(bad) >= enough else None


def _key(trial: Trial) -> str:
    return key_of(trial.point)


def _by_point(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(_key(trial), []).append(trial)
    return found


def _of(trials: Sequence[Trial], point: Point) -> list[Trial]:
    return _by_point(trials).get(key_of(point), [])


def _unbiased(space: Space, trials: Sequence[Trial]) -> Sequence[Trial]:
    """Returns the trials of a point by which it is judged: its confirming ones, or all if there are none. The trial by
    which it was chosen is better than it is on average, because it was chosen by it. The file's own was not chosen."""
    if key_of(trials[0].point) == key_of(space.default):
        return trials
    return [trial for trial in trials if trial.purpose == "confirm"] or trials


def _side_by_side(trials: Sequence[Trial], best: Point, default: Point) -> tuple[list[Trial], list[Trial]]:
    """Returns the confirming trials of a point, and those of the file's own since the first of them. The machine may
    have been slower or faster before: a journal may be of another day."""
    confirming = [trial for trial in trials if trial.purpose == "confirm"]
    begin = next((number for number, trial in enumerate(confirming) if _key(trial) == key_of(best)), len(confirming))
    return _of(confirming[begin:], best), _of(confirming[begin:], default)


def _valid(objective: Objective, trials: Sequence[Trial]) -> list[Score]:
    return [worth for trial in trials if (worth := score_of(objective, trial)).is_valid]


def _mean(scores: Sequence[Score]) -> Score:
    good = [found for found in scores if found.is_valid]
    if not good:
        return scores[0]
    value = math.exp(sum(math.log(found.value) for found in good) / len(good))
    return Score(value, math.sqrt(sum(found.noise**2 for found in good)) / len(good), good[0].level)


def _gain(objective: Objective, space: Space, trials: Sequence[Trial], best: Point) -> Gain | None:
    """Returns how much better a point is than the file's own, by its confirming runs and those of the file's own
    between them. If the file's own has none yet, its first start stands for one."""
    ours, theirs = (_valid(objective, group) for group in _side_by_side(trials, best, space.default))
    of_file = _valid(objective, _of(trials, space.default))
    theirs = theirs or of_file
    if not ours or not theirs:
        return None
    ratio = _mean_log(ours) - _mean_log(theirs)
    wide = DEVIATIONS * math.sqrt(_variance(ours, ours) + _variance(theirs, of_file))
    return Gain(math.exp(ratio), math.exp(ratio - wide), math.exp(ratio + wide), len(ours) + len(theirs))


def _mean_log(scores: Sequence[Score]) -> float:
    return statistics.fmean(math.log(found.value) for found in scores)


def _variance(scores: Sequence[Score], like: Sequence[Score]) -> float:
    """Returns the variance of the mean of the logarithms of scores: of the noise within the starts, of what starts
    usually differ, and of what starts of these settings, which are `like`, do differ. The last is not taken instead of
    the others, because two or three starts can be alike by chance. It has in it that a start may keep to a limit only
    at a lower load, and then has half the score."""
    noise = statistics.fmean(found.noise**2 for found in scores)
    spread = statistics.variance([math.log(found.value) for found in like]) if len(like) > 1 else 0.0
    return (noise + START_NOISE**2 + spread) / len(scores)
