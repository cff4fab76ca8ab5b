"""What open pages of the console cost the router, with a model that computes nothing: its CPU and its throughput.

    python -m benchmarks.console [--pages 0,10,20] [--seconds 20] [--rounds 3] [--minutes 0]

One Serve with the shipped settings, the router and one mock. In every round, each number of pages is open in turn under
two loads: paced streams (64 streams of a chunk each 20 ms, so the router has the same to do each time), of which the
router's CPU is measured in per cent of a core, and echo requests of 8 clients as fast as they are answered, of which
requests per second and the router's CPU for each are measured. Ratios are to the turns without pages of the same round,
because a machine's speed changes, and the medians of many short rounds tell more than a few long ones. The model does
the same for each request whatever pages are open, so on a machine whose speed changes within seconds, the router's CPU
as a multiple of the model's (`paced_to_model`, `echo_to_model`) tells most. `--minutes` then
keeps the most pages open under echo requests for that long, and prints the router's resident memory each 30 seconds.
Prints one line of JSON for each.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.ingress import free_port, wait_for
from benchmarks.router_cost import EVERY_MS, numbers, serving

STREAMS, CLIENTS = 64, 8
MEMORY_EVERY_S = 30.0


@contextlib.asynccontextmanager
async def open_pages(session: aiohttp.ClientSession, url: str, count: int) -> AsyncIterator[list[int]]:
    """So many pages that read their streams. Yields the bytes that each has read."""
    read = [0] * count

    async def page(number: int) -> None:
        while True:
            async with session.get(f"{url}/ui/api/stream") as reply:
                assert reply.status == 200, await reply.text()
                async for piece in reply.content.iter_any():
                    read[number] += len(piece)

    tasks = [asyncio.create_task(page(number)) for number in range(count)]
    try:
        if tasks:
            await asyncio.sleep(2.0)
            assert all(read), "a page has read nothing"
        yield read
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Cpu:
    """The CPU that the router and the model have taken since it was made, or since `begin`."""

    def __init__(self) -> None:
        self.router, self.model = replica("router"), replica("mock")
        self.begin()

    def begin(self) -> None:
        """Counts from now on."""
        self._at, self._router, self._model = time.perf_counter(), cpu_s(self.router), cpu_s(self.model)

    def taken(self) -> tuple[float, float, float]:
        """The seconds that have passed, and the CPU seconds of the router and of the model."""
        passed = time.perf_counter() - self._at
        return passed, cpu_s(self.router) - self._router, cpu_s(self.model) - self._model


async def paced_cpu(session: aiohttp.ClientSession, url: str, seconds: float) -> dict[str, float]:
    """What the router takes while streams run at their own pace."""
    body = {
        "model": "mock", "messages": [], "stream": True, "chunks": int(1000 * (seconds + 2) / EVERY_MS),
        "every_ms": EVERY_MS,
    }  # fmt: skip

    async def client(number: int) -> None:
        await asyncio.sleep(number * EVERY_MS / 1000 / STREAMS)
        async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
            assert reply.status == 200, await reply.text()
            async for _ in reply.content.iter_any():
                pass

    tasks = [asyncio.create_task(client(number)) for number in range(STREAMS)]
    await asyncio.sleep(1.0)  # They have all begun.
    cpu = Cpu()
    await asyncio.sleep(seconds)
    passed, router, model = cpu.taken()
    await asyncio.gather(*tasks)
    return {"paced_cpu_percent": 100 * router / passed, "paced_to_model": router / model}


async def echo_rate(session: aiohttp.ClientSession, url: str, seconds: float) -> dict[str, float]:
    """Requests per second by name, and what the router takes for them."""
    body = {"model": "mock", "messages": [{"role": "user", "content": "hello"}]}
    cpu, count = Cpu(), 0
    start = time.perf_counter()

    async def client() -> None:
        nonlocal count
        while time.perf_counter() - start < seconds:
            async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
                assert reply.status == 200, await reply.text()
                await reply.read()
            count += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    passed, router, model = cpu.taken()
    return {"echo_per_s": count / passed, "echo_cpu_ms": 1000 * router / count, "echo_to_model": router / model}


def replica(application: str) -> psutil.Process:
    """The process of a replica of this benchmark. Other clusters may run on this machine."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if f"ServeReplica:{application}:" in " ".join(child.cmdline()):
                return child
    raise RuntimeError(f"no replica of {application} runs below this process")


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process."""
    times = process.cpu_times()
    return float(times.user + times.system)


def resident_mib() -> float:
    """The resident memory of the router."""
    return float(replica("router").memory_info().rss / 2**20)


async def compare(session: aiohttp.ClientSession, url: str, options: argparse.Namespace) -> None:
    """All numbers of pages in turns, and the medians of their ratios."""
    counts = [0, *(count for count in numbers(options.pages) if count)]
    ratios: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for number in range(options.rounds):
        found: dict[int, dict[str, float]] = {}
        for count in counts[number % len(counts) :] + counts[: number % len(counts)]:
            async with open_pages(session, url, count) as read:
                paced = await paced_cpu(session, url, options.seconds)
                found[count] = paced | await echo_rate(session, url, options.seconds)
                row = {"round": number, "pages": count} | {
                    name: round(value, 3) for name, value in found[count].items()
                }
                print(json.dumps(row | {"page_bytes": sum(read), "router_mib": round(resident_mib(), 1)}), flush=True)
            await asyncio.sleep(1.0)
        for count in counts:
            ratios[count].append({name: value / found[0][name] for name, value in found[count].items()})
    for count in counts[1:]:
        medians = {name: round(statistics.median(each[name] for each in ratios[count]), 4) for name in ratios[count][0]}
        print(json.dumps({"pages": count, "ratios": medians}), flush=True)


async def watch_memory(session: aiohttp.ClientSession, url: str, pages: int, minutes: float) -> None:
    """The router's memory while pages are open under load."""
    ends = time.monotonic() + 60 * minutes
    async with open_pages(session, url, pages):
        while time.monotonic() < ends:
            rate = (await echo_rate(session, url, MEMORY_EVERY_S))["echo_per_s"]
            left = round(max(0.0, ends - time.monotonic()))
            row: dict[str, Any] = {"pages": pages, "seconds_left": left, "echo_per_s": round(rate, 1)}
            print(json.dumps(row | {"router_mib": round(resident_mib(), 1)}), flush=True)


async def main() -> None:
    """Starts, loads, prints, stops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", default="0,10,20")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=0.0)
    options = parser.parse_args()
    timeout = aiohttp.ClientTimeout(total=None)
    with tempfile.TemporaryDirectory(prefix="sa-", dir="/tmp") as name:
        port = free_port()
        with serving(Path(name), port):
            url = f"http://127.0.0.1:{port}"
            await wait_for(f"{url}/v1/models/mock")
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
                await echo_rate(session, url, 5.0)  # Warms up.
                await compare(session, url, options)
                if options.minutes:
                    await watch_memory(session, url, max(numbers(options.pages)), options.minutes)


if __name__ == "__main__":
    asyncio.run(main())
