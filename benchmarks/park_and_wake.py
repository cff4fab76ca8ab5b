"""How long pt takes to park, to wake and to give its next token, beside its cold start, and what it frees.

    python -m benchmarks.park_and_wake [--rounds 3] [--models demo,100M,1GB] [--conversation TOKENS]

Each model is started in a process of its own on the CPU, two of them with random weights that are built on the spot. A
cold start is counted from the start of the process until the engine can answer, with the model's files in the page
cache, as they are after a first start. The engine parks and wakes `--rounds` times, and the figures are medians; the
first park also makes the copy. A request that comes while the engine is parked measures the first token after a wake.
Prints one line of JSON for each model:

    wake_share      a wake as a share of the cold start, which must be at most 0.25
    freed_share     the resident memory that a park frees as a share of weights and KV cache, at least 0.95 where the
                    tensors are much larger than a page
    first_share     the first token after a wake as a share of a wake and a usual first token, at most 1.2

With `--conversation`, each model (but the demo, whose context is short) computes a prompt of so many tokens, parks and
wakes, and goes on with 16 new tokens, whose first token comes from the prompt cache:

    resume_share    the first token of the second prompt as a share of that of the first one, at most 0.1
    same_text       whether the 32 tokens of the second prompt are those of an engine without a prompt cache
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serve_app.config import ModelConfig
from serve_app.engines.pt.core.sequence import SamplingParams
from serve_app.engines.pt.engine import PtEngine
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.facts.process_memory import resident_bytes

PROMPT = [5 + number % 50 for number in range(64)]
# Models that are built have a context of so many tokens, and a prompt cache has so many bytes.
CONTEXT, CACHE_MEMORY = 16384, "1GiB"
# A start is given so many seconds.
TIMEOUT_S = 300


def build(name: str, folder: Path) -> str:
    """Returns the folder of a model, which is built unless it is the demo."""
    if name == "demo":
        return model_path(DEMO_MODEL)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.pt_engine import shape

    config = shape(is_tied=True)
    config.max_position_embeddings = CONTEXT
    if name == "1GB":
        config.hidden_size, config.intermediate_size = 1344, 3584
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path(DEMO_MODEL)).save_pretrained(folder)
    return str(folder)


async def first_token(engine: PtEngine, prompt: list[int] = PROMPT) -> float:
    """Seconds until the first token of a greedy text."""
    begin = time.monotonic()
    await text_of(engine, prompt, 1)
    return time.monotonic() - begin


async def text_of(engine: PtEngine, prompt: list[int], tokens: int) -> str:
    """The greedy text of exactly `tokens` tokens."""
    params = SamplingParams(tokens, temperature=0, ignore_eos=True)
    return "".join([piece.text async for piece in engine.generator.generate(prompt, params)])


async def measure(folder: str, began: float, rounds: int) -> dict[str, Any]:
    """The figures of one model in this process, which was started at `began` of the monotonic clock."""
    fields = {"model": folder, "infer_backend": "pt", "device": "cpu", "dtype": "float32", "num_cpus": 2}
    engine = PtEngine(ModelConfig.from_args(fields), "parked")
    await engine.start()
    cold = time.monotonic() - began
    usual = statistics.median([await first_token(engine) for _ in range(5)])
    parks, wakes, firsts, freed = [], [], [], []
    for _ in range(rounds):
        before = resident_bytes()
        begin = time.monotonic()
        await engine.park()
        parks.append(time.monotonic() - begin)
        freed.append(before - resident_bytes())
        asked = asyncio.create_task(first_token(engine))
        await asyncio.sleep(0.1)
        begin = time.monotonic()
        await engine.wake()
        wakes.append(time.monotonic() - begin)
        await asked
        firsts.append(time.monotonic() - begin)
    held = (await engine.memory())[0].weights
    copy = engine.copy_bytes()
    await engine.stop()
    wake = statistics.median(wakes)
    return {
        "weights_mb": round(held / 1e6, 1),
        "copy_mb": round(copy / 1e6, 1),
        "cold_start_s": round(cold, 2),
        "first_park_s": round(parks[0], 3),
        "park_s": round(statistics.median(parks[1:] or parks), 3),
        "wake_s": round(wake, 3),
        "usual_first_token_s": round(usual, 3),
        "first_token_after_wake_s": round(statistics.median(firsts), 3),
        "rss_freed_mb": round(statistics.median(freed) / 1e6, 1),
        "wake_share": round(wake / cold, 3),
        "freed_share": round(statistics.median(freed) / held, 3),
        "first_share": round(statistics.median(firsts) / (wake + usual), 3),
    }


async def converse(folder: str, tokens: int) -> dict[str, Any]:
    """The figures of a conversation of so many tokens that is parked."""
    draw = random.Random(0)
    history, more = ([draw.randrange(5, 900) for _ in range(count)] for count in (tokens, 16))
    fields = {"model": folder, "infer_backend": "pt", "device": "cpu", "dtype": "float32", "num_cpus": 2}
    figures: dict[str, Any] = {}
    texts = []
    for budget in (CACHE_MEMORY, None):
        engine = PtEngine(ModelConfig.from_args({**fields, "prompt_cache_memory": budget}), "parked")
        await engine.start()
        if budget:
            first = await first_token(engine, history)
            await engine.park()
            await engine.wake()
            resumed = await first_token(engine, [*history, *more])
            figures = {"prefill_s": round(first, 2), "resume_s": round(resumed, 3)}
            figures["resume_share"] = round(resumed / first, 3)
        texts.append(await text_of(engine, [*history, *more], 32))
        await engine.stop()
    return {"conversation": tokens, **figures, "same_text": texts[0] == texts[1]}


def start(folder: str, rounds: int, conversation: int = 0) -> dict[str, Any]:
    """The figures of a process that is started for this model."""
    command = [sys.executable, "-m", "benchmarks.park_and_wake", "--folder", folder, "--rounds", str(rounds)]
    command += ["--began", str(time.monotonic()), "--conversation", str(conversation)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    figures: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Prints the figures of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="demo,100M,1GB")
    parser.add_argument("--conversation", type=int, default=0)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        if options.conversation:
            print(json.dumps(asyncio.run(converse(options.folder, options.conversation))))
        else:
            print(json.dumps(asyncio.run(measure(options.folder, options.began, options.rounds))))
        return
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory(prefix="serve-app-benchmark-") as folder:
            model = build(name, Path(folder))
            if options.conversation:
                if name != "demo":
                    print(json.dumps({"model": name, **start(model, 1, options.conversation)}), flush=True)
                continue
            start(model, 1)  # Brings the files into the page cache.
            print(json.dumps({"model": name, **start(model, options.rounds)}), flush=True)


if __name__ == "__main__":
    main()
