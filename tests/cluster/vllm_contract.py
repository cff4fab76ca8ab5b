"""Calls every part of a running vLLM that `serve_app/engines/vllm/vllm_internals.py` uses.

    python -m tests.cluster.vllm_contract

prints one JSON object: for each function its result, or the error that says what has changed. It starts an engine with
the demo model on the CPU, and kills it at the end.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import psutil

from serve_app.engines.vllm import vllm_internals
from serve_app.engines.vllm.engine import VllmEngine
from serve_app.engines.vllm.parking import VllmParking
from serve_app.errors import EngineError
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.replica.whole_body import WholeBody
from tests.builders import model_config

ROWS = 4
TIMEOUT_S = 30.0
# A text of so many tokens takes long enough to be met while it is made.
LONG = 1500
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


def shown_gauges() -> dict[str, int]:
    """How many samples each of the gauges has; none where vLLM calls it otherwise."""
    from prometheus_client import REGISTRY

    samples = {family.name: len(family.samples) for family in REGISTRY.collect()}
    return {name: samples.get(name, 0) for name in vllm_internals.gauges()}


async def tokens_of(http: httpx.AsyncClient) -> int:
    """Tokens of one answer."""
    answer = (await http.post("/v1/chat/completions", json=CHAT)).json()
    tokens: int = answer["usage"]["completion_tokens"]
    return tokens


async def sleep_within_a_text(client: Any, http: httpx.AsyncClient) -> dict[str, Any]:
    """What becomes of a text while the engine sleeps, which frees no memory on the CPU but takes the KV cache of all
    that runs."""
    body = {"model": "demo", "prompt": [5] * 20, "max_tokens": LONG, "temperature": 0, "ignore_eos": True}

    async def text() -> str:
        answer = (await http.post("/v1/completions", json=body)).json()
        return str(answer["choices"][0]["text"])

    lost: list[str] = []
    parking = VllmParking(client, lambda: lost.append("lost"))
    begin, expected = time.monotonic(), await text()
    took = time.monotonic() - begin
    asked = asyncio.create_task(text())
    await asyncio.sleep(took / 3)
    await parking.park()
    waits = not (await asyncio.wait({asked}, timeout=2 * took))[0]
    await vllm_internals.require_alive(client)
    later = asyncio.create_task(text())
    await parking.wake()
    return {
        "waits": waits,
        "same": [await asked, await later] == [expected] * 2,
        "preempted": preempted(),
        "lost": lost,
    }


def preempted() -> float:
    """How many sequences have lost their KV cache and were computed again."""
    from prometheus_client import REGISTRY

    samples = [sample for family in REGISTRY.collect() for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == "vllm:num_preemptions_total")


async def after_death(engine: VllmEngine, http: httpx.AsyncClient) -> dict[str, Any]:
    """What is raised, answered and told once the engine's process has been killed."""
    for child in psutil.Process().children(recursive=True):
        child.kill()
    raised = "nothing"
    async with asyncio.timeout(TIMEOUT_S):
        while raised == "nothing":
            try:
                await vllm_internals.require_alive(engine._client)
                await asyncio.sleep(0.1)
            except vllm_internals.engine_dead_error():
                raised = "engine_dead_error"
    status = (await http.post("/v1/chat/completions", json=CHAT)).status_code
    try:
        await engine.check_health()
        health = "well"
    except EngineError:
        health = "EngineError"
    return {"raised": raised, "status": status, "health": health, "should_exit": engine._server.should_exit}


async def calls() -> dict[str, Any]:
    """The results by the name of the function, in an order in which each finds what it needs."""
    config = model_config(
        model=model_path(DEMO_MODEL), infer_backend="vllm", device="cpu", dtype="float32", max_num_seqs=ROWS
    )
    engine = VllmEngine(config, "demo")
    app = WholeBody(await engine.start(), config)  # As the replica has it: the guard expects a body that was read.
    client = engine._client
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://vllm", timeout=TIMEOUT_S)

    async def at_once(call: Callable[[], Any]) -> Any:
        return call()

    async def memory() -> dict[str, int]:
        (rank,) = await engine.memory()
        return {"weights": rank.weights, "kv_cache": rank.kv_cache}

    asked: dict[str, Callable[[], Awaitable[Any]]] = {
        "server_application": lambda: tokens_of(http),
        "model_config": lambda: at_once(lambda: vllm_internals.model_config(client).max_model_len),
        "is_multimodal_model": lambda: at_once(lambda: vllm_internals.model_config(client).is_multimodal_model),
        "tokenizer": lambda: at_once(lambda: len(vllm_internals.tokenizer(client).get_vocab())),
        "most_rows": lambda: at_once(lambda: vllm_internals.most_rows(client)),
        "cache_blocks": lambda: at_once(lambda: vllm_internals.cache_blocks(client)),
        "gauges": lambda: at_once(shown_gauges),
        "ask_ranks": memory,
        "sleep": lambda: sleep_within_a_text(client, http),
        "require_alive": lambda: vllm_internals.require_alive(client),
        "engine_dead_error": lambda: after_death(engine, http),
    }
    results = {}
    for name, call in asked.items():
        try:
            results[name] = await call()
        except Exception as error:  # The next one is asked all the same.
            results[name] = f"{type(error).__name__}: {error}"
    await http.aclose()
    await engine.stop()
    return results


if __name__ == "__main__":
    print(json.dumps(asyncio.run(calls())))
