"""Load that steps from 1 client to 64 and back, and a model that wakes from zero: do the stated times hold?

    python -m tests.cluster.load_steps [--clients 64] [--step-s 60]

Starts a Serve with one model that may have 1 to 3 replicas and one that may have none. Prints one JSON object:

- `steps`: requests and failures in each step, and when the second and third replica served after the load rose, and
  were gone after it fell. What is stated: Serve decides within `look_back_period_s` and the delay, and a replica then
  loads for as long as the first one did.
- `wake`: the seconds that a first request to a sleeping model waited, beside what `retry-after` told another client at
  that moment, and what `server-timing` and the router's metrics say of the wait. The first time no load was seen yet.
"""

import argparse
import asyncio
import json
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster.serve_run import ServeRun

UPSCALE_DELAY_S, DOWNSCALE_DELAY_S, LOOK_BACK_S, METRICS_INTERVAL_S = 3, 10, 4, 1
QUESTION = [{"role": "user", "content": "What is serve-app?"}]


def config() -> dict[str, Any]:
    """Both models; the sleeping one may hold one request, so that a second one is told to come back."""
    scaling = {
        "policy": {"policy_function": "serve_app.replica.autoscaling:by_engine_load"},
        "upscale_delay_s": UPSCALE_DELAY_S,
        "downscale_delay_s": DOWNSCALE_DELAY_S,
        "look_back_period_s": LOOK_BACK_S,
        "metrics_interval_s": METRICS_INTERVAL_S,
    }
    args: dict[str, Any] = {"model": "serve-app/demo", "infer_backend": "pt", "device": "cpu", "dtype": "float32"}
    args |= {"num_cpus": 0.5, "max_num_seqs": 16, "kv_cache_memory_bytes": "200MB"}

    def model(name: str, least: int, most: int) -> dict[str, Any]:
        options = {"name": "Model", "autoscaling_config": {**scaling, "min_replicas": least, "max_replicas": most}}
        path = {"import_path": "serve_app.app:model", "route_prefix": f"/models/{name}"}
        return {"name": name, **path, "args": args, "deployments": [options]}

    limits = {"max_held_requests": 1, "first_byte_timeout_s": 240}
    router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/", "args": limits}
    return {"applications": [router, model("steps", 1, 3), model("sleepy", 0, 1)]}


class Load:
    """So many clients that ask one after the other; the number can be changed."""

    def __init__(self, session: aiohttp.ClientSession):
        self._session = session
        self._tasks: list[asyncio.Task[None]] = []
        self._wanted = 0
        self.outcomes: Counter[str] = Counter()

    def set(self, clients: int) -> None:
        """Starts clients, or lets some end after the request that they wait for."""
        self._wanted = clients
        self._tasks = [task for task in self._tasks if not task.done()]
        for number in range(len(self._tasks), clients):
            self._tasks.append(asyncio.create_task(self._client(number)))

    async def _client(self, number: int) -> None:
        while number < self._wanted:
            body = {"model": "steps", "messages": QUESTION, "temperature": 0, "max_tokens": 64, "ignore_eos": True}
            try:
                async with self._session.post("/v1/chat/completions", json=body) as reply:
                    await reply.read()
                    self.outcomes[str(reply.status)] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                self.outcomes[type(error).__name__] += 1

    async def end(self) -> None:
        """Waits for all."""
        self.set(0)
        await asyncio.gather(*self._tasks)


async def replicas(session: aiohttp.ClientSession, model: str) -> int:
    """Those that run."""
    async with session.get("/ready") as reply:
        count: int = (await reply.json())["models"][model]["replicas"]
        return count


async def reached(
    session: aiohttp.ClientSession, model: str, timeout_s: float, least: int = 0, most: int = 99
) -> float | None:
    """Seconds until the model has so many replicas; None where it does not come to it."""
    started = time.monotonic()
    while time.monotonic() - started < timeout_s:
        if least <= await replicas(session, model) <= most:
            return round(time.monotonic() - started, 1)
        await asyncio.sleep(0.5)
    return None


