"""One replica of vLLM over two nodes, which are raylets of one machine, and the death of a node.

    python -m tests.cluster.served_nodes [--layers 1+3] [--kill rank:0 node:1 …]

starts a head without CPUs for models and two workers, and serves the demo model with one stage on each. It prints one
JSON object for each step: the answers by name and by route, streamed and 32 at once; then for each kill, with SIGKILL
while clients ask all the time, what they saw, and the answers after it. A node is killed by its raylet. Then it also
prints what `serve-app status` said without the node, before another one came.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import aiohttp
import psutil

from tests.cluster.conftest import model
from tests.cluster.nodes import RayCluster
from tests.cluster.ranks import AT_ONCE, CACHE
from tests.cluster.served_ranks import CLIENTS, HEALTH_CHECK_PERIOD_S, NAME, WAYS, outcome, session_for
from tests.demo_answers import QUESTIONS

LAYERS = "1+3"
# The title of a rank's process, which is known by the order of the pids.
RANK = "ray::NodeRank"
VICTIMS = ("rank:0", "rank:1", "engine", "replica", "node:other", "node:own")
# Ray takes a node for dead after five failed calls to its raylet. A dead one fails each at once, and a slow one has ten
# seconds for each as before, so a short period only takes the waiting away.
SETTINGS = {"RAY_health_check_period_ms": "500"}
MISSING = "A replica needs 1 CPU and 1 CPU on 2 nodes"


class TwoNodes(RayCluster):
    """A cluster with one CPU on each of two workers, and one replica that takes both."""

    def __init__(self, layers: str = LAYERS) -> None:
        split = [int(count) for count in layers.split("+")]
        router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
        served = model(
            NAME, infer_backend="vllm", kv_cache_memory_bytes=CACHE, max_model_len=1024, pipeline_layers=split,
            nnodes=2, num_cpus=1,
        )  # fmt: skip
        served["deployments"] = [{"name": "Model", "health_check_period_s": HEALTH_CHECK_PERIOD_S}]
        served["runtime_env"] = {"env_vars": {"VLLM_LOGGING_LEVEL": "ERROR"}}
        self._gone: list[subprocess.Popen[bytes]] = []
        super().__init__({"applications": [router, served]}, worker_cpus=[1, 1], settings=SETTINGS)
        self.wait_until_ready()

    def clean_up(self) -> None:
        """Ends what is left, and waits for the processes that were started here."""
        super().clean_up()
        for process in (*self._gone, *self.workers.values()):
            process.wait(timeout=60)

    def wait_until_ready(self, timeout_s: float = 300.0) -> None:
        """Until the model serves. Raises TimeoutError."""
        self.wait_until(lambda models: NAME in models and models[NAME]["status"] == "ready", timeout_s)

    def lose(self, victim: str) -> dict[str, Any]:
        """Kills a node or a process, and returns when the model serves again with other ranks. Without a node it
        returns what status said, before it adds another node."""
        before, told = self.ranks(), {}
        if victim.startswith("node:"):
            own = self._worker_of(self.pid_of("replica"))
            number = own if victim == "node:own" else next(each for each in self.workers if each != own)
            self.kill_worker(number)
            told["status"] = self._status_without()
            self._gone.append(self.workers.pop(number))
            self.add_worker(max(self.workers) + number + 1, 1)
        else:
            os.kill(self.pid_of(victim), signal.SIGKILL)
        deadline = time.monotonic() + 300.0
        while len(now := self.ranks()) < len(before) or now & before:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the ranks {before} became {now} after the death of {victim}")
            time.sleep(0.2)
        self.wait_until_ready()
        return told

    def ranks(self) -> set[int]:
        """The processes of vLLM's ranks."""
        return {pid for pid, command in self.processes().items() if command.startswith(RANK)}

    def pid_of(self, victim: str) -> int:
        """The process of a rank, of vLLM's engine or of the replica."""
        kind, _, number = victim.partition(":")
        title = {"rank": RANK, "engine": "VLLM::EngineCore", "replica": "ray::ServeReplica:ranked"}[kind]
        found = sorted(pid for pid, command in self.processes().items() if command.startswith(title))
        return found[int(number or 0)]

    def _worker_of(self, pid: int) -> int:
        """The worker on which a process runs, whose raylet has started it."""
        parents = {parent.pid for parent in psutil.Process(pid).parents()}
        return next(number for number, worker in self.workers.items() if worker.pid in parents)

    def _status_without(self, timeout_s: float = 120.0) -> list[str]:
        deadline = time.monotonic() + timeout_s
        while True:
            lines: list[str] = self.status_text()["lines"]
            if any(MISSING in line for line in lines):
                return lines
            if time.monotonic() > deadline:
                raise TimeoutError("\n".join(lines))
            time.sleep(1)


async def answers(cluster: TwoNodes) -> dict[str, dict[str, int]]:
    """What clients saw by name and by route: a client of each way that asks one question after the other, streamed and
    not, and then so many at once."""

    async def client(session: aiohttp.ClientSession, url: str) -> list[str]:
        return [await outcome(session, url, question, streamed) for question in QUESTIONS for streamed in (0, 1)]

    told = {}
    async with session_for() as session:
        urls = {way: cluster.url + path for way, path in WAYS.items()}
        seen = await asyncio.gather(*(client(session, url) for url in urls.values()))
        for (way, url), one in zip(urls.items(), seen, strict=True):
            asked = (outcome(session, url, QUESTIONS[n % len(QUESTIONS)], n % 2 == 0) for n in range(AT_ONCE))
            told[way] = dict(Counter([*one, *await asyncio.gather(*asked)]))
    return told


async def death(cluster: TwoNodes, victim: str) -> dict[str, Any]:
    """What clients by name saw while a node or a process died, and how long it took until the model served again."""
    is_over = asyncio.Event()
    seen: Counter[str] = Counter()

    async def client(first: int) -> None:
        async with session_for() as session:
            while not is_over.is_set():
                first += 1
                seen[await outcome(session, cluster.url, QUESTIONS[first % len(QUESTIONS)], first % 2 == 0)] += 1

    clients = [asyncio.create_task(client(first)) for first in range(CLIENTS)]
    await asyncio.sleep(3)
    started = time.monotonic()
    told = await asyncio.to_thread(cluster.lose, victim)
    back_after_s = time.monotonic() - started
    await asyncio.sleep(3)
    is_over.set()
    await asyncio.gather(*clients)
    return {**told, "seen": dict(seen), "back_after_s": round(back_after_s, 1)}


def main() -> None:
    """Prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=LAYERS)
    parser.add_argument("--kill", nargs="*", default=VICTIMS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    cluster = TwoNodes(options.layers)
    try:
        print(json.dumps({"start": asyncio.run(answers(cluster))}), flush=True)
        for victim in options.kill:
            told = asyncio.run(death(cluster, victim))
            print(json.dumps({victim: told, "after": asyncio.run(answers(cluster))}), flush=True)
    finally:
        cluster.stop(signal.SIGTERM)
        cluster.clean_up()
    print(json.dumps({"left behind": cluster.processes()}))


if __name__ == "__main__":
    main()
