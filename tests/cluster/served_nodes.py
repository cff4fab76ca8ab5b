"""One replica of vLLM over two nodes, which are raylets of one machine, and the death of a node.

    python -m tests.cluster.served_nodes [--kill 0|1]

starts a head without CPUs for models and two workers, and serves the demo model with one stage on each. It prints one
JSON object: the answers by name and by route, streamed and 32 at once; then, while clients ask all the time, the raylet
of a worker is killed with SIGKILL: what they saw, what `serve-app status` said without the node, and the answers after
another node has come.
"""

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import Counter
from typing import Any

from tests.cluster.conftest import model
from tests.cluster.nodes import RayCluster
from tests.cluster.ranks import AT_ONCE, CACHE
from tests.cluster.served_ranks import CLIENTS, NAME, WAYS, outcome, session_for
from tests.demo_answers import QUESTIONS

LAYERS = [1, 3]
MISSING = "A replica needs 1 CPU and 1 CPU on 2 nodes"


class TwoNodes(RayCluster):
    """A cluster with one CPU on each of two workers, and one replica that takes both."""

    def __init__(self) -> None:
        router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
        served = model(
            NAME, infer_backend="vllm", kv_cache_memory_bytes=CACHE, max_model_len=1024, pipeline_layers=LAYERS,
            nnodes=2, num_cpus=1,
        )  # fmt: skip
        served["runtime_env"] = {"env_vars": {"VLLM_LOGGING_LEVEL": "ERROR"}}
        super().__init__({"applications": [router, served]}, worker_cpus=[1, 1])
        self.wait_until_ready()

    def wait_until_ready(self, timeout_s: float = 300.0) -> None:
        """Until the model serves. Raises TimeoutError."""
        self.wait_until(lambda models: NAME in models and models[NAME]["status"] == "ready", timeout_s)

    def nodes_of_ranks(self) -> list[str]:
        """The raylet of each of vLLM's ranks, as a pid, in any order."""
        found = []
        for number in self.workers:
            found += [str(number) for title in self.titles_on(number) if "NodeRank" in title]
        return found


async def answers(cluster: TwoNodes) -> dict[str, dict[str, int]]:
    """What clients saw by name and by route: one after the other, streamed, and so many at once."""
    told = {}
    async with session_for() as session:
        for way, path in WAYS.items():
            url = cluster.url + path
            seen = [await outcome(session, url, question, streamed) for question in QUESTIONS for streamed in (0, 1)]
            asked = (outcome(session, url, QUESTIONS[n % len(QUESTIONS)], n % 2 == 0) for n in range(AT_ONCE))
            told[way] = dict(Counter([*seen, *await asyncio.gather(*asked)]))
    return told


async def node_death(cluster: TwoNodes, number: int) -> dict[str, Any]:
    """What clients by name saw while a worker died and another came, and what status said without it."""
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
    await asyncio.to_thread(cluster.kill_worker, number)
    status = await asyncio.to_thread(_status_without, cluster)
    missing_after_s = time.monotonic() - started
    await asyncio.to_thread(cluster.add_worker, 2, 1)
    await asyncio.to_thread(cluster.wait_until_ready)
    back_after_s = time.monotonic() - started
    await asyncio.sleep(3)
    is_over.set()
    await asyncio.gather(*clients)
    return {
        "seen": dict(seen), "status": status, "status_after_s": round(missing_after_s, 1),
        "back_after_s": round(back_after_s, 1),
    }  # fmt: skip


def _status_without(cluster: TwoNodes, timeout_s: float = 120.0) -> list[str]:
    """The lines of status once they say what is missing. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while True:
        lines: list[str] = cluster.status_text()["lines"]
        if any(MISSING in line for line in lines):
            return lines
        if time.monotonic() > deadline:
            raise TimeoutError("\n".join(lines))
        time.sleep(1)


def main() -> None:
    """Prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    cluster = TwoNodes()
    try:
        told: dict[str, Any] = {"before": asyncio.run(answers(cluster))}
        print(json.dumps(told, indent=1), flush=True)
        told = {"death": asyncio.run(node_death(cluster, options.kill))}
        told |= {"after": asyncio.run(answers(cluster))}
        print(json.dumps(told, indent=1))
    finally:
        cluster.stop(signal.SIGTERM)
        cluster.clean_up()


if __name__ == "__main__":
    main()
