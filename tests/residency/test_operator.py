"""What an operator wants of a model goes to the keeper of the right pool."""

from typing import Any

import pytest

from serve_app.residency.lease_records import PoolName
from serve_app.residency.operator import KeeperSilent, Operator

NEAR, FAR, OTHER = PoolName("default", "n1"), PoolName("default", "n2"), PoolName("other", "n1")


def record(model: str, state: str, wake_s: float = 1.0, start_s: float = 10.0) -> dict[str, Any]:
    """One replica as a keeper writes it down."""
    return {"terms": {"model": model, "wake_s": wake_s, "start_s": start_s}, "state": state}


class Actors:
    """Keepers that note what they are asked. `calls` has the pool, the method and the model."""

    def __init__(self, answers: dict[str, Any], problem: Exception | None = None) -> None:
        self.answers, self.problem = answers, problem
        self.calls: list[tuple[PoolName, str, str]] = []

    def find(self, name: PoolName) -> Any:
        """The handle of one."""
        if self.problem is not None:
            raise self.problem
        actors = self

        class Method:
            def __init__(self, method: str) -> None:
                self.method = method

            async def remote(self, model: str) -> Any:
                actors.calls.append((name, self.method, model))
                return actors.answers[self.method]

        class Handle:
            def __getattr__(self, method: str) -> Method:
                if method not in actors.answers:
                    raise AttributeError(method)
                return Method(method)

        return Handle()


POOLS = {
    NEAR: [record("m", "parked"), record("x", "resident")],
    FAR: [record("m", "stopped")],
    OTHER: [record("y", "resident")],
}


async def test_the_keeper_whose_replica_is_nearest_wakes_it() -> None:
    """Other keepers are not asked, and one that has a resident replica is nearer than all."""
    actors = Actors({"wake": "parked"})
    assert await Operator(lambda: POOLS, actors.find).wake("m") == "parked"
    assert actors.calls == [(NEAR, "wake", "m")]
    pools = {**POOLS, FAR: [record("m", "resident")]}
    await Operator(lambda: pools, actors.find).wake("m")
    assert actors.calls[1:] == [(FAR, "wake", "m")]


async def test_all_keepers_that_have_a_replica_park_it() -> None:
    """Their answers are joined."""
    actors = Actors({"park": ["resident"]})
    assert await Operator(lambda: POOLS, actors.find).park("m") == ["resident", "resident"]
    assert actors.calls == [(NEAR, "park", "m"), (FAR, "park", "m")]


async def test_a_model_that_shares_no_memory_has_no_keeper() -> None:
    """Nobody is asked."""
    actors = Actors({})
    operator = Operator(lambda: POOLS, actors.find)
    assert (await operator.wake("z"), await operator.park("z"), actors.calls) == (None, None, [])


@pytest.mark.parametrize("wish", ["wake", "park"])
async def test_a_keeper_that_does_not_know_the_replicas_yet_says_so(wish: str) -> None:
    """It is not taken for a model that shares no memory."""
    operator = Operator(lambda: POOLS, Actors({wish: None}).find)
    with pytest.raises(KeeperSilent, match="'default' has just started"):
        await getattr(operator, wish)("m")


@pytest.mark.parametrize(
    ("actors", "told"),
    [
        (Actors({}), "'default' is of an earlier version"),
        (Actors({}, ValueError("no actor of that name")), "'default' does not answer: no actor of that name"),
    ],
)
async def test_a_keeper_that_does_not_answer_is_named(actors: Actors, told: str) -> None:
    """With the reason."""
    with pytest.raises(KeeperSilent, match=told):
        await Operator(lambda: POOLS, actors.find).wake("m")
