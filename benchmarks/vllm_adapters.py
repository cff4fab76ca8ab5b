"""LoRA adapters on vLLM beside the base model alone, under the same load in one run, as `benchmarks/adapters.py` has it
for pt.

    python -m benchmarks.vllm_adapters [--clients 32] [--tokens 64] [--rounds 5] [--max-loras 16]
                                       [--targets q_proj v_proj]

Two engines with the demo model run at the same time, each in a process of its own, because vLLM has one engine in a
process: one without room for adapters, and one with the sixteen adapters of `tests/lora`. In each round one after the
other answers the same prompts of 16 tokens with texts of exactly `--tokens` tokens, all clients at once. With adapters,
the clients take the adapters and the base model in turn. The order changes from round to round.

Prints one line of JSON: tokens per second of wall time by their medians, and the ratios.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from contextlib import ExitStack
from typing import Any

import httpx

from benchmarks.adapters import DEMO_ADAPTERS, PROMPT, RANK, TIMEOUT_S, VOCABULARY, Child
from serve_app.config import ModelConfig
from serve_app.engines.vllm.engine import VllmEngine
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.replica.whole_body import WholeBody

BASE, ADAPTERS = "base", 16


async def load(http: httpx.AsyncClient, models: list[str], tokens: int, seed: int) -> float:
    """One request for each of these models at once. Returns the tokens per second of wall time."""
    draw = random.Random(seed)
    bodies = [
        {
            "model": model, "prompt": [draw.randrange(3, VOCABULARY) for _ in range(PROMPT)], "max_tokens": tokens,
            "temperature": 0, "ignore_eos": True,
        } for model in models
    ]  # fmt: skip
    begin = time.monotonic()
    replies = await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))
    took = time.monotonic() - begin
    made = [reply.raise_for_status().json()["usage"]["completion_tokens"] for reply in replies]
    assert made == [tokens] * len(models), made
    return sum(made) / took


async def serve(options: argparse.Namespace) -> None:
    """Starts one engine, and answers lines of JSON on stdin: the models to ask and a seed."""
    room: dict[str, Any] = {"max_loras": options.max_loras, "max_lora_rank": RANK, "max_cpu_loras": ADAPTERS + 1}
    if options.targets:
        room["lora_target_modules"] = options.targets
    config = ModelConfig.from_args(
        {
            "model": model_path(DEMO_MODEL), "infer_backend": "vllm", "device": "cpu", "dtype": "float32",
            "kv_cache_memory_bytes": "256MiB", "max_model_len": 1024, "max_num_seqs": options.clients,
            **(room if options.child == "adapters" else {}),
        }
    )  # fmt: skip
    engine = VllmEngine(config, BASE)
    app = WholeBody(await engine.start(), config)
    names = named(options.targets) if options.child == "adapters" else []
    for name in names:
        await engine.load_adapter(name, DEMO_ADAPTERS / name)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://vllm", timeout=TIMEOUT_S)
    async with client as http:
        print(json.dumps(names), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            print(json.dumps(await load(http, asked["models"], options.tokens, asked["seed"])), flush=True)
    await engine.stop()


def named(targets: list[str] | None) -> list[str]:
    """The adapters that change these modules alone, or any."""
    found = []
    for path in sorted(DEMO_ADAPTERS.iterdir()):
        changed = json.loads((path / "adapter_config.json").read_text())["target_modules"]
        if targets is None or set(changed) <= set(targets):
            found.append(path.name)
    return found[:ADAPTERS]


def compare(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Runs all rounds and returns the figures."""
    with ExitStack() as stack:
        children = {}
        for kind in ("base", "adapters"):  # One after the other, because each start takes all cores.
            children[kind] = Child("benchmarks.vllm_adapters", kind, arguments)
            stack.callback(children[kind].close)
            names = children[kind].told()
        turn = [BASE, *names]
        loads = {
            "base": (children["base"], [BASE] * options.clients),
            "adapters": (children["adapters"], [turn[number % len(turn)] for number in range(options.clients)]),
            "room alone": (children["adapters"], [BASE] * options.clients),
        }
        found: dict[str, list[float]] = {name: [] for name in loads}
        for number in range(-1, options.rounds):  # The first round prepares kernels.
            for name in list(loads) if number % 2 else list(loads)[::-1]:
                child, models = loads[name]
                figure = child.asked(models, number)
                if number >= 0:
                    found[name].append(figure)
    medians = {name: statistics.median(rounds) for name, rounds in found.items()}
    ratios = {
        f"{name} / base": round(statistics.median(map(float.__truediv__, found[name], found["base"])), 3)
        for name in ("adapters", "room alone")
    }
    figures = {name: round(median, 1) for name, median in medians.items()}
    return {"adapters_named": len(names), "max_loras": options.max_loras, "clients": options.clients} | figures | ratios


def main() -> None:
    """Prints the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-loras", type=int, default=ADAPTERS)
    parser.add_argument("--targets", nargs="*", help="lora_target_modules, and only the adapters of these")
    parser.add_argument("--child", choices=("base", "adapters"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        asyncio.run(serve(options))
    else:
        print(json.dumps(compare(options, sys.argv[1:])))


if __name__ == "__main__":
    main()
