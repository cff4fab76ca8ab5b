"""What the models answered in the last ten minutes."""

from serve_app.console.traffic import INTERVAL_S, INTERVALS, Traffic, added, last_values, slot_of, whole_series


def test_requests_are_counted_in_the_interval_in_which_they_end() -> None:
    """With their errors, tokens and times to the first piece."""
    traffic = Traffic(1000.0)
    for first_s in (0.1, 0.1, 0.1, 2.0):
        traffic.ended(1001.0, "m", is_error=first_s == 2.0, first_s=first_s)
    traffic.made(1001.0, "m", 50)
    traffic.seen(1001.0, "m", waiting=3, active=4)
    traffic.seen(1002.0, "m", waiting=1, active=6)
    traffic.ended(1006.0, "m", is_error=False, first_s=None)
    series = whole_series(traffic.rings(), 1006.5, traffic.first_slot)["m"]
    assert series["requests"] == [4, 1]
    assert series["errors"] == [1, 0]
    assert series["tokens_per_s"] == [10.0, 0.0]
    assert series["waiting"] == [3, 0]
    assert series["active"] == [6, 0]
    p50, p95 = series["ttft_p50_s"][0], series["ttft_p95_s"][0]
    assert p50 is not None and abs(p50 / 0.1 - 1) < 0.05  # noqa: PT018
    assert p95 is not None and abs(p95 / 2.0 - 1) < 0.05  # noqa: PT018
    assert series["ttft_p50_s"][1] is None


def test_tokens_of_a_whole_answer_are_those_of_its_time() -> None:
    """Of all intervals since it began, to the token. Those that had ended are known as changed for a while."""
    traffic = Traffic(1000.0)
    traffic.made_since(1002.5, 1012.5, "m", 101)
    series = whole_series(traffic.rings(), 1012.5, traffic.first_slot)["m"]
    assert [round(rate * s) for rate, s in zip(series["tokens_per_s"], (5, 5, 2.5), strict=True)] == [25, 50, 26]
    slot = slot_of(1000.0)
    assert traffic.late(1012.0) == [slot, slot + 1]
    assert traffic.late(1012.5) == []
    traffic.made_since(1013.0, 1013.0, "m", 7)
    traffic.made_since(0.0, 1016.0, "m", 16)  # It began before this was counted.
    assert sum(entry.tokens for entry in traffic.rings()["m"].values()) == 101 + 7 + 16
    assert min(traffic.rings()["m"]) == slot
    traffic.made_since(1029.0, 1031.0, "m", 2)
    assert traffic.late(0.0) == [slot + 5]


def test_a_very_long_answer_is_counted_in_the_last_ten_minutes() -> None:
    """All of its tokens, and no older interval is kept."""
    traffic = Traffic(0.0)
    traffic.made_since(1.0, 10_001.0, "m", 999)
    assert sum(entry.tokens for entry in traffic.rings()["m"].values()) == 999
    assert len(traffic.rings()["m"]) == INTERVALS


def test_an_interval_that_runs_has_the_rate_of_its_seconds_so_far() -> None:
    """So a page does not see a rate that rises for five seconds and falls again."""
    traffic = Traffic(1000.0)
    traffic.made(1001.0, "m", 20)
    slot = slot_of(1000.0)
    assert last_values(traffic.rings(), slot, 1002.0)["m"]["tokens_per_s"] == 10.0
    assert last_values(traffic.rings(), slot, 1009.0)["m"]["tokens_per_s"] == 20 / INTERVAL_S


def test_the_rings_do_not_grow() -> None:
    """Neither with time nor with models that are gone."""
    traffic = Traffic(0.0)
    for number in range(10 * INTERVALS):
        traffic.ended(number * INTERVAL_S, "m", is_error=False, first_s=0.01 * number)
        traffic.ended(number * INTERVAL_S, f"m{number}", is_error=False, first_s=None)
        traffic.forget_all_but({"m", f"m{number}"})
    assert set(traffic.rings()) == {"m", f"m{10 * INTERVALS - 1}"}
    assert len(traffic.rings()["m"]) == INTERVALS
    now = 10 * INTERVALS * INTERVAL_S - 1.0
    assert len(whole_series(traffic.rings(), now, 0)["m"]["requests"]) == INTERVALS


def test_a_model_without_traffic_in_ten_minutes_is_left_out() -> None:
    """It has no series, and no last values."""
    traffic = Traffic(0.0)
    traffic.ended(1.0, "m", is_error=False, first_s=None)
    later = (INTERVALS + 2) * INTERVAL_S + 1.0
    assert whole_series(traffic.rings(), later, 0) == {}
    assert last_values(traffic.rings(), slot_of(later), later) == {}


def test_the_figures_of_several_routers_add_up() -> None:
    """Percentiles are those of all requests together, and no router's own entries change."""
    one, other = Traffic(0.0), Traffic(0.0)
    for _ in range(99):
        one.ended(1.0, "m", is_error=False, first_s=0.05)
    other.ended(1.0, "m", is_error=True, first_s=1.0)
    other.ended(1.0, "n", is_error=False, first_s=1.0)
    total = added([one.rings(), other.rings()])
    values = last_values(total, 0, 5.0)
    assert (values["m"]["requests"], values["m"]["errors"], values["n"]["requests"]) == (100, 1, 1)
    assert values["m"]["ttft_p95_s"] == last_values(one.rings(), 0, 5.0)["m"]["ttft_p95_s"]
    assert last_values(one.rings(), 0, 5.0)["m"]["requests"] == 99
