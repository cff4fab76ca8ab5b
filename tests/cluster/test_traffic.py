"""Traffic that goes wrong, on a Serve of its own with API keys: replicas die, clients vanish, keys are missing."""

import asyncio
import random
from collections.abc import Iterator

import aiohttp
import httpx
import pytest

from tests.cluster.serve_run import ServeRun
from tests.cluster.storm import Trouble, config, storm

KEY = "sk-test-of-the-cluster"
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def serve() -> Iterator[ServeRun]:
    """A router and two replicas of the demo model."""
    run = ServeRun(config(), cpus=4, controller={"SERVE_APP_API_KEYS": KEY}, headers=HEADERS)
    try:
        run.wait_until(lambda models: models["mortal"]["replicas"] == 2)
        yield run
        assert not run.stop()
    finally:
        run.clean_up()


def test_nothing_but_health_answers_without_a_key(serve: ServeRun) -> None:
    """By name and by route, paths that do not exist too."""
    paths = ["/ready", "/v1/models", "/v1/models/mortal", "/docs", "/openapi.json", "/metrics", "/nothing"]
    paths += [f"/models/mortal{path}" for path in [*paths, "/tokenize", "/v1/chat/completions", "/load"]]
    bodies = {"model": "mortal", "prompt": "x"}
    with httpx.Client(base_url=serve.url, timeout=30) as client:
        for path in paths:
            assert client.get(path).status_code == 401, path
            assert client.post(path, json=bodies).status_code == 401, path
            wrong = client.post(path, json=bodies, headers={"authorization": "Bearer sk-wrong"})
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key"), path
        assert client.get("/health").status_code == 200
        assert client.get("/models/mortal/health").status_code == 200
        assert client.get("/v1/models", headers=HEADERS).status_code == 200
        reply = client.post("/v1/completions", json={**bodies, "max_tokens": 2}, headers=HEADERS)
        assert reply.status_code == 200
        assert client.post("/models/mortal/v1/completions", json=bodies, headers=HEADERS).status_code == 200


async def test_clients_that_vanish_leave_nothing_behind(serve: ServeRun) -> None:
    """By name and by route, streaming and not, at random moments: no engine holds a row afterwards."""
    draw = random.Random(1)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base_url=serve.url, connector=connector, headers=HEADERS) as session:

        async def vanish(number: int) -> None:
            body = {"model": "mortal", "prompt": "Tell me", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
            path = "/v1/completions" if number % 2 else "/models/mortal/v1/completions"
            try:
                async with asyncio.timeout(draw.uniform(0.01, 2.0)):
                    async with session.post(path, json={**body, "stream": number % 3 != 0}) as reply:
                        await reply.read()
            except (TimeoutError, aiohttp.ClientError):
                pass

        for _ in range(4):
            await asyncio.gather(*(vanish(number) for number in range(50)))
        for _ in range(60):  # Both replicas: the route takes the one with fewer connections, in turns.
            loads = []
            for _ in range(6):
                async with session.get("/models/mortal/load") as reply:
                    loads.append((await reply.json())["server_load"])
            if not any(loads):
                break
            await asyncio.sleep(0.5)
    assert not any(loads)


async def test_streams_survive_the_death_of_their_replicas(serve: ServeRun) -> None:
    """Every request completes, with the text, the one id and the one end of an undisturbed run."""
    told = await storm(serve, "mortal", requests=400, clients=32, trouble=Trouble(kill_every_s=2.0), headers=HEADERS)
    assert told["outcomes"] == {"right": 400}
    assert told["kills"] >= 1
