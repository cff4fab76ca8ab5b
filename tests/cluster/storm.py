"""Load on a model whose replicas are killed meanwhile: what every client got, beside what it should have got.

    python -m tests.cluster.storm --requests 2000 --clients 32 --kill-every 8 [--update-every 30] [--backend vllm]

starts a Serve of its own with two replicas of the demo model, and prints one JSON object. Half of the requests are
chats, half text completions; all stream, and are greedy. `--update-every` gives `serve deploy` a changed config.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.cluster.serve_run import ServeRun

QUESTIONS = (
    "What is serve-app?", "What is max_memory?", "What is a router?", "Who are you?", "What is Ray?", "What is vLLM?",
    "What is tensor parallelism?", "What is a replica?",
)  # fmt: skip
BODY_TIMEOUT_S = 10
# The defaults, but for what makes tests wait.
ROUTER_ARGS = {"first_byte_timeout_s": 240, "body_timeout_s": BODY_TIMEOUT_S}
TIMEOUT_S = 300


def body_of(number: int, model: str) -> tuple[str, dict[str, Any]]:
    """Path and body of a request."""
    question = QUESTIONS[number // 2 % len(QUESTIONS)]
    common = {"model": model, "temperature": 0, "stream": True}
    if number % 2:
        return "/v1/completions", {**common, "prompt": question, "max_tokens": 24}
    return "/v1/chat/completions", {**common, "messages": [{"role": "user", "content": question}]}


async def ask(session: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a client sees of one stream: its text, its ids, and how it ended."""
    seen: dict[str, Any] = {"text": "", "ids": set(), "ends": 0, "error": None}
    try:
        async with session.post(url + path, json=body) as reply:
            if reply.status != 200:
                return seen | {"error": f"{reply.status} {(await reply.text())[:200]}"}
            async for line in reply.content:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    seen["ends"] += 1
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return seen | {"error": event["error"]["message"]}
                seen["ids"].add(event["id"])
                for choice in event["choices"]:
                    seen["text"] += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    return seen


async def kill_now_and_then(serve: ServeRun, name: str, every_s: float, kills: list[int]) -> None:
    """One replica that serves, with SIGKILL. One that loads is left alone, or none would ever serve."""
    ready = re.compile(rf"ServeReplica:{name}:Model pid=(\d+)\) ready after")
    while True:
        await asyncio.sleep(every_s)
        alive = await asyncio.to_thread(serve.processes)
        pids = [int(pid) for pid in ready.findall(serve.output()) if int(pid) in alive]
        if pids:
            kills.append(pids[len(kills) % len(pids)])
            os.kill(kills[-1], signal.SIGKILL)


async def update_now_and_then(serve: ServeRun, backend: str, every_s: float, updates: list[int]) -> None:
    """A new version of the model by `serve deploy`: Serve replaces its replicas, some at a time."""
    while True:
        await asyncio.sleep(every_s)
        updates.append(64 - len(updates) % 2)
        await asyncio.to_thread(serve.deploy, config(backend, max_num_seqs=updates[-1]))


@dataclass(frozen=True)
class Trouble:
    """What happens meanwhile: a replica is killed, or the model replaced, every so many seconds."""

    kill_every_s: float | None = None
    update_every_s: float | None = None
    backend: str = "pt"

    def start(self, serve: ServeRun, model: str) -> tuple[list[asyncio.Task[None]], list[int], list[int]]:
        """Its tasks, and the lists that they fill."""
        kills: list[int] = []
        updates: list[int] = []
        tasks = []
        if self.kill_every_s:
            tasks.append(asyncio.create_task(kill_now_and_then(serve, model, self.kill_every_s, kills)))
        if self.update_every_s:
            tasks.append(asyncio.create_task(update_now_and_then(serve, self.backend, self.update_every_s, updates)))
        return tasks, kills, updates


async def storm(
    serve: ServeRun,
    model: str,
    requests: int,
    clients: int,
    trouble: Trouble,
    headers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Sends the requests, so many at a time. Compares each text with the one that an undisturbed request got."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        expected = {}
        for number in range(2 * len(QUESTIONS)):
            path, body = body_of(number, model)
            expected[json.dumps(body)] = (await ask(session, serve.url, path, body))["text"]
        tasks, kills, updates = trouble.start(serve, model)
        gate = asyncio.Semaphore(clients)
        outcomes: Counter[str] = Counter()

        async def one(number: int) -> None:
            path, body = body_of(number, model)
            async with gate:
                seen = await ask(session, serve.url, path, body)
            outcomes[outcome_of(seen, expected[json.dumps(body)])] += 1

        start = time.monotonic()
        await asyncio.gather(*(one(number) for number in range(requests)))
        for task in tasks:
            task.cancel()
    seconds = round(time.monotonic() - start, 1)
    return {"outcomes": dict(outcomes), "kills": len(kills), "updates": len(updates), "seconds": seconds}


def outcome_of(seen: dict[str, Any], expected: str) -> str:
    """In words."""
    if seen["error"]:
        return f"error: {seen['error'][:120]}"
    if seen["text"] != expected:
        return f"other text: {seen['text'][:80]!r}"
    return "right" if seen["ends"] == 1 and len(seen["ids"]) == 1 else "several ids or ends"


def config(backend: str = "pt", max_num_seqs: int = 32) -> dict[str, Any]:
    """A router and two replicas of the demo model."""
    router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/", "args": ROUTER_ARGS}
    args = {"model": "serve-app/demo", "infer_backend": backend, "device": "cpu", "dtype": "float32"}
    args["body_timeout_s"] = BODY_TIMEOUT_S
    model = {
        "name": "mortal",
        "import_path": "serve_app.app:model",
        "route_prefix": "/models/mortal",
        "args": {**args, "max_num_seqs": max_num_seqs},
        "deployments": [{"name": "Model", "num_replicas": 2}],
    }
    return {"applications": [router, model]}


def main() -> None:
    """Prints the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--kill-every", type=float)
    parser.add_argument("--update-every", type=float)
    parser.add_argument("--backend", choices=("pt", "vllm"), default="pt")
    parser.add_argument("--without-haproxy", action="store_true")
    options = parser.parse_args()
    off = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    serve = ServeRun(config(options.backend), cpus=8, controller=off if options.without_haproxy else {})
    trouble = Trouble(options.kill_every, options.update_every, options.backend)
    try:
        serve.wait_until(lambda models: models["mortal"]["replicas"] == 2)
        print(json.dumps(asyncio.run(storm(serve, "mortal", options.requests, options.clients, trouble))))
    finally:
        serve.stop(signal.SIGTERM)
        serve.clean_up()


if __name__ == "__main__":
    main()
