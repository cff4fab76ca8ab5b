"""What the way through the router costs: bare vLLM, this Serve by name and by route, in turns, in one run.

    python -m benchmarks.ingress [--model demo|100m] [--streams 1,8,32,128] [--rounds 3] [--also NAME=URL,MODEL]

Starts a bare vLLM API server and a Serve with the same vLLM model behind the router (HAProxy as in the shipped
configs; `--without-haproxy` for handles), and loads one after the other, round after round, with greedy chats that
stream, of the same mixed lengths. `--also` adds a server that runs already, such as Ray Serve LLM. Prints a line of
JSON for each way and number of streams: tokens per second and median milliseconds to the first text (medians over the
rounds), their ratio and difference to bare vLLM's, and the CPU milliseconds per token of the router, HAProxy, the
processes of the engines, and the rest of Ray.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from serve_app.deploy.serve_env import HAPROXY_IN_FILES
from serve_app.deploy.serve_env import serve_environment as shipped_settings

BIN = Path(sys.executable).parent
SHIPPED = shipped_settings(HAPROXY_IN_FILES)
OFF = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
TOKENS = 64
PARTS = {
    part: re.compile(pattern)
    for part, pattern in {
        "router": "ServeReplica:router:",
        "haproxy": "haproxy.* -f ",
        "engine": "ServeReplica:peer:|entrypoints.openai.api_server|EngineCore",
        "serve": "ServeController|Proxy|raylet|gcs_server|dashboard|ray::",
    }.items()
}


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with its group."""
    with log.open("wb") as out:
        started = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        yield started
    finally:
        started.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def bare_vllm(model: str, port: int) -> list[str]:
    """vLLM's own server, with what our config makes of the model."""
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = ["--model", model, "--served-model-name", "peer", "--max-model-len", "512", "--enforce-eager"]
    options += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    return [*module, *options]


def serve_config(applications: list[dict[str, Any]], port: int, haproxy: bool, folder: Path) -> Path:
    """A config file with the shipped settings."""
    variables = SHIPPED | ({} if haproxy else OFF)
    router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
    document = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "controller_options": {"runtime_env": {"env_vars": variables}},
        "applications": [router, *applications],
    }
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def vllm_application(model: str) -> dict[str, Any]:
    """The same model behind the router."""
    args = {"model": model, "infer_backend": "vllm", "device": "cpu", "dtype": "float32", "max_model_len": 512}
    return {
        "name": "peer",
        "import_path": "serve_app.app:model",
        "route_prefix": "/models/peer",
        "args": args,
        "runtime_env": {"env_vars": {"VLLM_LOGGING_LEVEL": "ERROR"}},
    }


def serve_environment(folder: Path) -> dict[str, str]:
    """A Ray of its own."""
    haproxy = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "SERVER_STATE_BASE": ""}
    haproxy["SERVER_STATE_FILE"] = "state"
    return {
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 8}',
        "VIRTUAL_ENV": str(BIN.parent),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "HF_HUB_OFFLINE": "1",
        **{f"RAY_SERVE_HAPROXY_{name}": f"{folder}/h/{file}" for name, file in haproxy.items()},
    }


async def wait_for(url: str, seconds: float = 240) -> None:
    """Until the address answers 200."""
    deadline = time.monotonic() + seconds
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
                async with session.get(url, timeout=aiohttp.ClientTimeout(total=5)) as reply:
                    if reply.status == 200:
                        return
            await asyncio.sleep(1)
    raise TimeoutError(f"{url} does not answer")


async def ask(session: aiohttp.ClientSession, url: str, model: str, number: int, tokens: int) -> float:
    """Reads one stream as bytes; returns the seconds to its first text."""
    messages = [{"role": "user", "content": f"hello number {number}"}]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True}
    start, first = time.perf_counter(), 0.0
    async with session.post(f"{url}/chat/completions", json={**body, "ignore_eos": True}) as reply:
        if reply.status != 200:
            raise RuntimeError(f"{url}: {reply.status} {await reply.text()}")
        async for piece in reply.content.iter_any():
            if not first and b'"content"' in piece:
                first = time.perf_counter() - start
    return first or time.perf_counter() - start


