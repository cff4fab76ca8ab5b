"""What it costs that models swap, beside the same requests without it. Every ratio is taken in one run of one cluster.

    python -m benchmarks.swapping [--cases alternate,pinned,first_token] [--requests 240] [--seconds 20] [--rounds 10]

Starts `serve run` on the CPU with a router, the demo model, which is pinned, and four pt models of 100 M parameters in
float32 with random weights: `both0` and `both1` in a pool with room for both, `one0` and `one1` in a pool with room for
one. Each has one CPU, and `min_resident_s` has its default. All requests go through the router by name. Compared loads
run in the order A-B-A, and a figure of A is the mean of its two runs. Prints a line of JSON for each of these:

    alternate     `--requests` requests of 16 new tokens to `one0` and `one1`. At once: all are submitted in one moment,
                  alternating the model (B) or sorted by it (A). Closed loop: 32 clients send as many, each one after
                  the other, and change the model with every request (B), or once after half of them (A).
                  share       tokens per second of B as a share of A, at least 0.6
                  wakes       how often a model woke during B, at most `most_wakes`, which follows from the policy's law
                              that a model stays for at least `min_resident_s`, and in use for three times its wake
    pinned        the demo model streams to 4 clients while `--rate` requests of 16 new tokens come in a second,
                  alternating between `both0` and `both1`, which stay (A), or `one0` and `one1`, which swap (B)
                  p50_ratio, p99_ratio    milliseconds between two arrivals of a stream in B over A, at most 1.5
    first_token   a request of one new token to a model that is parked, while the other one idles in its memory
                  share       its seconds as a share of the wake, as the replica measured it, and a usual first token,
                              at most 1.2
                  share_with_park     the same, with the park of the other model in the sum

A request that is not answered with 200 ends the run.
"""

import argparse
import asyncio
import itertools
import json
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.park_and_wake import PROMPT, build
from serve_app.model_fields import ResidencyConfig
from serve_app.residency.policy import WORTH_OF_A_SWAP
from tests.cluster.conftest import model
from tests.cluster.serve_run import ServeRun

CASES = ("alternate", "pinned", "first_token")
PINNED, BOTH, ONE = "demo", ("both0", "both1"), ("one0", "one1")
# The KV cache holds 32 requests of full length, which is a full batch. A model takes a little more than its 377 MB of
# weights and this cache, so the second pool has room for one.
KV_CACHE, ROOM = "232MiB", {"both": "1300MiB", "one": "700MiB"}
CPUS, CONTEXT = 8, 128
TOKENS, STREAMED, CLIENTS, READERS = 16, 200, 32, 4
TIMEOUT_S = 600.0
# Ray forwards a replica's line after some tenths of a second. A model that idles for so long may leave at once.
SETTLED_S = 1.5
LEAST_STAY_S = float(ResidencyConfig.model_fields["min_resident_s"].default)


class SwappingServe(ServeRun):
    """Both pools and the pinned model, with all models once loaded."""

    def __init__(self, folder: str):
        router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
        applications = [router, model(PINNED, infer_backend="pt", num_cpus=1)]
        for pool, names in (("both", BOTH), ("one", ONE)):
            swaps = {"policy": "swap", "pool": pool, "pool_memory": {"cpu": ROOM[pool], "disk": "2GiB"}}
            fields = {"infer_backend": "pt", "max_model_len": CONTEXT, "kv_cache_memory_bytes": KV_CACHE, "num_cpus": 1}
            applications += [model(name, **{**fields, "model": folder, "residency": swaps}) for name in names]
        super().__init__({"applications": applications}, cpus=CPUS, is_set_before_ray=True)
        wanted = {PINNED, *BOTH, *ONE}
        self.wait_until(
            lambda models: wanted <= models.keys() and all(models[name]["status"] == "ready" for name in wanted)
        )

    def wakes(self) -> list[float]:
        """The measured seconds of each wake of a parked model so far."""
        return self._seconds(r"is resident after ([\d.]+) s from parked")

    def parks(self) -> list[float]:
        """The measured seconds of each park so far."""
        return self._seconds(r"is parked after ([\d.]+) s")

    def _seconds(self, line: str) -> list[float]:
        return [float(found) for found in re.findall(line, self.output())]


