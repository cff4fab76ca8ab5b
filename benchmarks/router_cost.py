"""What the router itself costs, with a model that computes nothing: echo requests and paced streams.

    python -m benchmarks.router_cost [--applications 1,20,200] [--streams 32,128,512] [--clients 8,64] [--rounds 3]

Three ways in turns: the mock in a bare uvicorn, the same mock as a model of this Serve by route, and by name. Echo
requests: requests per second. Paced streams: every stream gets a chunk each 20 ms, and each chunk says when it left, so
the latency that is printed is the chunk's own (p50 and p99). Both: CPU milliseconds of the router per request or chunk.
`--applications` registers so many models in all; all but the one that is asked have no replica.
Prints one line of JSON for each.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.ingress import SHIPPED, free_port, process, router_cpu_s, serve_environment, wait_for

EVERY_MS = 20
LEFT = re.compile(rb'"left":(\d+)')


@contextlib.contextmanager
def serving(folder: Path, port: int) -> Iterator[None]:
    """A Serve with the shipped settings, the router and one mock, in a Ray of its own."""
    os.environ.update(serve_environment(folder))
    os.environ.update({key: os.path.expandvars(value) for key, value in SHIPPED.items()})
    import ray  # Serve reads its variables when it is imported.
    from ray import serve

    from benchmarks.mock_model import application
    from serve_app.app import router

    ray.init(address="local", num_cpus=4, include_dashboard=False, namespace="serve", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(at_zero=False), name="mock", route_prefix="/models/mock")
        serve.run(router({}), name="router", route_prefix="/")
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


async def echo(session: aiohttp.ClientSession, url: str, requests: int, clients: int) -> dict[str, float]:
    """Requests per second of so many clients."""
    body = {"model": "mock", "messages": [{"role": "user", "content": "hello"}]}
    numbers = iter(range(requests))

    async def client() -> None:
        for _ in numbers:
            async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
                assert reply.status == 200, await reply.text()
                await reply.read()

    start, cpu = time.perf_counter(), router_cpu_s()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    return {"requests_s": requests / seconds, "router_cpu_ms": 1000 * (router_cpu_s() - cpu) / requests}


async def paced(session: aiohttp.ClientSession, url: str, streams: int, chunks: int) -> dict[str, float]:
    """The latency of chunks, in milliseconds, and what one costs the router."""
    body = {"model": "mock", "messages": [], "stream": True, "chunks": chunks, "every_ms": EVERY_MS}
    waited: list[float] = []

    async def client(number: int) -> None:
        await asyncio.sleep(number * EVERY_MS / 1000 / streams)  # Evenly over the first period.
        async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
            assert reply.status == 200, await reply.text()
            async for piece in reply.content.iter_any():
                now = time.monotonic_ns()
                waited.extend((now - int(left)) / 1e6 for left in LEFT.findall(piece))

    cpu = router_cpu_s()
    await asyncio.gather(*(client(number) for number in range(streams)))
    assert len(waited) == streams * chunks, "a chunk is missing"
    each = 1000 * (router_cpu_s() - cpu) / len(waited)
    cuts = statistics.quantiles(waited, n=100)
    return {"p50_ms": cuts[49], "p99_ms": cuts[98], "router_cpu_ms": each}


async def compare(ways: dict[str, str], options: argparse.Namespace, applications: int) -> None:
    """All ways in turns; medians over the rounds."""
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        for url in ways.values():  # Warms up.
            await echo(session, url, 200, 8)
        jobs: list[tuple[str, int, Any]] = [("echo", count, echo) for count in numbers(options.clients)]
        jobs += [("paced", count, paced) for count in numbers(options.streams)]
        for name, count, job in jobs:
            figures: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for _ in range(options.rounds):
                for way, url in ways.items():
                    amount = (options.requests, count) if name == "echo" else (count, options.chunks)
                    figures[way].append(await job(session, url, *amount))
            for way, runs in figures.items():
                row = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
                print(json.dumps({"load": name, "at_once": count, "applications": applications, "way": way} | row))
                sys.stdout.flush()


def numbers(text: str) -> list[int]:
    """`1,20` as numbers."""
    return [int(part) for part in text.split(",") if part]


async def sleeping(count: int) -> None:
    """Registers so many models without replicas, beside those that are there."""
    from ray import serve

    from benchmarks.mock_model import application

    have = len(serve.status().applications) - 2
    targets = [
        serve.RunTarget(application(at_zero=True), name=f"asleep-{number}", route_prefix=f"/models/asleep-{number}")
        for number in range(have, count)
    ]
    if targets:
        await asyncio.to_thread(serve.run_many, targets)
        await asyncio.sleep(5)


@contextlib.asynccontextmanager
async def bare_mock(folder: Path) -> AsyncIterator[str]:
    """The mock without Serve."""
    port = free_port()
    with process([sys.executable, "-m", "benchmarks.mock_model", str(port)], {}, folder / "mock.log"):
        await wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"


async def main() -> None:
    """Starts, loads, prints, stops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--applications", default="1")
    parser.add_argument("--streams", default="32,128,512")
    parser.add_argument("--clients", default="8,64")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sa-", dir="/tmp") as name:
        folder, port = Path(name), free_port()
        async with bare_mock(folder) as bare:
            with serving(folder, port):
                ours = f"http://127.0.0.1:{port}"
                for count in numbers(options.applications):
                    await sleeping(count - 1)
                    await wait_for(f"{ours}/v1/models/mock")
                    await compare({"bare": bare, "by route": f"{ours}/models/mock", "by name": ours}, options, count)


if __name__ == "__main__":
    asyncio.run(main())
