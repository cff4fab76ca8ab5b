"""Which point is the best, by how much, and how sure that is."""

import math
import random

import pytest

from serve_app.tuning.journal import Purpose, Trial
from serve_app.tuning.measurement import Level
from serve_app.tuning.objective import Objective
from serve_app.tuning.search import START_NOISE
from serve_app.tuning.space import key_of
from serve_app.tuning.verdict import score_of, to_confirm, verdict
from tests.tuning.builders import measurement, point, space, trial

OBJECTIVE = Objective()
FILE, BEST = point(None), point(16, 2)
SEARCHED = [trial(FILE, 100.0), trial(BEST, 150.0), trial(point(4), 60.0)]


def confirmed(*rates: float) -> list[Trial]:
    """After a best, the file's own and the best again were started."""
    return [trial(at, rate, "confirm") for at, rate in zip((BEST, FILE, BEST), rates, strict=False)]


def test_the_best_and_the_file_are_started_again_in_turn() -> None:
    """The file's own between two starts of the best."""
    trials, order = list(SEARCHED), []
    while (at := to_confirm(OBJECTIVE, space(), trials)) is not None:
        order.append("file" if key_of(at) == key_of(FILE) else "best")
        trials.append(trial(at, 100.0 if order[-1] == "file" else 140.0, "confirm"))
    assert order == ["best", "file", "best"]