async def load(url: str, model: str, streams: int, seed: int, tokens: int) -> tuple[float, float]:
    """Tokens per second, and the median seconds to the first text, of four requests for each stream.

    Lengths are mixed around `tokens`, so that after the first burst requests come one by one.
    """
    draw = random.Random(seed)
    lengths = [draw.randint(tokens // 2, tokens * 3 // 2) for _ in range(4 * streams)]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=900), connector=connector) as session:
        await ask(session, url, model, 0, 8)
        gate, firsts = asyncio.Semaphore(streams), []

        async def one(number: int, length: int) -> None:
            async with gate:
                firsts.append(await ask(session, url, model, 1000 * seed + number, length))

        start = time.perf_counter()
        await asyncio.gather(*(one(*item) for item in enumerate(lengths)))
        return sum(lengths) / (time.perf_counter() - start), statistics.median(firsts)


def cpu_s() -> Counter[str]:
    """CPU seconds so far of all on this machine that has a part in answering, by part."""
    seconds: Counter[str] = Counter()
    for item in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            command = " ".join(item.info["cmdline"] or [])
            part = next((part for part, pattern in PARTS.items() if pattern.search(command)), None)
            if part is not None:
                times = item.cpu_times()
                seconds[part] += times.user + times.system
    return seconds


def router_cpu_s() -> float:
    """CPU seconds of all routers' processes on this machine."""
    return cpu_s()["router"]


async def compare(ways: dict[str, tuple[str, str]], streams: list[int], rounds: int) -> None:
    """Loads all ways in turns and prints medians; the first way is what the others are compared with."""
    for url, model in ways.values():  # Servers are slow at first, and their first load slows the others too.
        await load(url, model, 32, 99, TOKENS)
    for count in streams:
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        spent: dict[str, Counter[str]] = {name: Counter() for name in ways}
        for seed in range(rounds):
            for name, (url, model) in ways.items():
                before = cpu_s()
                figures[name].append(await load(url, model, count, seed, TOKENS))
                spent[name] += cpu_s() - before
        medians = {
            name: [statistics.median(part) for part in zip(*runs, strict=True)] for name, runs in figures.items()
        }
        base = next(iter(medians.values()))
        for name, (rate, first) in medians.items():
            row = {"way": name, "streams": count, "tok_s": round(rate, 1), "ratio": round(rate / base[0], 3)}
            row |= {"first_ms": round(1000 * first, 1), "added_ms": round(1000 * (first - base[1]), 1)}
            cpu = {part: round(1000 * s / (4 * count * TOKENS * rounds), 3) for part, s in sorted(spent[name].items())}
            print(json.dumps(row | {"cpu_ms_per_token": cpu}), flush=True)


def build(name: str, folder: Path) -> str:
    """The folder of the model."""
    from serve_app.facts.checkpoint import DEMO_MODEL, model_path

    if name == "demo":
        return model_path(DEMO_MODEL)
    from transformers import AutoTokenizer

    from benchmarks.pt_engine import build_model

    build_model(folder / "model", "float32")
    tokenizer = AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


async def main() -> None:
    """Starts, loads, prints, stops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "100m"), default="demo")
    parser.add_argument("--streams", default="1,8,32,128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-haproxy", action="store_true")
    parser.add_argument("--also", action="append", default=[], help="NAME=URL,MODEL")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sa-", dir="/tmp") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = build(options.model, folder)
        bare, ours = free_port(), free_port()
        file = serve_config([vllm_application(model)], ours, not options.without_haproxy, folder)
        stack.enter_context(process(bare_vllm(model, bare), VLLM, folder / "vllm.log"))
        await wait_for(f"http://127.0.0.1:{bare}/v1/models")
        stack.enter_context(process([str(BIN / "serve"), "run", str(file)], serve_environment(folder), folder / "log"))
        await wait_for(f"http://127.0.0.1:{ours}/models/peer/v1/models")
        ways = {
            "bare vLLM": (f"http://127.0.0.1:{bare}/v1", "peer"),
            "by name": (f"http://127.0.0.1:{ours}/v1", "peer"),
            "by route": (f"http://127.0.0.1:{ours}/models/peer/v1", "peer"),
        }
        for item in options.also:
            other, _, place = item.partition("=")
            url, _, served = place.rpartition(",")
            ways[other] = (url, served)
        await compare(ways, [int(count) for count in options.streams.split(",")], options.rounds)


if __name__ == "__main__":
    asyncio.run(main())
