"""How many replicas an engine's load asks for. The cluster test shows that Serve follows."""

from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.replica.autoscaling import by_engine_load


def context(metrics: Any, target: int = 2) -> Any:
    """The part of Serve's context that is read."""
    return SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=target)


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [([0.0], 0.0), ([0.75], 1.0), ([1.5], 2.0), ([0.75, 0.75], 2.0), ([3.0, 0.0], 4.0)],
)
def test_replicas_are_wanted_at_three_quarters_of_their_load(loads: list[float], wanted: float) -> None:
    """What waits counts too: a load may be over 1."""
    desired, state = by_engine_load(context({"engine_load": dict(enumerate(loads))}))
    assert (desired, state) == (pytest.approx(wanted), {})


@pytest.mark.parametrize("metrics", [None, {}, {"engine_load": {}}, {"other": {0: 5.0}}])
def test_nothing_changes_where_no_replica_has_reported(metrics: Any) -> None:
    """As after a start."""
    assert by_engine_load(context(metrics, target=3)) == (3, {})
