"""LoRA adapters through Serve: a short form of `served_adapters.py`, with two replicas of pt and one of vLLM."""

from collections.abc import Iterator

import pytest

from tests.cluster.served_adapters import (
    AT_ONCE,
    ENGINES,
    LATE,
    WATCHED,
    AdapterServe,
    all_die,
    at_once,
    death,
    live,
    name_taken,
    outcome,
    session_for,
)
from tests.cluster.vllm_adapters import CLOSED
from tests.lora import ADAPTERS_DIR

# All replicas have a change of the file a few seconds after Serve has accepted it; `served_adapters.py` says how many.
# A replica that had to start again for it would need longer than this.
MOST_LIVE_S = 30.0


@pytest.fixture(scope="module")
def served() -> Iterator[AdapterServe]:
    """The running cluster, which the last test ends."""
    serve = AdapterServe({"pt": 2, "vllm": 1})
    try:
        yield serve
    finally:
        serve.stop()
        serve.clean_up()


@pytest.mark.parametrize("way", ["by name", "by route"])
@pytest.mark.parametrize("engine", ENGINES)
async def test_each_of_many_at_once_gets_its_own_adapters_answer(served: AdapterServe, engine: str, way: str) -> None:
    """Word for word, over sixteen adapters and the base, streamed and not."""
    assert await at_once(served, engine, way) == {"right": AT_ONCE}


async def test_adapters_come_and_go_under_load(served: AdapterServe) -> None:
    """By `serve deploy` on both engines, without another process, and a broken one harms nobody."""
    found = await live(served)
    assert found["same_processes"]
    assert [set(seen) for seen in (found["late"], *found["seen"].values())] == [{"right"}] * 3
    assert max(found["more_s"], found["less_s"]) <= MOST_LIVE_S
    assert all(": 503 " in told for told in found["broken"])
    assert all(": 404 " in told for told in found["gone"])


async def test_streams_are_taken_up_again_with_their_adapters(served: AdapterServe) -> None:
    """When one of pt's replicas is killed. The one in its place has all adapters."""
    found = await death(served, "pt")
    assert found["seen"] == {"right": 2 * AT_ONCE}
    assert found["after"] == {"right": AT_ONCE}


async def test_a_model_does_not_take_the_name_of_an_adapter_in_a_folder(served: AdapterServe) -> None:
    """Its deployment is refused and says why. The adapter is asked as before by both names, and others come as ever."""
    found = await name_taken(served)
    assert found["seen"] == ["right"] * 3
    assert f"the name '{WATCHED}' is that of the model {WATCHED} and of the adapter {WATCHED} that pt" in found["told"]


async def test_an_adapter_in_a_folder_is_known_while_no_replica_runs(served: AdapterServe) -> None:
    """All of them are killed at once. Requests wait for the new ones, or are told to come again."""
    seen = await all_die(served)
    assert seen.pop("right") > 0
    assert [text for text in seen if ": 503 " not in text and "model_unavailable" not in text] == []


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("way", ["", "/models/vllm"])
async def test_no_client_loads_an_adapter(served: AdapterServe, way: str, path: str) -> None:
    """By vLLM's own endpoints, which would take any folder of the machine."""
    body = {"model": "vllm", "lora_name": "smuggled", "lora_path": str(ADAPTERS_DIR / LATE)}
    async with session_for() as session:
        async with session.post(f"{served.url}{way}{path}", json=body) as reply:
            assert reply.status == 404
        assert ": 404 " in await outcome(session, served.url, ("smuggled", "Who are you?", ""), False)
