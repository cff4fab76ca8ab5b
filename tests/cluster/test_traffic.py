"""Traffic that goes wrong, on a Serve with API keys: replicas die, clients vanish, keys are missing."""

import asyncio
import contextlib
import random

import aiohttp
import httpx
import psutil
import pytest

from tests.cluster import hostile
from tests.cluster.contract import HEADERS, KEY, document_of, without_key
from tests.cluster.mortal import MortalServe
from tests.cluster.serve_run import ServeRun
from tests.cluster.storm import Trouble, storm


@pytest.fixture
def serve(mortal: MortalServe) -> MortalServe:
    """With both replicas, whatever a test before has killed."""
    mortal.wait_for_both()
    return mortal


def test_nothing_but_health_answers_without_a_key(serve: MortalServe) -> None:
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
        for url in (serve.url, f"{serve.url}/models/mortal"):  # vLLM's document: `python -m tests.cluster.contract`.
            seen = without_key(url, document_of(url))
            assert {operation for operation, status in seen.items() if status != 401} == {"GET /health"}, seen
        reply = client.post("/v1/completions", json={**bodies, "max_tokens": 2}, headers=HEADERS)
        assert reply.status_code == 200
        assert client.post("/models/mortal/v1/completions", json=bodies, headers=HEADERS).status_code == 200


def memory_of(serve: ServeRun, *parts: str) -> dict[str, float]:
    """MB of the processes whose command has one of these in it."""
    found: dict[str, float] = {}
    for pid, command in serve.processes().items():
        for part in parts:
            with contextlib.suppress(psutil.Error):
                if part in command:
                    found[part] = found.get(part, 0.0) + psutil.Process(pid).memory_info().rss / 1e6
    return found


async def idle(session: aiohttp.ClientSession) -> bool:
    """Whether, within half a minute, no engine holds a row. The route takes the replica with fewer connections."""
    loads = [1]
    for _ in range(60):
        loads = []
        for _ in range(6):
            async with session.get("/models/mortal/load") as reply:
                loads.append((await reply.json())["server_load"])
        if not any(loads):
            break
        await asyncio.sleep(0.5)
    return not any(loads)


ROUTES = ("", "/models/mortal")
PARTS = ("ServeReplica:router", "ServeReplica:mortal", "haproxy")


async def test_hostile_clients_are_refused_and_hurt_nobody(serve: MortalServe) -> None:
    """By name and by route: 200 that send a byte a second, 200 that read one, bodies of 100 MB, ten thousand headers.
    Each gets a clear error, others are answered meanwhile, and the memory stays where it was."""
    body = {"model": "mortal", "prompt": "Tell me", "max_tokens": 64, "ignore_eos": True, "temperature": 0}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base_url=serve.url, connector=connector, headers=HEADERS) as session:
        async with session.post("/v1/completions", json=body) as reply:
            assert reply.status == 200
        before = memory_of(serve, *PARTS)
        slow = [asyncio.create_task(hostile.slow_sender(serve.port, ROUTES[number % 2], KEY)) for number in range(200)]
        reading = [
            asyncio.create_task(
                hostile.slow_reader(serve.port, ROUTES[number % 2], KEY, {**body, "stream": True}, seconds=15)
            )
            for number in range(200)
        ]
        for route in ROUTES:
            for declared in (True, False):
                status, said = await hostile.large_body(serve.port, route, KEY, declared)
                assert (status, b"request_too_large" in said) == (413, True), (route, declared, said[:300])
            status, said = await hostile.many_headers(serve.port, route, KEY)
            assert status == 400, said[:300]
            async with session.post(f"{route}/v1/completions", json={**body, "max_tokens": 4}) as reply:
                assert reply.status == 200
        answers = await asyncio.gather(*slow)
        assert {status for status, _ in answers} == {408}
        assert all(b"body_timeout_s" in said for _, said in answers)
        assert min(await asyncio.gather(*reading)) == 15
        assert await idle(session)
    after = memory_of(serve, *PARTS)
    assert all(after[part] < before[part] + 100 for part in PARTS), (before, after)


async def test_clients_that_vanish_leave_nothing_behind(serve: MortalServe) -> None:
    """500, by name and by route, streaming and not, at random moments: afterwards no engine holds a row, nothing waits,
    and the memory is where it was."""
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

        for _ in range(6):  # Allocators reach their size: of 250 requests the first add 19 MB, the fourth ones 7.
            await asyncio.gather(*(vanish(number) for number in range(50)))
        assert await idle(session)
        before = memory_of(serve, *PARTS)
        for _ in range(10):
            await asyncio.gather(*(vanish(number) for number in range(50)))
        assert await idle(session)
        async with session.get("/ready") as reply:
            told = (await reply.json())["models"]["mortal"]
        assert (told["waiting"], told["held"]) == (0, 0)
    after = memory_of(serve, *PARTS)
    # MB, of all processes of a kind together; 5 % is what two replicas' allocators still move by.
    assert all(after[part] < before[part] + max(50, 0.05 * before[part]) for part in PARTS), (before, after)


def test_an_update_that_cannot_be_built_leaves_what_runs(serve: MortalServe) -> None:
    """Serve's status then knows of no replica; they answer all the same, and the reason is told."""
    wrong = serve.config()
    wrong["applications"][1]["args"]["max_seqs"] = 8
    serve.deploy(wrong)
    told = serve.wait_until(lambda models: models["mortal"]["message"], timeout_s=60)["mortal"]
    assert (told["status"], told["replicas"], "max_num_seqs" in told["message"]) == ("ready", 2, True)
    body = {"model": "mortal", "prompt": "x", "max_tokens": 2}
    assert httpx.post(f"{serve.url}/v1/completions", json=body, headers=HEADERS, timeout=30).status_code == 200
    before = set(serve.processes())
    serve.deploy(serve.config())
    serve.wait_until(lambda models: not models["mortal"]["message"], timeout_s=60)
    assert {pid for pid, command in serve.processes().items() if "ServeReplica" in command} <= before


async def test_streams_survive_the_death_of_their_replicas(serve: MortalServe) -> None:
    """Every request completes, with the text, the one id and the one end of an undisturbed run."""
    told = await storm(serve, "mortal", requests=400, clients=32, trouble=Trouble(kill_every_s=6.0), headers=HEADERS)
    assert told["outcomes"] == {"right": 400}
    assert told["kills"] >= 1
