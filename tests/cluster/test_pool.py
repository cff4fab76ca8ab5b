"""Three models that share memory for one: who is asked has it, and no death costs a request."""

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Iterator

import httpx
import psutil
import pytest

from serve_app.residency.life_lock import lock_folder, read_holding
from tests.cluster.served_pool import REPLICA, PoolOnNodes, run_rate
from tests.cluster.served_ranks import session_for
from tests.cluster.storm import ask
from tests.demo_answers import ANSWERS, QUESTIONS


@pytest.fixture(scope="module")
def cluster() -> Iterator[PoolOnNodes]:
    """It, once each model has been loaded."""
    started = PoolOnNodes(pt=3, vllm=0, room=1)
    try:
        yield started
    finally:
        started.stop(signal.SIGTERM)
        started.clean_up()


def test_each_model_answers_by_name_and_by_route(cluster: PoolOnNodes) -> None:
    """Many at once, streamed, for all models in turn. One of them has its memory afterwards, and others are parked."""

    async def asked() -> Counter[str]:
        async with session_for() as session:
            seen = await asyncio.gather(
                *(
                    ask(session, cluster.url + path, "/v1/chat/completions", body(name, question))
                    for question in QUESTIONS[:4]
                    for name in cluster.names
                    for path in ("", f"/models/{name}")
                )
            )
        wanted = [ANSWERS[question] for question in QUESTIONS[:4] for _ in range(2 * len(cluster.names))]
        return Counter(
            "right" if told["text"] == text and told["ends"] == 1 else str(told)
            for told, text in zip(seen, wanted, strict=True)
        )

    assert asyncio.run(asked()) == {"right": 4 * 2 * len(cluster.names)}
    models = httpx.get(f"{cluster.url}/ready", timeout=10).json()["models"]
    states = Counter(state for model in models.values() for state in model["residency"])
    assert states["resident"] + states["waking"] + states["draining"] <= 1
    assert states["parked"] >= len(cluster.names) - 1


def test_the_lock_of_each_replica_says_what_it_holds(cluster: PoolOnNodes) -> None:
    """With the raylet that has started it, so that the next node of Ray on this machine can wait for it."""
    replicas = set(cluster.pids(REPLICA))
    found = [holding for path in lock_folder().iterdir() if (holding := read_holding(path)) is not None]
    own = [holding for holding in found if holding.process[0] in replicas]
    assert sorted(holding.model for holding in own) == cluster.names
    assert {psutil.Process(holding.raylet[0]).exe().rpartition("/")[2] for holding in own} == {"raylet"}
    assert 0 < sum(holding.lease.get("cpu", 0) for holding in own) <= cluster.budget


async def test_an_operator_parks_and_wakes_models_without_a_request(cluster: PoolOnNodes) -> None:
    """By the console: one leaves though nobody waits for its memory, and another one has it though nobody asks for
    it."""
    first, second = cluster.names[:2]
    async with session_for() as session:
        await ask(session, cluster.url, "/v1/chat/completions", body(first, QUESTIONS[0]))
    async with httpx.AsyncClient(base_url=cluster.url, timeout=30) as client:
        await until_residency(client, first, "resident")
        parked = await client.post(f"/ui/api/models/{first}/park")
        assert (parked.status_code, parked.json()["has_begun"]) == (202, True), parked.text
        await until_residency(client, first, "parked")
        again = await client.post(f"/ui/api/models/{first}/park")
        assert (again.status_code, again.json()["has_begun"]) == (200, False)
        woken = await client.post(f"/ui/api/models/{second}/wake")
        assert (woken.status_code, woken.json()["has_begun"]) == (202, True), woken.text
        await until_residency(client, second, "resident")
        assert (await client.post(f"/ui/api/models/{second}/wake")).json()["message"] == f"'{second}' is ready already."
        reload = await client.post("/ui/api/reload")
        assert (reload.status_code, "serve deploy FILE" in reload.text) == (409, True)
        fresh = await client.post("/ui/api/plan", json={"model": "serve-app/demo", "max_model_len": 512})
        assert fresh.status_code == 200


async def until_residency(client: httpx.AsyncClient, name: str, state: str) -> None:
    """Waits until the replica of a model is in a state."""
    async with asyncio.timeout(60):
        while (await client.get("/ready")).json()["models"][name]["residency"] != [state]:  # noqa: ASYNC110
            await asyncio.sleep(0.2)


def test_no_death_costs_a_request_or_breaks_the_law(cluster: PoolOnNodes) -> None:
    """The keeper and replicas die by SIGKILL, while the leases are read all the time."""
    told = asyncio.run(run_rate(cluster, 150, 10.0, random.Random(5).sample(["keeper", "replica", "replica"], 3)))
    assert told["outcomes"] == {"right": 150}, told
    assert told["killed"] == {"keeper": 1, "replica": 2}
    assert told["law_held"], told
    assert told["most_leased"] > 0


def body(name: str, question: str) -> dict[str, object]:
    """A greedy question, streamed."""
    message = {"role": "user", "content": question}
    return {"model": name, "messages": [message], "temperature": 0, "max_tokens": 200, "stream": True}
