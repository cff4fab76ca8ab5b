"""What is left of a cluster's devices beside the models that run there."""

from dataclasses import replace

import pytest

from serve_app.facts.inventory import Device, Inventory
from serve_app.status.beside import Holding, Running, RunningModel, RunningPool, beside_running

GIB = 2**30
WHOLE = Device("n1", 0, "L4", 24 * GIB, 24 * GIB, by_index=False)
INDEXED = Device("n1", 0, "L4", 24 * GIB, 24 * GIB, by_index=True)
MEMORY = Device("n1", None, "memory", 64 * GIB, 64 * GIB)


def left(device: Device, running: Running, models: tuple[str, ...] = (), pools: tuple[str, ...] = ()) -> int:
    """The GiB of the only device that a plan with these models and pools may use."""
    inventory, _ = beside_running(Inventory((device,)), running, models, pools)
    return inventory.devices[0].free_bytes // GIB


def held(
    name: str, held: int, planned: int, gpus: float = 0.0, device: Device = MEMORY, pool: str = ""
) -> RunningModel:
    """A model with one replica, in GiB."""
    return RunningModel(name, [Holding(device.id, held * GIB, planned * GIB, gpus)], pool)


def with_free(device: Device, free: int) -> Device:
    """The device with so many GiB free."""
    return replace(device, free_bytes=free * GIB)


@pytest.mark.parametrize(
    ("running", "models", "gib"),
    [
        (Running(), (), 50),
        # It holds 4 of the 8 that it was planned to take, so 4 more are not there.
        (Running([held("a", 4, 8)]), (), 46),
        # It holds more than it was planned to take.
        (Running([held("a", 9, 8)]), (), 50),
        # An update of it may have all of it, also under another name that stays beside it.
        (Running([held("a", 4, 8)]), ("a",), 54),
        (Running([held("a", 4, 8), held("b", 1, 2)]), ("a", "x"), 53),
    ],
)
def test_memory_counts_what_is_held_or_planned(running: Running, models: tuple[str, ...], gib: int) -> None:
    """Whichever is more, of the models that stay. What foreign processes hold is not there in any case."""
    assert left(with_free(MEMORY, 50), running, models) == gib


@pytest.mark.parametrize(
    ("running", "models", "gib"),
    [
        (Running([held("a", 4, 20, 1.0, WHOLE)]), (), 0),
        (Running([held("a", 4, 20, 1.0, WHOLE)]), ("a",), 24),
        (Running([held("a", 4, 6, 0.5, WHOLE)]), (), 18),
        (Running(pools=[RunningPool("default", {"n1:0": 24 * GIB})]), (), 0),
    ],
)
def test_a_gpu_that_ray_has_given_away_whole_is_not_there(running: Running, models: tuple[str, ...], gib: int) -> None:
    """However much of it is free. A share of it leaves the rest."""
    assert left(with_free(WHOLE, 20), running, models) == gib


def test_shares_of_a_gpu_are_told() -> None:
    """The plan cannot know what Ray has left of it."""
    inventory = Inventory((WHOLE,))
    _, notes = beside_running(inventory, Running([held("a", 4, 6, 0.75, WHOLE)]), (), ())
    assert notes == ["n1:0 is shared by a, and Ray gives no more than num_gpus: 0.25 of it to others."]


def test_the_books_of_ray_bound_what_is_free() -> None:
    """Where they count bytes: what starts has claimed them and does not hold them yet. Those of a model that is
    replaced are free."""
    starting = RunningModel("a", [], starting=1, claims={"n1:0": 10 * GIB})
    running = Running([starting], booked={"n1:0": 14 * GIB})
    assert left(INDEXED, running) == 14
    assert left(INDEXED, running, ("a",)) == 24
    _, notes = beside_running(Inventory((INDEXED,)), running, (), ())
    assert notes == ["a has replicas that have not reported what they hold, so they are not counted."]


def test_a_pool_counts_with_its_budget() -> None:
    """Whoever of it is resident. A plan with the pool has all of it anew, also for its models that the plan has not."""
    members = [held("a", 6, 8, pool="p"), held("b", 0, 8, pool="p")]
    running = Running(members, [RunningPool("p", {"n1:cpu": 10 * GIB})])
    assert left(with_free(MEMORY, 50), running) == 46
    assert left(with_free(MEMORY, 50), running, ("c",), ("p",)) == 56
    _, notes = beside_running(Inventory((MEMORY,)), running, ("c",), ("p",))
    assert notes == ["What a, b hold now counts as free, because the plan has it anew."]


def test_a_pool_claims_bytes_in_the_books_for_its_keeper() -> None:
    """They are free for a plan that has the pool."""
    pool = RunningPool("p", {"n1:0": 16 * GIB}, {"n1:0": 16 * GIB})
    running = Running(pools=[pool], booked={"n1:0": 8 * GIB})
    assert (left(INDEXED, running), left(INDEXED, running, (), ("p",))) == (8, 24)


def test_a_model_that_sleeps_is_named() -> None:
    """It holds nothing, and will need room."""
    _, notes = beside_running(Inventory((MEMORY,)), Running([RunningModel("a", [], is_asleep=True)]), (), ())
    assert notes == ["a is scaled to zero and is not counted. It needs room when a request wakes it."]
