"""Six models on memory for two, on a cluster of which everything may die, and the law of leases beside it.

    python -m tests.cluster.served_pool [--requests 5000] [--rates 20 60] [--kill replica:4 keeper:3 node:1]
        [--models 4+2] [--room 2]

starts a head without CPUs for models and a worker, and serves the demo model six times, four times with pt and twice
with vLLM, in a pool that has room for two. Clients ask by name, by a Zipf mix, at one rate after the other. Meanwhile
processes die by SIGKILL, at random moments. It prints one JSON object for each rate: outcomes, waits and swaps, and
whether a recorder, which reads the leases from Ray's store all the time, has seen more than the budget.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from serve_app.byte_sizes import parse_bytes
from tests.cluster.conftest import model
from tests.cluster.nodes import RayCluster
from tests.cluster.serve_run import BIN
from tests.cluster.served_ranks import session_for
from tests.demo_answers import ANSWERS, QUESTIONS

# What one model takes of the pool is a little less, by its plan: pt 16 MiB and a cache, vLLM 124 MiB with its own.
EACH, PT_CACHE, VLLM_CACHE = 128 * 2**20, "108MiB", "4MiB"
MOST_TOKENS = 200
ZIPF = 1.1
TIMEOUT_S = 900.0
KEEPER, REPLICA = "ray::KeeperActor", "ray::ServeReplica:m"
# It reads all leases in Ray's store again and again, and prints the largest sum for each pool that it has seen.
RECORDER = """
import json, signal, sys, time
import ray
from serve_app.residency.lease_records import read_pools
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
most, reads, going = {}, 0, [True]
signal.signal(signal.SIGTERM, lambda *_: going.clear())
while going:
    try:
        for name, records in read_pools().items():
            sums = {}
            for record in records:
                for device, size in record["lease"].items():
                    sums[device] = sums.get(device, 0) + size
            most[name.node] = max([most.get(name.node, 0), *sums.values()])
        reads += 1
    except Exception as error:
        print(repr(error), file=sys.stderr)
    time.sleep(0.02)
print(json.dumps({"reads": reads, "most": most}))
"""


class PoolOnNodes(RayCluster):
    """It, with all models once loaded."""

    def __init__(self, pt: int = 4, vllm: int = 2, room: int = 2, workers: int = 1, **residency: Any) -> None:
        self.names = [f"m{number}" for number in range(pt + vllm)]
        self.budget = room * EACH
        own = {"min_resident_s": 1, "drain_s": 5, **residency}
        shared = {"policy": "swap", "pool_memory": {"cpu": f"{self.budget // 2**20}MiB", "disk": "2GiB"}, **own}
        # All that comes may have to wait while a model is away or its replica is replaced.
        bounds = {"max_held_requests": 5000, "max_waiting_requests": 5000, "hold_timeout_s": TIMEOUT_S}
        router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/", "args": bounds}
        served = []
        for number, name in enumerate(self.names):
            fields = {"infer_backend": "pt", "kv_cache_memory_bytes": PT_CACHE}
            if number >= pt:
                fields = {"infer_backend": "vllm", "kv_cache_memory_bytes": VLLM_CACHE}
            application = model(name, max_model_len=1024, residency=shared, num_cpus=0.5, **fields)
            application["runtime_env"] = {"env_vars": {"VLLM_LOGGING_LEVEL": "ERROR"}}
            served.append(application)
        assert parse_bytes(PT_CACHE, "") < EACH
        super().__init__({"applications": [router, *served]}, worker_cpus=[len(served)] * workers)
        self.wait_until_ready(600)

    def wait_until_ready(self, timeout_s: float = 300.0) -> None:
        """Until each model has been resident once. Raises TimeoutError."""
        self.wait_until(
            lambda models: (
                len(models) == len(self.names) and all(each["status"] == "ready" for each in models.values())
            ),
            timeout_s,
        )

    def pids(self, title: str) -> list[int]:
        """The processes whose command begins so."""
        return sorted(pid for pid, command in self.processes().items() if command.startswith(title))

    def record(self) -> "subprocess.Popen[str]":
        """Starts the recorder of leases."""
        return subprocess.Popen(
            [BIN / "python", "-c", RECORDER, self.gcs], env=self.environment, stdout=subprocess.PIPE, text=True
        )

    def end_one(self, what: str, draw: random.Random) -> bool:
        """One process of this kind, or the only worker, which another one replaces. Returns whether there was one."""
        if what == "node":
            number = draw.choice(list(self.workers))
            self.kill_worker(number)
            self.workers.pop(number)
            self.add_worker(number + 1, len(self.names))
            return True
        found = self.pids({"keeper": KEEPER, "replica": REPLICA}[what])
        if found:
            os.kill(draw.choice(found), signal.SIGKILL)
        return bool(found)


class Seen:
    """What clients have seen of one rate."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []

    def told(self) -> dict[str, Any]:
        """As it is printed."""
        waits = sorted(self.seconds)
        return {
            "outcomes": dict(self.outcomes),
            "answered_after_s": {
                "p50": round(statistics.median(waits), 2), "p99": round(waits[int(0.99 * len(waits))], 2),
                "most": round(waits[-1], 2),
            },
        }  # fmt: skip


