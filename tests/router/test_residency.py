"""Which models hold their memory, and how long the others take."""

from typing import Any

from serve_app.residency.lease_records import PoolName
from serve_app.router.residency import Residency


def record(model: str, state: str, wake_s: float = 1.0) -> dict[str, Any]:
    """A replica as a keeper writes it down."""
    return {"terms": {"model": model, "wake_s": wake_s, "start_s": 20.0}, "state": state}


async def test_the_seconds_until_a_model_is_resident() -> None:
    """That of the replica that is there first, and none if one is resident or if nothing is known of the model."""
    pools = {
        PoolName("default", "n1"): [record("a", "parked"), record("b", "stopped"), record("c", "resident")],
        PoolName("default", "n2"): [record("a", "draining", 0.5), record("c", "parked")],
    }
    residency = Residency(lambda: pools)
    assert [await residency.wake_s(name) for name in "abcd"] == [0.5, 20.0, None, None]
    assert await residency.states() == {"a": ["parked", "draining"], "b": ["stopped"], "c": ["resident", "parked"]}


async def test_it_is_read_only_if_it_is_old() -> None:
    """However many ask, and the last reading stays while Ray's head is away."""
    reads = []

    def read() -> dict[PoolName, list[dict[str, Any]]]:
        reads.append(1)
        if len(reads) > 1:
            raise RuntimeError("no head")
        return {PoolName("default", "n"): [record("a", "parked")]}

    residency = Residency(read)
    for _ in range(10):
        assert await residency.states() == {"a": ["parked"]}
    assert len(reads) == 1
    residency._read_at = float("-inf")
    assert await residency.states() == {"a": ["parked"]}
    assert len(reads) == 2
