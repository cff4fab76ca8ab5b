"""Starts and stops a vLLM engine that swaps, twice in one process, and measures how long the event loop stands still.

    python -m tests.cluster.vllm_swap

prints one JSON object for each life of the engine: the seconds of its start and of its stop, the longest gap between
two ticks of the loop in each, the tokens of an answer, and the commands of the processes that are left after the stop.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psutil

from serve_app.engines.vllm.engine import VllmEngine
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.replica.whole_body import WholeBody
from tests.builders import model_config
from tests.cluster.vllm_contract import TIMEOUT_S, tokens_of

TICK_S = 0.05
LIVES = 2


@asynccontextmanager
async def ticking(seen: dict[str, Any], what: str) -> AsyncIterator[None]:
    """Notes the seconds of what happens inside, and the longest time in which the loop ran nothing else."""
    longest, begin = 0.0, time.monotonic()

    async def tick() -> None:
        nonlocal longest
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            longest, last = max(longest, now - last - TICK_S), now

    task = asyncio.create_task(tick())
    await asyncio.sleep(0)
    try:
        yield
        await asyncio.sleep(2 * TICK_S)  # The last tick measures what came before it.
    finally:
        task.cancel()
        seen[f"{what}_gap_s"], seen[f"{what}_s"] = longest, time.monotonic() - begin


def engine_processes() -> list[str]:
    """The commands of the processes of engines. Python's own resource tracker stays as long as this process."""
    children = psutil.Process().children(recursive=True)
    alive = [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    commands = [" ".join(child.cmdline()) for child in alive]
    return [command for command in commands if "resource_tracker" not in command]


async def life() -> dict[str, Any]:
    """One start, one answer and one stop."""
    seen: dict[str, Any] = {}
    config = model_config(
        model=model_path(DEMO_MODEL), infer_backend="vllm", device="cpu", dtype="float32", max_num_seqs=4,
        residency={"policy": "swap", "pool_memory": {"cpu": "8GiB"}},
    )  # fmt: skip
    engine = VllmEngine(config, "demo")
    async with ticking(seen, "start"):
        app = WholeBody(await engine.start(), config)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=TIMEOUT_S) as http:
        seen["tokens"] = await tokens_of(http)
    await engine.check_health()
    async with ticking(seen, "stop"):
        await engine.stop()
    seen["left"] = engine_processes()
    return seen


async def main() -> None:
    """Prints a line for each life."""
    for _ in range(LIVES):
        print(json.dumps(await life()), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
