"""What a level of load has shown."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.tuning.measurement import Level, Measurement, Sample, measured

LEVEL = Level(clients=2)


def test_tokens_outside_of_the_time_do_not_count() -> None:
    """One request reaches over the beginning, one over the end."""
    samples = [Sample(0.0, 0.5, 1.5, 101), Sample(1.0, 1.5, 2.5, 101)]
    found = measured("m", LEVEL, samples, 1.0, 2.0)
    assert found.tokens_per_s == pytest.approx(50 + 51)
    assert found.requests == 1


def test_latency_counts_from_when_a_request_was_due() -> None:
    """A server that stands still for ten seconds shows in all requests that were due meanwhile."""
    samples = [Sample(due, 10.0, 10.1, 2) for due in (0.0, 2.0, 4.0, 6.0)]
    found = measured("m", Level(rate=0.5), samples, 0.0, 8.0)
    assert (found.ttft_p50_s, found.ttft_p95_s) == (pytest.approx(6.0), pytest.approx(10.0))


def test_errors_are_counted_by_what_they_said_and_make_nothing_faster() -> None:
    """Neither their tokens nor their times count."""
    samples = [Sample(0.0, 0.1, 1.0, 10), Sample(0.5, None, 0.6, 0, "503 full"), Sample(0.7, 0.8, 0.9, 3, "cut")]
    found = measured("m", LEVEL, samples, 0.0, 1.0)
    assert found.errors == {"503 full": 1, "cut": 1}
    assert (found.requests, found.tokens_per_s) == (1, pytest.approx(10))


def test_nothing_is_no_division_by_zero() -> None:
    """A level without an answer has no rate, and its times are infinite."""
    found = measured("m", LEVEL, [], 0.0, 1.0)
    assert (found.tokens_per_s, found.noise, found.latency_s) == (0.0, math.inf, math.inf)


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 5), st.floats(0, 5), st.integers(1, 50)), max_size=20))
def test_all_tokens_are_counted_once(requests: list[tuple[float, float, float, int]]) -> None:
    """Over times that join each other."""
    samples = [Sample(due, due + first, due + first + rest, tokens) for due, first, rest, tokens in requests]
    edges = [0.0, 3.0, 3.5, 11.0, 20.0]
    parts = [measured("m", LEVEL, samples, *edge) for edge in itertools.pairwise(edges)]
    assert sum(part.tokens_per_s * part.seconds for part in parts) == pytest.approx(sum(s.tokens for s in samples))


def test_an_even_stream_has_no_noise_and_an_uneven_one_has() -> None:
    """By what differs between the parts of the time."""
    even = measured("m", LEVEL, [Sample(0.0, 0.0, 12.0, 1201)], 1.0, 11.0)
    uneven = measured("m", LEVEL, [Sample(0.0, 0.0, 6.0, 1201)], 1.0, 11.0)
    assert even.noise < 0.001 < 0.2 < uneven.noise


def test_it_goes_through_the_journal() -> None:
    """As JSON and back."""
    found = measured("m", LEVEL, [Sample(0.0, 0.1, 1.0, 10)], 0.0, 1.0)
    assert Measurement.from_json(found.to_json()) == found


def test_clients_in_step_do_not_look_like_noise() -> None:
    """Their answers all begin and end at the same moments. A part of the time is as long as an answer at least."""
    samples = [Sample(4.0 * turn, 4.0 * turn + 2, 4.0 * turn + 4, 32) for turn in range(6) for _ in range(16)]
    assert measured("m", LEVEL, samples, 4.0, 20.0).noise < 0.01
