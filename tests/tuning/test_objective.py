"""Which of two measurements is better."""

import math

import pytest

from serve_app.errors import ConfigError
from serve_app.tuning.objective import Objective, broken, parse_seconds, score
from tests.tuning.builders import measurement

LOW = measurement(100, clients=1, latency_s=0.5)
HIGH = measurement(400, clients=32, latency_s=4.0, ttft_p95_s=2.0)


def test_each_objective_looks_at_its_own_level() -> None:
    """The one with most tokens, the one with fewest clients, or both."""
    assert score(Objective("throughput"), [LOW, HIGH]).value == 400
    assert score(Objective("latency"), [LOW, HIGH]).value == 2
    assert score(Objective("balanced"), [LOW, HIGH]).value == pytest.approx(math.sqrt(400 * 2))


def test_a_level_beyond_a_limit_counts_for_nothing() -> None:
    """The next one within it counts, and if there is none, it is said why."""
    limited = Objective("throughput", ttft_p95_s=1.0)
    assert score(limited, [LOW, HIGH]).value == 100
    found = score(limited, [HIGH])
    assert (found.is_valid, found.why) == (False, "TTFT p95 is 2000 ms at 32 clients, and 1000 ms are allowed")


def test_failed_requests_count_for_nothing() -> None:
    """However fast the others were."""
    found = score(Objective(), [measurement(1000, errors={"503 full": 2})])
    assert (found.is_valid, found.why) == (False, "2 requests failed at 8 clients: 503 full")


def test_one_token_each_has_no_pace_and_breaks_no_limit() -> None:
    """Answers of a single token have no time per token."""
    assert broken(Objective(tpot_p95_s=0.001), measurement(10, tpot_p95_s=math.inf)) == ""


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("2s", 2), ("1.5m", 90), ("1h", 3600)])
def test_times_have_units(text: str, seconds: float) -> None:
    """In seconds."""
    assert parse_seconds(text, "--budget") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["5", "", "ms", "-1s", "0s", "1d", "nans", "infs"])
def test_other_times_are_refused(text: str) -> None:
    """Without a unit, negative, zero or no number."""
    with pytest.raises(ConfigError, match="--budget .*: this is not a time"):
        parse_seconds(text, "--budget")
