"""Which models hold their memory, and how long the others take."""

from typing import Any

from serve_app.residency.lease_records import PoolName
from serve_app.router.residency import Residency


def record(model: str, state: str, wake_s: float = 1.0) -> dict[str, Any]:
    """A replica as a keeper writes it down."""
    return {
        "terms": {"model": model, "wake_s": wake_s, "start_s": 20.0, "wake_is_guess": False, "start_is_guess": True},
        "state": state,
    }


async def test_the_seconds_until_a_model_is_resident() -> None:
    """That of the replica that is there first, and none if one is resident or if nothing is known of the model."""
    pools = {
        PoolName("default", "n1"): [record("a", "parked"), record("b", "stopped"), record("c", "resident")],
        PoolName("default", "n2"): [record("a", "draining", 0.5), record("c", "parked")],
    }
    residency = Residency(lambda: pools)
    await residency.refresh()
    assert [residency.wake(name) for name in "abcd"] == [(0.5, False), (20.0, True), None, None]
    assert residency.states() == {"a": ["parked", "draining"], "b": ["stopped"], "c": ["resident", "parked"]}


async def test_what_was_read_last_stays_while_nothing_can_be_read() -> None:
    """Whatever goes wrong."""
    name = PoolName("default", "n")
    answers = [{name: [record("a", "parked")]}, {name: [{"other": 1}]}]
    residency = Residency(lambda: answers.pop(0))  # The third time it raises IndexError.
    for _ in range(3):
        await residency.refresh()
        assert residency.states() == {"a": ["parked"]}