@pytest.mark.parametrize(
    ("best", "file", "starts"),
    [
        ([107.0, 135.0, 130.0], [104.0, 104.0], 5),  # It becomes sure.
        ([100.0, 130.0, 100.0, 130.0], [100.0] * 4, 8),  # It does not.
        ([100.0, 101.0], [100.0], 3),  # It is not worth a change.
        ([100.0, 80.0], [100.0], 3),  # It is worse.
    ],
)
def test_what_noise_hides_is_started_again(best: list[float], file: list[float], starts: int) -> None:
    """In turn, while the interval has 1 in it."""
    trials, order = list(SEARCHED), []
    while (at := to_confirm(OBJECTIVE, space(), trials)) is not None:
        order.append("file" if key_of(at) == key_of(FILE) else "best")
        rates = file if order[-1] == "file" else best
        trials.append(trial(at, rates[order.count(order[-1]) - 1], "confirm"))
    assert order == ["best", "file"] * (starts // 2) + ["best"] * (starts % 2)


def test_a_gain_is_told_with_its_bounds() -> None:
    """By the confirming starts alone."""
    found = verdict(OBJECTIVE, space(), SEARCHED + confirmed(140.0, 100.0, 142.0))
    assert key_of(found.point) == key_of(BEST)
    assert found.gain is not None
    assert found.gain.ratio == pytest.approx(1.41, abs=0.01)
    assert found.gain.low < found.gain.ratio < found.gain.high
    assert (found.gain.is_sure, found.gain.starts) == (True, 3)


def test_the_trial_by_which_a_point_was_chosen_does_not_count() -> None:
    """It was lucky. The file's own settings stay."""
    found = verdict(OBJECTIVE, space(), SEARCHED + confirmed(101.0, 100.0, 99.0))
    assert key_of(found.point) == key_of(FILE)
    assert "within the noise" in found.why


def test_a_machine_that_becomes_faster_meanwhile_makes_it_unsure() -> None:
    """The two starts of the best differ by more than the gain."""
    found = verdict(OBJECTIVE, space(), SEARCHED + confirmed(100.0, 105.0, 130.0))
    assert found.gain is not None
    assert not found.gain.is_sure


def test_the_files_first_start_stands_for_one_between_the_others_if_there_is_none() -> None:
    """The starts were over."""
    found = verdict(OBJECTIVE, space(), SEARCHED + confirmed(90.0))
    assert key_of(found.point) == key_of(FILE)
    assert found.gain is not None
    assert found.gain.ratio == pytest.approx(0.9)


def test_without_confirmation_it_says_so() -> None:
    """As after Ctrl-C."""
    assert "not confirmed" in verdict(OBJECTIVE, space(), SEARCHED).why


def test_the_file_itself_may_be_the_best() -> None:
    """There is nothing to confirm then."""
    trials = [trial(FILE, 100.0), trial(point(4), 60.0), trial(point(8), 80.0)]
    assert to_confirm(OBJECTIVE, space(), trials) is None
    assert "the file's own settings are the best" in verdict(OBJECTIVE, space(), trials).why


def test_a_point_that_misses_a_limit_when_it_is_measured_again_is_no_winner() -> None:
    """The next one is."""
    limited = Objective(ttft_p95_s=0.5)
    trials = [*SEARCHED, trial(BEST, 150.0, "confirm", ttft_p95_s=0.9)]
    found = verdict(limited, space(), trials)
    assert (key_of(found.point), found.is_final) == (key_of(FILE), False)
    assert to_confirm(limited, space(), trials) == space().default
    trials.append(trial(FILE, 100.0, "confirm"))
    found = verdict(limited, space(), trials)
    assert (key_of(found.point), found.is_final) == (key_of(FILE), True)
    assert to_confirm(limited, space(), trials) is None


def test_no_fourth_point_wins_when_three_have_missed_a_limit() -> None:
    """It would be told without a start that confirms it."""
    limited = Objective(ttft_p95_s=0.5)
    trials = [trial(FILE, 90.0), *(trial(point(batch), 100.0 + batch) for batch in (4, 8, 16))]
    for batch in (4, 8, 16):
        trials.append(trial(point(batch), 100.0, "confirm", ttft_p95_s=0.9))
    assert key_of(verdict(limited, space(), trials).point) == key_of(FILE)
    assert not verdict(limited, space(), trials).is_final


def test_a_file_that_misses_its_limit_only_when_it_is_measured_again_is_told_so() -> None:
    """The best was started again, and is not said to be measured once."""
    limited = Objective(ttft_p95_s=0.5)
    trials = [*SEARCHED, trial(BEST, 150.0, "confirm"), trial(FILE, 100.0, "confirm", ttft_p95_s=0.9)]
    found = verdict(limited, space(), trials)
    assert key_of(found.point) == key_of(BEST)
    assert "when they were measured again, TTFT p95 is 900 ms" in found.why


def test_a_file_that_misses_its_limit_is_not_started_again() -> None:
    """The best is, twice."""
    limited = Objective(ttft_p95_s=0.5)
    trials = [trial(FILE, 100.0, ttft_p95_s=0.9), trial(BEST, 90.0)]
    order = []
    while (at := to_confirm(limited, space(), trials)) is not None:
        order.append(key_of(at))
        trials.append(trial(at, 90.0, "confirm"))
    assert order == [key_of(BEST)] * 2
    assert "the file's own settings cannot be used: TTFT p95 is 900 ms" in verdict(limited, space(), trials).why


def test_nothing_that_can_be_used_is_said() -> None:
    """With the reason of the file's own settings."""
    found = verdict(OBJECTIVE, space(), [Trial(FILE, "search", "failed", why="it has died")])
    assert (found.score.is_valid, found.why) == (False, "no setting could be used; of the file's own: it has died")
    assert not verdict(OBJECTIVE, space(), []).score.is_valid


def test_equal_settings_are_rarely_called_better() -> None:
    """However starts differ, if they do so by no more than is reckoned with."""
    draw, sure = random.Random(7), 0
    for _ in range(500):
        trials = list(SEARCHED)
        while (at := to_confirm(OBJECTIVE, space(), trials)) is not None:
            trials.append(trial(at, 100 * math.exp(draw.gauss(0, START_NOISE)), "confirm"))
        found = verdict(OBJECTIVE, space(), trials)
        sure += found.gain is not None and found.gain.is_sure
    assert sure <= 15, "in each look, half of the cases outside of the interval would be better"


def test_a_file_that_keeps_to_its_limit_only_at_times_makes_it_unsure() -> None:
    """Its score is that of a lower load then. It is started again."""
    limited = Objective(ttft_p95_s=0.5)

    def own(purpose: Purpose, ttft_p95_s: float) -> Trial:
        few, many = measurement(200.0, 16), measurement(400.0, 32, ttft_p95_s=ttft_p95_s)
        return Trial(FILE, purpose, "done", (few, many))

    trials = [own("search", 0.49), trial(BEST, 400.0), trial(BEST, 400.0, "confirm"), own("confirm", 0.51)]
    trials.append(trial(BEST, 400.0, "confirm"))
    found = verdict(limited, space(), trials)
    assert found.gain is not None
    assert (found.gain.ratio, found.gain.is_sure) == (pytest.approx(2.0), False)
    assert to_confirm(limited, space(), trials) == FILE


def test_what_was_only_lucky_is_not_in_the_way_of_what_is_better() -> None:
    """The next one is confirmed, and wins."""
    better = point(8)
    trials = [trial(FILE, 100.0), trial(BEST, 118.0), trial(better, 112.0), *confirmed(101.0, 100.0, 100.0)]
    for rate in (112.0, 100.0, 112.0):
        at = to_confirm(OBJECTIVE, space(), trials)
        assert at == (FILE if rate == 100.0 else better)
        trials.append(trial(at, rate, "confirm"))
    assert to_confirm(OBJECTIVE, space(), trials) is None
    found = verdict(OBJECTIVE, space(), trials)
    assert (found.point, found.gain is not None and found.gain.is_sure) == (better, True)


def test_a_sure_gain_goes_before_what_was_measured_once() -> None:
    """No start was left to confirm the latter."""
    trials = [*SEARCHED, *confirmed(140.0, 100.0, 141.0), trial(point(8), 160.0)]
    assert verdict(OBJECTIVE, space(), trials).point == BEST


def test_starts_of_the_file_on_another_day_do_not_count() -> None:
    """The machine is faster now, so the file's own is started again beside the new best."""
    new, monday = point(8), [*SEARCHED, *confirmed(100.0, 100.0, 100.0)]
    trials = [*monday, trial(new, 115.0), trial(new, 115.0, "confirm")]
    assert to_confirm(OBJECTIVE, space(), trials) == FILE
    trials += [trial(FILE, 115.0, "confirm"), trial(new, 115.0, "confirm")]
    assert verdict(OBJECTIVE, space(), trials).point == FILE


def test_one_crash_of_the_file_makes_no_other_settings_better() -> None:
    """It is started again, and compared. A second crash decides."""
    crash = Trial(FILE, "confirm", "failed", why="it has died")
    trials = [trial(FILE, 100.0), trial(BEST, 115.0), trial(BEST, 97.0, "confirm"), crash]
    assert to_confirm(OBJECTIVE, space(), trials) == FILE
    found = verdict(OBJECTIVE, space(), [*trials, trial(FILE, 100.0, "confirm"), trial(BEST, 98.0, "confirm")])
    assert found.point == FILE
    found = verdict(OBJECTIVE, space(), [*trials, crash])
    assert found.point == BEST
    assert "cannot be used: when they were measured again, it has died" in found.why


def test_several_models_count_by_their_geometric_mean() -> None:
    """And one whose requests fail makes the point unusable."""
    both = Trial(FILE, "search", "done", (measurement(100.0), measurement(400.0, model="n")))
    assert score_of(OBJECTIVE, both).value == pytest.approx(200)
    one = Trial(FILE, "search", "done", (measurement(100.0), measurement(400.0, model="n", errors={"503": 1})))
    assert score_of(OBJECTIVE, one).why.startswith("n: 1 request failed")


def test_a_level_counts_only_if_it_is_within_the_limits_for_each_model() -> None:
    """They were sent it at the same time."""
    many = (measurement(300.0, 32), measurement(300.0, 32, model="n", ttft_p95_s=0.9))
    few = (measurement(100.0), measurement(200.0, model="n"))
    worth = score_of(Objective(ttft_p95_s=0.5), Trial(FILE, "search", "done", (*few, *many)))
    assert (worth.value, worth.level) == (pytest.approx(math.sqrt(100 * 200)), Level(clients=8))