async def ask(session: aiohttp.ClientSession, url: str, name: str, tokens: int = TOKENS) -> float:
    """Seconds of a greedy text of exactly so many tokens."""
    body = {"model": name, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    begin = time.monotonic()
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        told = await reply.text()
        if reply.status != 200 or json.loads(told)["usage"]["completion_tokens"] != tokens:
            raise RuntimeError(f"'{name}' answered {reply.status} and not with {tokens} tokens: {told[:500]}")
    return time.monotonic() - begin


async def at_once(session: aiohttp.ClientSession, url: str, order: Sequence[str]) -> float:
    """Seconds until all requests are answered that are submitted in one moment, in this order of models."""
    begin = time.monotonic()
    await asyncio.gather(*(ask(session, url, name) for name in order))
    return time.monotonic() - begin


async def closed_loop(session: aiohttp.ClientSession, url: str, orders: Sequence[Sequence[str]]) -> float:
    """Seconds until each client has sent its requests, one after the other. Each has its own order of models."""

    async def client(order: Sequence[str]) -> None:
        for name in order:
            await ask(session, url, name)

    begin = time.monotonic()
    await asyncio.gather(*map(client, orders))
    return time.monotonic() - begin


def orders_of(requests: int, is_sorted: bool) -> list[list[str]]:
    """The models of each client's requests. Half of the clients begin with the other model if they alternate."""
    each = max(2, requests // CLIENTS)
    starts = (itertools.islice(itertools.cycle(ONE), client % 2, client % 2 + each) for client in range(CLIENTS))
    return [sorted(names) if is_sorted else list(names) for names in starts]


def most_wakes(took_s: float, wakes: Sequence[float]) -> int:
    """The most wakes that the policy allows in so many seconds where there is room for one: between two of them, the
    model that is resident stays."""
    stay_s = max(LEAST_STAY_S, WORTH_OF_A_SWAP * min(wakes, default=0.0))
    return int(took_s / stay_s) + 1


async def in_turns(
    serve: SwappingServe, session: aiohttp.ClientSession, load: str, requests: int
) -> tuple[list[float], float, list[float]]:
    """The seconds of both sorted runs, those of the alternating one between them, and its wakes."""
    took, woke = list[float](), list[float]()
    names = list(itertools.islice(itertools.cycle(ONE), requests))
    for is_sorted in (True, False, True):
        await asyncio.sleep(SETTLED_S)
        before = len(serve.wakes())
        if load == "at once":
            took.append(await at_once(session, serve.url, sorted(names) if is_sorted else names))
        else:
            took.append(await closed_loop(session, serve.url, orders_of(requests, is_sorted)))
        await asyncio.sleep(SETTLED_S)
        if not is_sorted:
            woke = serve.wakes()[before:]
    return [took[0], took[2]], took[1], woke


async def alternate(serve: SwappingServe, session: aiohttp.ClientSession, requests: int) -> None:
    """Prints what it costs to change the model with every request."""
    for name in (*ONE, *ONE):  # Each has been parked once then, which made its copy.
        await ask(session, serve.url, name)
    for load in ("at once", "closed loop"):
        count = requests if load == "at once" else sum(map(len, orders_of(requests, True)))
        in_order, mixed, woke = await in_turns(serve, session, load, requests)
        allowed = most_wakes(mixed, woke)
        row = {
            "case": "alternate", "load": load, "requests": count,
            "sorted_tokens_s": [round(count * TOKENS / seconds, 1) for seconds in in_order],
            "alternating_tokens_s": round(count * TOKENS / mixed, 1),
            "share": round(statistics.mean(in_order) / mixed, 3), "took_s": round(mixed, 1),
            "wakes": len(woke), "most_wakes": allowed, "law_held": len(woke) <= allowed,
            "wakes_per_minute": round(60 * len(woke) / mixed, 1),
            "wake_s": round(statistics.median(woke), 3) if woke else None, "min_resident_s": LEAST_STAY_S,
        }  # fmt: skip
        print(json.dumps(row), flush=True)


async def read_streams(session: aiohttp.ClientSession, url: str, until: float) -> list[float]:
    """Streams texts of the pinned model until then. Returns the seconds between each two arrivals of tokens.

    Tokens that come together are one arrival: Serve joins events that wait, so most gaps between tokens were zero.
    """
    body = {
        "model": PINNED, "prompt": PROMPT, "max_tokens": STREAMED, "temperature": 0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    gaps = []
    while time.monotonic() < until:
        last = None
        async with session.post(f"{url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise RuntimeError(f"'{PINNED}' answered {reply.status}: {(await reply.text())[:500]}")
            async for piece in reply.content.iter_any():
                if b"data: {" in piece:
                    now = time.monotonic()
                    if last is not None:
                        gaps.append(now - last)
                    last = now
    return gaps


async def visitors(session: aiohttp.ClientSession, url: str, names: Sequence[str], rate: float, until: float) -> int:
    """Sends so many requests in a second until then, to one model after the other, whether earlier ones are answered
    or not. Returns how many, once all are answered."""
    tasks, turn = list[asyncio.Task[float]](), itertools.cycle(names)
    while time.monotonic() < until:
        tasks.append(asyncio.create_task(ask(session, url, next(turn))))
        await asyncio.sleep(1 / rate)
    await asyncio.gather(*tasks)
    return len(tasks)


async def beside(
    serve: SwappingServe, session: aiohttp.ClientSession, names: Sequence[str], rate: float, seconds: float
) -> tuple[list[float], int, int]:
    """The sorted gaps of the pinned model's streams, the requests to the models beside it, and their wakes."""
    await asyncio.sleep(SETTLED_S)
    before, until = len(serve.wakes()), time.monotonic() + seconds
    others = asyncio.create_task(visitors(session, serve.url, names, rate, until)) if names else None
    streams = await asyncio.gather(*(read_streams(session, serve.url, until) for _ in range(READERS)))
    sent = await others if others is not None else 0
    await asyncio.sleep(SETTLED_S)
    return sorted(itertools.chain(*streams)), sent, len(serve.wakes()) - before


async def pinned(serve: SwappingServe, session: aiohttp.ClientSession, rate: float, seconds: float) -> None:
    """Prints what a pinned model's readers notice of others that swap."""
    for name in (*BOTH, *ONE, *ONE):
        await ask(session, serve.url, name)
    rows: list[dict[str, Any]] = []
    for kind, names in (("alone", ()), ("both resident", BOTH), ("swap", ONE), ("both resident", BOTH)):
        gaps, sent, woke = await beside(serve, session, names, rate, seconds)
        p50, p99 = (1000 * gaps[int(part * len(gaps))] for part in (0.5, 0.99))
        rows.append({"beside": kind, "p50_ms": round(p50, 2), "p99_ms": round(p99, 2)})
        rows[-1] |= {"most_ms": round(1000 * gaps[-1], 1), "arrivals": len(gaps), "requests": sent, "wakes": woke}
    stay, swap = [row for row in rows if row["beside"] == "both resident"], rows[2]
    ratios = {
        f"{part}_ratio": round(swap[f"{part}_ms"] / statistics.mean(row[f"{part}_ms"] for row in stay), 3)
        for part in ("p50", "p99")
    }
    print(json.dumps({"case": "pinned", "rate": rate, "seconds": seconds, **ratios, "runs": rows}), flush=True)


async def first_token(serve: SwappingServe, session: aiohttp.ClientSession, rounds: int) -> None:
    """Prints how long the first token of a parked model takes."""
    for name in (*ONE, *ONE):
        await ask(session, serve.url, name)
    await asyncio.sleep(SETTLED_S)
    wakes, parks = len(serve.wakes()), len(serve.parks())
    firsts, usuals = [], []
    for name in itertools.islice(itertools.cycle(ONE), rounds):
        firsts.append(await ask(session, serve.url, name, 1))
        usuals.append(statistics.median([await ask(session, serve.url, name, 1) for _ in range(3)]))
        await asyncio.sleep(SETTLED_S)
    woke, parked = serve.wakes()[wakes:], serve.parks()[parks:]
    if len(woke) != rounds or len(parked) != rounds:
        raise RuntimeError(f"{rounds} requests to parked models made {len(woke)} wakes and {len(parked)} parks")
    each = list(zip(firsts, usuals, woke, parked, strict=True))
    row = {
        "case": "first_token", "rounds": rounds,
        "first_token_s": round(statistics.median(firsts), 3),
        "usual_first_token_s": round(statistics.median(usuals), 3),
        "wake_s": round(statistics.median(woke), 3), "park_of_the_other_s": round(statistics.median(parked), 3),
        "share": round(statistics.median(first / (wake + usual) for first, usual, wake, _ in each), 3),
        "share_with_park": round(
            statistics.median(first / (wake + usual + park) for first, usual, wake, park in each), 3
        ),
    }  # fmt: skip
    print(json.dumps(row), flush=True)


async def measure(serve: SwappingServe, options: argparse.Namespace) -> None:
    """Prints the figures of each case that is asked for."""
    timeout, without_bound = aiohttp.ClientTimeout(total=TIMEOUT_S), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=without_bound, timeout=timeout) as session:
        for case in options.cases.split(","):
            if case == "alternate":
                await alternate(serve, session, options.requests)
            elif case == "pinned":
                await pinned(serve, session, options.rate, options.seconds)
            else:
                await first_token(serve, session, options.rounds)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--rate", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if unknown := sorted(set(options.cases.split(",")) - set(CASES)):
        parser.error(f"there is no case {unknown[0]!r}. The cases are {', '.join(CASES)}.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    with tempfile.TemporaryDirectory(prefix="serve-app-benchmark-") as folder:
        path = build("100M", Path(folder))
        begin = time.monotonic()
        serve = SwappingServe(path)
        try:
            print(json.dumps({"ready_after_s": round(time.monotonic() - begin, 1)}), flush=True)
            asyncio.run(measure(serve, options))
        finally:
            serve.stop()
            serve.clean_up()


if __name__ == "__main__":
    main()
