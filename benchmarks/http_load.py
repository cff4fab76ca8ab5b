"""The same chat load on several OpenAI-compatible servers in turns: prompts and outputs of mixed lengths.

    python -m benchmarks.http_load pt=http://127.0.0.1:8000/v1,MODEL swift=http://127.0.0.1:18603/v1,peer \
        --clients 8,32 --rounds 3

Every client asks once a round, with a short question and an output of 16 to 128 tokens; the model must not end texts
by itself (random weights do not). One server at a time is loaded, round after round. Prints one line of JSON for each
server and number of clients: tokens per second, and their ratio to the last server's.
"""

import argparse
import asyncio
import json
import random
import statistics
import time

import aiohttp


async def ask(session: aiohttp.ClientSession, url: str, model: str, number: int, tokens: int, stream: bool) -> float:
    """Reads one answer; returns the seconds to its first text."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell me about number {number}. " * (1 + number % 3)}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": stream,
    }
    start, first = time.perf_counter(), None
    async with session.post(f"{url}/chat/completions", json=body) as reply:
        if reply.status != 200:
            raise RuntimeError(f"{url}: {reply.status} {await reply.text()}")
        async for line in reply.content:
            if first is None and b'"content"' in line:
                first = time.perf_counter() - start
    return first if first is not None else time.perf_counter() - start


async def load(url: str, model: str, clients: int, seed: int, stream: bool) -> tuple[float, float]:
    """Tokens per second and the mean seconds to the first text of one round."""
    draw = random.Random(seed)
    lengths = [draw.randint(16, 128) for _ in range(clients)]
    timeout = aiohttp.ClientTimeout(total=900)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await ask(session, url, model, 0, 8, stream)  # Wakes the server up.
        start = time.perf_counter()
        firsts = await asyncio.gather(
            *(ask(session, url, model, n, tokens, stream) for n, tokens in enumerate(lengths))
        )
        return sum(lengths) / (time.perf_counter() - start), statistics.mean(firsts)


async def main() -> None:
    """Loads all servers in turns and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", help="NAME=URL,MODEL")
    parser.add_argument("--clients", default="8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="no streams: some servers batch whole answers only")
    options = parser.parse_args()
    servers = {name: place.rsplit(",", 1) for name, _, place in (item.partition("=") for item in options.servers)}
    for clients in map(int, options.clients.split(",")):
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
        for seed in range(options.rounds):
            for name, (url, model) in servers.items():
                figures[name].append(await load(url, model, clients, seed, not options.whole))
        rates = {name: statistics.median(rate for rate, _ in runs) for name, runs in figures.items()}
        last = list(rates.values())[-1]
        for name, rate in rates.items():
            first = statistics.median(seconds for _, seconds in figures[name])
            row = {"server": name, "clients": clients, "tok_s": round(rate, 1), "first_ms": round(1000 * first)}
            print(json.dumps(row | {"ratio": round(rate / last, 2)}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
