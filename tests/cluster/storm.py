"""Load on a model whose replicas are killed meanwhile: what every client got, beside what it should have got.

    python -m tests.cluster.storm --requests 2000 --clients 32 --kill-every 8 [--update-every 30] [--backend vllm]
    python -m tests.cluster.storm --requests 1000 --kill-every 8 --deaths mixed
    python -m tests.cluster.storm --requests 3000 --kill-every 20 --deaths hang

starts a Serve of its own with two replicas of the demo model, and prints one JSON object. Half of the requests are
chats, half text completions; all stream, and are greedy. `--update-every` gives `serve deploy` a changed config.
A replica dies at a random moment, once in so many seconds. `--deaths`: by SIGKILL, or its process lives on while the
thread of pt's engine dies or hangs (`faults.py`), or by SIGKILL and of its thread by turns. A hang is noticed after
HANG_TIMEOUT_S, as the config's `step_timeout_s` says: the default on the CPU is ten minutes.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster import faults
from tests.cluster.serve_run import ServeRun

QUESTIONS = (
    "What is serve-app?", "What is max_memory?", "What is a router?", "Who are you?", "What is Ray?", "What is vLLM?",
    "What is tensor parallelism?", "What is a replica?",
)  # fmt: skip
BODY_TIMEOUT_S = 10
# The defaults, but for what makes tests wait.
ROUTER_ARGS = {"first_byte_timeout_s": 240, "body_timeout_s": BODY_TIMEOUT_S}
TIMEOUT_S = 300
HANG_TIMEOUT_S = 8
DEATHS = {
    "sigkill": (signal.SIGKILL,), "thread": (faults.DIES,), "hang": (faults.HANGS,),
    "mixed": (signal.SIGKILL, faults.DIES),
}  # fmt: skip


def body_of(number: int, model: str) -> tuple[str, dict[str, Any]]:
    """Path and body of a request. A completion continues the start of an answer. To a bare question the demo model says
    a text whose tokens are not those that tokenizing the text gives, so a lost stream of it may go on otherwise."""
    question = QUESTIONS[number // 2 % len(QUESTIONS)]
    common = {"model": model, "temperature": 0, "stream": True}
    if number % 2:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return "/v1/completions", {**common, "prompt": prompt, "max_tokens": 24}
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


def serving_pids(serve: ServeRun, name: str) -> list[int]:
    """The processes of the replicas that have said that they are ready, and are still there."""
    alive = serve.processes()
    ready = re.findall(rf"ServeReplica:{name}:Model pid=(\d+)\) ready after", serve.output())
    return [int(pid) for pid in ready if int(pid) in alive]


async def kill_now_and_then(
    serve: ServeRun, name: str, every_s: float, kills: list[int], signals: Sequence[signal.Signals]
) -> None:
    """One replica that serves, by these signals in turn, at a random moment of each period. One that loads is left
    alone, or none would ever serve."""
    draw = random.Random(13)
    while True:
        moment = draw.uniform(0, every_s)
        await asyncio.sleep(moment)
        await kill_one(serve, name, kills, signals)
        await asyncio.sleep(every_s - moment)


async def kill_one(serve: ServeRun, name: str, kills: list[int], signals: Sequence[signal.Signals]) -> None:
    """A replica that serves, if there is one that has not been killed."""
    pids = await asyncio.to_thread(serving_pids, serve, name)
    if pids := [pid for pid in pids if pid not in kills]:  # One whose thread has died is still there.
        kills.append(pids[len(kills) % len(pids)])
        os.kill(kills[-1], signals[len(kills) % len(signals)])


async def update_now_and_then(serve: ServeRun, trouble: "Trouble", every_s: float, updates: list[int]) -> None:
    """A new version of the model by `serve deploy`: Serve replaces its replicas, some at a time."""
    while True:
        await asyncio.sleep(every_s)
        updates.append(64 - len(updates) % 2)
        await asyncio.to_thread(serve.deploy, config(trouble.backend, updates[-1], trouble.variables))


@dataclass(frozen=True)
class Trouble:
    """What happens meanwhile: a replica is killed, or the model replaced, every so many seconds. One is killed as
    well whenever so many requests have been answered as `kill_after` says, however fast that was."""

    kill_every_s: float | None = None
    kill_after: frozenset[int] = frozenset()
    update_every_s: float | None = None
    backend: str = "pt"
    deaths: str = "sigkill"
    variables: Mapping[str, str] = field(default_factory=dict)

    def start(self, serve: ServeRun, model: str) -> tuple[list[asyncio.Task[None]], list[int], list[int]]:
        """Its tasks, and the lists that they fill."""
        kills: list[int] = []
        updates: list[int] = []
        tasks = []
        if self.kill_every_s:
            tasks.append(
                asyncio.create_task(kill_now_and_then(serve, model, self.kill_every_s, kills, DEATHS[self.deaths]))
            )
        if self.update_every_s:
            tasks.append(asyncio.create_task(update_now_and_then(serve, self, self.update_every_s, updates)))
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
            if outcomes.total() in trouble.kill_after:
                await kill_one(serve, model, kills, DEATHS[trouble.deaths])

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


def config(
    backend: str = "pt", max_num_seqs: int = 32, variables: Mapping[str, str] | None = None, **fields: Any
) -> dict[str, Any]:
    """A router and two replicas of the demo model, with these variables in their environment, and these fields."""
    router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/", "args": ROUTER_ARGS}
    args = {"model": "serve-app/demo", "infer_backend": backend, "device": "cpu", "dtype": "float32"}
    args["body_timeout_s"] = BODY_TIMEOUT_S
    model = {
        "name": "mortal",
        "import_path": "serve_app.app:model",
        "route_prefix": "/models/mortal",
        "args": {**args, "max_num_seqs": max_num_seqs, **fields},
        "deployments": [{"name": "Model", "num_replicas": 2}],
        "runtime_env": {"env_vars": dict(variables or {})},
    }
    return {"applications": [router, model]}


def main() -> None:
    """Prints the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--kill-every", type=float)
    parser.add_argument("--update-every", type=float)
    parser.add_argument("--deaths", choices=tuple(DEATHS), default="sigkill")
    parser.add_argument("--backend", choices=("pt", "vllm"), default="pt")
    parser.add_argument("--without-haproxy", action="store_true")
    options = parser.parse_args()
    off = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    if options.backend != "pt" and options.deaths != "sigkill":
        parser.error("the faults of --deaths thread, hang and mixed are pt's alone")
    folder = tempfile.TemporaryDirectory(prefix="sa-faults-")
    variables = faults.environment(Path(folder.name)) if options.backend == "pt" else {}
    fields = {"step_timeout_s": HANG_TIMEOUT_S} if options.deaths == "hang" else {}
    serve = ServeRun(
        config(options.backend, variables=variables, **fields),
        cpus=8,
        controller=off if options.without_haproxy else {},
    )
    trouble = Trouble(options.kill_every, options.update_every, options.backend, options.deaths, variables)
    try:
        serve.wait_until(lambda models: models["mortal"]["replicas"] == 2)
        told = asyncio.run(storm(serve, "mortal", options.requests, options.clients, trouble))
        faulty = {what: len(faults.happened(Path(folder.name), what)) for what in ("died", "hung")}
        print(json.dumps(told | faulty))
    finally:
        serve.stop(signal.SIGTERM)
        serve.clean_up()
        folder.cleanup()


if __name__ == "__main__":
    main()
