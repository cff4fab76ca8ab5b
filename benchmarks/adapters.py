"""LoRA adapters beside the base model alone, under the same load in one run.

    python -m benchmarks.adapters [--model demo|100M] [--adapters 16] [--clients 32] [--tokens 64] [--rounds 5]
                                  [--max-loras N] [--targets attention|all] [--dtype float32] [--device cpu]
                                  [--threads N]

Two pt engines run at the same time, each in a process of its own as in a replica: one without room for adapters, and
one with sixteen adapters of rank 8 and as many slots. In one process, OpenMP's threads of both would outnumber the
cores and wake each other at every operation. In each round, one after the other answers the same prompts of 16 tokens
with texts of exactly `--tokens` tokens, all clients at once. With adapters, the clients take the adapters and the base
model in turn. The engines change their order from round to round, because machines are noisy.

The demo model has the adapters of `tests/lora`, whose answers the tests compare. Another model gets random ones, of the
projections of queries and values (`attention`), or of all linear modules (`all`).

Prints one line of JSON: tokens per second of wall time and of CPU time for both, by their medians, and the medians of
the ratios of the rounds.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.park_and_wake import build
from serve_app.config import ModelConfig
from serve_app.engines.pt.core.sequence import SamplingParams
from serve_app.engines.pt.engine import PtEngine

RANK = 8
PROMPT = 16  # tokens
VOCABULARY = 700  # Prompts have tokens below this, which all models here know.
DEMO_ADAPTERS = Path(__file__).parents[1] / "tests" / "lora" / "adapters"
TIMEOUT_S = 300.0
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
ATTENTION = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_adapter(folder: Path, shapes: dict[str, tuple[int, int]], seed: int) -> Path:
    """Writes an adapter as PEFT does, for modules with these inputs and outputs."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    names = sorted({name.rpartition(".")[2] for name in shapes})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name, (inputs, outputs) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, inputs) / inputs**0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.05
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def adapters_of(model: str, path: str, count: int, targets: Sequence[str], folder: Path) -> dict[str, str]:
    """Returns the folders of adapters by name."""
    if model == "demo":
        return {found.name: str(found) for found in sorted(DEMO_ADAPTERS.iterdir())[:count]}
    modules = AutoModelForCausalLM.from_pretrained(path).named_modules()
    shapes = {
        name: (module.in_features, module.out_features)
        for name, module in modules
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets
    }
    return {f"a{number}": str(random_adapter(folder / f"a{number}", shapes, number)) for number in range(count)}


@asynccontextmanager
async def running(fields: dict[str, Any], adapters: dict[str, str]) -> AsyncIterator[PtEngine]:
    """A started engine with these adapters."""
    engine = PtEngine(ModelConfig.from_args(fields), "base")
    await engine.start()
    try:
        for name, folder in adapters.items():
            await engine.load_adapter(name, Path(folder))
        yield engine
    finally:
        await engine.stop()


async def load(engine: PtEngine, models: Sequence[str | None], tokens: int, seed: int) -> tuple[float, float]:
    """One request for each of these models at once. Returns the tokens per second of wall time and of CPU time."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, VOCABULARY) for _ in range(PROMPT)] for _ in models]
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)

    async def one(prompt: list[int], model: str | None) -> None:
        with engine.generator.reserve(1, model) as places:
            async for _ in engine.generator.generate(prompt, params, places=places):
                pass

    wall, cpu = time.monotonic(), sum(os.times()[:2])
    await asyncio.gather(*map(one, prompts, models))
    total = tokens * len(models)
    return total / (time.monotonic() - wall), total / (sum(os.times()[:2]) - cpu)


async def serve(options: argparse.Namespace) -> None:
    """Starts one engine, prints the names of its adapters, and answers lines of JSON on stdin: the models to ask, where
    null stands for the base, and a seed."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = build(options.model, folder / "model")
        fields = {
            "model": path, "infer_backend": "pt", "device": options.device, "dtype": options.dtype,
            "num_cpus": options.threads, "max_num_seqs": options.clients,
        }  # fmt: skip
        adapters = {}
        if options.child == "adapters":
            targets = ALL if options.targets == "all" else ATTENTION
            adapters = adapters_of(options.model, path, options.adapters, targets, folder)
            fields |= {"adapters": adapters, "max_loras": options.max_loras or len(adapters), "max_lora_rank": RANK}
        engine = await stack.enter_async_context(running(fields, adapters))
        print(json.dumps(list(adapters)), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            print(json.dumps(await load(engine, asked["models"], options.tokens, asked["seed"])), flush=True)


class Child:
    """One engine in a process of its own, which runs `python -m MODULE … --child KIND`."""

    def __init__(self, module: str, kind: str, arguments: Sequence[str]):
        command = [sys.executable, "-m", module, *arguments, "--child", kind]
        self.process = subprocess.Popen(
            command, env={**os.environ, **QUIET}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def told(self) -> Any:
        """The next line of JSON. Engines may print others."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("[") or line[:1].isdigit():
                return json.loads(line)
        raise RuntimeError("the engine has ended")

    def asked(self, models: Sequence[str | None], seed: int) -> Any:
        """The figures of one round."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"models": models, "seed": seed}) + "\n")
        self.process.stdin.flush()
        return self.told()

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(TIMEOUT_S)


def compare(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs all rounds and returns the figures."""
    with ExitStack() as stack:
        children = {}
        for kind in ("base", "adapters"):  # One after the other, because each start takes all cores.
            children[kind] = Child("benchmarks.adapters", kind, arguments)
            stack.callback(children[kind].close)
            adapters = children[kind].told()
        names = [None, *adapters]
        alone: list[str | None] = [None] * options.clients
        models = {
            "base": (children["base"], alone),
            "adapters": (children["adapters"], [names[number % len(names)] for number in range(options.clients)]),
            "room alone": (children["adapters"], alone),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for number in range(-1, options.rounds):  # The first round prepares kernels.
            order = list(models) if number % 2 else list(models)[::-1]
            for name in order:
                child, asked = models[name]
                figures = child.asked(asked, number)
                if number >= 0:
                    found[name].append(figures)
    return report(options, found)


def report(options: argparse.Namespace, found: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Returns what is printed."""
    medians = {
        name: [statistics.median(figures[kind] for figures in rounds) for kind in (0, 1)]
        for name, rounds in found.items()
    }
    row: dict[str, Any] = {"model": options.model, "adapters": options.adapters, "clients": options.clients}
    for name, (wall, cpu) in medians.items():
        row[name] = {"tokens_per_second": round(wall, 1), "tokens_per_cpu_second": round(cpu, 1)}
    for name in ("adapters", "room alone"):
        row[f"{name} / base"] = [
            round(
                statistics.median(mine[kind] / its[kind] for mine, its in zip(found[name], found["base"], strict=True)),
                3,
            )
            for kind in (0, 1)
        ]
    return row


def main() -> None:
    """Reads the options and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", choices=("demo", "100M"))
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-loras", type=int)
    parser.add_argument("--targets", default="attention", choices=("attention", "all"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", choices=("base", "adapters"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        asyncio.run(serve(options))
    else:
        print(json.dumps(compare(options, sys.argv[1:])), flush=True)


if __name__ == "__main__":
    main()
