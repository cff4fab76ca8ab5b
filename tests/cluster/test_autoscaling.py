"""Serve's autoscaling by the load that our replicas report."""

import asyncio
import time

import httpx

from tests.cluster.serve_run import ServeRun
from tests.cluster.test_serving import chat


async def replicas(client: httpx.AsyncClient) -> int:
    """Running replicas of the model `scaling`."""
    count: int = (await client.get("/ready")).json()["models"]["scaling"]["replicas"]
    return count


async def wait_for(client: httpx.AsyncClient, wanted: int, timeout_s: float) -> bool:
    """Whether the number of replicas becomes `wanted` in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if await replicas(client) == wanted:
            return True
        await asyncio.sleep(1)
    return False


async def test_replicas_rise_under_load_and_fall_after_it(run: ServeRun) -> None:
    """Eight endless requests are twice what one engine holds, so a second replica comes; without them it goes again."""
    body = chat("scaling", "Hello", max_tokens=1500, ignore_eos=True)
    async with httpx.AsyncClient(base_url=run.url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        assert await wait_for(client, 1, timeout_s=90)
        loading = True
        refusals: list[str] = []

        async def keep_asking() -> None:
            while loading:
                reply = await client.post("/v1/chat/completions", json=body)
                if reply.status_code != 200:
                    refusals.append(reply.text)

        load = [asyncio.create_task(keep_asking()) for _ in range(8)]
        try:
            rose = await wait_for(client, 2, timeout_s=120)
        finally:
            loading = False
            for task in load:
                task.cancel()
            await asyncio.gather(*load, return_exceptions=True)
        assert not refusals
        assert rose, "the second replica did not come"
        assert await wait_for(client, 1, timeout_s=120), "the second replica did not go"