async def steps(session: aiohttp.ClientSession, clients: int, step_s: float) -> dict[str, Any]:
    """1, many, 1; the load stays for `step_s` seconds after the replicas are there."""
    load = Load(session)
    told: dict[str, Any] = {}
    load.set(1)
    await asyncio.sleep(step_s / 2)
    told["with_one_client"] = {"replicas": await replicas(session, "steps"), **load.outcomes}
    load.outcomes.clear()
    load.set(clients)
    told["second_replica_after_s"] = await reached(session, "steps", 120, least=2)
    told["third_replica_after_s"] = await reached(session, "steps", 120, least=3)
    await asyncio.sleep(step_s)
    told["with_many_clients"] = dict(load.outcomes)
    load.outcomes.clear()
    load.set(1)
    told["back_to_one_after_s"] = await reached(session, "steps", 180, most=1)
    await load.end()
    return told | {"with_one_client_again": dict(load.outcomes)}


async def wake(session: aiohttp.ClientSession) -> dict[str, Any]:
    """One request that wakes the model, and another client that is told how long it takes."""
    body = {"model": "sleepy", "messages": QUESTION, "temperature": 0, "max_tokens": 4}
    started = time.monotonic()

    async def first() -> tuple[int, float, str]:
        async with session.post("/v1/chat/completions", json=body) as reply:
            await reply.read()
            return reply.status, time.monotonic() - started, reply.headers.get("server-timing", "")

    waiting = asyncio.create_task(first())
    await asyncio.sleep(0.3)
    async with session.post("/v1/chat/completions", json=body) as refused:
        told = {"second_client": refused.status, "retry_after_s": refused.headers.get("retry-after")}
    status, waited, timing = await waiting
    queued = re.search(r"queue;dur=([\d.]+)", timing)
    return {
        "status": status,
        "waited_s": round(waited, 2),
        "server_timing_queue_s": None if queued is None else round(float(queued[1]) / 1000, 2),
        **told,
    }


async def told_by_metrics(serve: ServeRun) -> dict[str, float]:
    """What Prometheus would read of the sleeping model: its last load's time, and the sum of its requests' waits."""
    wanted = {"ray_serve_app_load_time_seconds", "ray_serve_app_queue_time_seconds_sum"}
    found: dict[str, float] = {}
    for line in await asyncio.to_thread(serve.metrics):
        name, _, value = line.rpartition(" ")
        kind = name.partition("{")[0]
        if kind in wanted and 'model="sleepy"' in name:
            found[kind] = found.get(kind, 0.0) + float(value)
    return found


async def measure(serve: ServeRun, clients: int, step_s: float) -> dict[str, Any]:
    """All of it."""
    timeout, connector = aiohttp.ClientTimeout(total=300), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(serve.url, connector=connector, timeout=timeout) as session:
        told: dict[str, Any] = {"wake": []}
        for _ in range(3):
            assert await reached(session, "sleepy", 90, most=0) is not None
            await asyncio.sleep(2)
            told["wake"].append(await wake(session))
            await asyncio.sleep(12)  # Ray collects metrics every ten seconds.
            told["wake"][-1]["metrics"] = await told_by_metrics(serve)
        told["steps"] = await steps(session, clients, step_s)
    loads = [int(seconds) for seconds in re.findall(r"steps:Model pid=\d+\) ready after (\d+) s", serve.output())]
    return told | {"loads_s": loads, "stated": {"decided_within_s": LOOK_BACK_S + UPSCALE_DELAY_S}}


def main() -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--step-s", type=float, default=30)
    parser.add_argument("--keep-log", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    serve = ServeRun(config(), cpus=8)
    try:
        serve.wait_until(lambda told: told["steps"]["status"] == "ready" and told["sleepy"]["status"] == "asleep")
        print(json.dumps(asyncio.run(measure(serve, options.clients, options.step_s)), indent=1))
    finally:
        serve.stop(signal.SIGTERM)
        if options.keep_log is not None:
            options.keep_log.write_text(serve.output())
        serve.clean_up()


if __name__ == "__main__":
    main()