async def ask(session: aiohttp.ClientSession, url: str, name: str, question: str, seen: Seen) -> None:
    """One greedy chat."""
    body = {
        "model": name, "messages": [{"role": "user", "content": question}], "temperature": 0,
        "max_tokens": MOST_TOKENS,
    }  # fmt: skip
    begin = time.monotonic()
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
            told = await reply.json(content_type=None)
            text = told["choices"][0]["message"]["content"] if reply.status == 200 else f"{reply.status} {told}"
            outcome = "right" if text == ANSWERS[question] and told["model"] == name else str(text)[:300]
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        outcome = f"{type(error).__name__}: {error}"
    seen.seconds.append(time.monotonic() - begin)
    seen.outcomes[outcome] += 1


async def load(cluster: PoolOnNodes, requests: int, rate: float, pick: Callable[[], str]) -> Seen:
    """So many requests, at random times with this mean number in a second. `pick` says for which model each is."""
    seen, draw, tasks = Seen(), random.Random(7), set[asyncio.Task[None]]()
    async with session_for(TIMEOUT_S) as session:
        for number in range(requests):
            question = QUESTIONS[number % len(QUESTIONS)]
            task = asyncio.create_task(ask(session, cluster.url, pick(), question, seen))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await asyncio.sleep(draw.expovariate(rate))
        await asyncio.gather(*tasks)
    return seen


def zipf(names: Sequence[str]) -> Callable[[], str]:
    """The n-th name comes with a probability of 1/n to the power of ZIPF."""
    draw, weights = random.Random(11), [1 / (number + 1) ** ZIPF for number in range(len(names))]
    return lambda: draw.choices(names, weights)[0]


async def trouble(cluster: PoolOnNodes, kills: Sequence[str], for_s: float) -> Counter[str]:
    """Kills them in a random order, evenly over the time."""
    draw, done = random.Random(13), Counter[str]()
    order = draw.sample(list(kills), len(kills))
    for what in order:
        await asyncio.sleep(for_s / (len(order) + 1))
        done[what] += await asyncio.to_thread(cluster.end_one, what, draw)
    return done


async def run_rate(cluster: PoolOnNodes, requests: int, rate: float, kills: Sequence[str]) -> dict[str, Any]:
    """The load of one rate, with its deaths and the recorder."""
    recorder = cluster.record()
    begin = time.monotonic()
    dying = asyncio.create_task(trouble(cluster, kills, requests / rate))
    seen = await load(cluster, requests, rate, zipf(cluster.names))
    took_s, killed = time.monotonic() - begin, await dying
    recorder.terminate()
    out, _ = await asyncio.to_thread(recorder.communicate, timeout=60)
    recorded = json.loads(out.splitlines()[-1])
    return {
        "rate": rate, "took_s": round(took_s, 1), "killed": dict(killed), **seen.told(),
        "budget": cluster.budget, "most_leased": max(recorded["most"].values(), default=0), "reads": recorded["reads"],
        "law_held": all(size <= cluster.budget for size in recorded["most"].values()),
    }  # fmt: skip


def main() -> None:
    """Prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument("--rates", type=float, nargs="+", default=[20.0, 60.0])
    parser.add_argument("--kill", nargs="*", default=["replica:4", "keeper:3", "node:1"])
    parser.add_argument("--models", default="4+2")
    parser.add_argument("--room", type=int, default=2)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    kills = [what for what, _, count in (item.partition(":") for item in options.kill) for _ in range(int(count or 1))]
    pt, vllm = map(int, options.models.split("+"))
    begin = time.monotonic()
    cluster = PoolOnNodes(pt, vllm, options.room)
    try:
        print(json.dumps({"ready_after_s": round(time.monotonic() - begin, 1)}), flush=True)
        for rate in options.rates:
            print(json.dumps(asyncio.run(run_rate(cluster, options.requests, rate, kills))), flush=True)
    finally:
        cluster.stop(signal.SIGTERM)
        cluster.clean_up()


if __name__ == "__main__":
    main()
