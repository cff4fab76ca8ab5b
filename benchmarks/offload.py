"""The pt engine with most of the model on disk: what one request costs, and what eight at once cost.

    python -m benchmarks.offload [--tokens 16] [--rounds 3]

The 400 MB model of `benchmarks.pt_engine` in float32, with `max_memory: {cpu: 150MB, disk: 1GB}`. Every step reads the
modules on disk once, for all sequences together: that is what continuous batching saves here. Prints how many modules
are on disk, the seconds of one request and of eight at once, in turns, and the ratio of the medians; the answers are
compared with those of the same model without a limit.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.pt_engine import VOCABULARY, build_model
from serve_app.config import ModelConfig
from serve_app.engines.pt.core.sequence import SamplingParams
from serve_app.engines.pt.engine import PtEngine
from serve_app.facts.checkpoint import DEMO_MODEL, model_path

LIMITS = {"cpu": "150MB", "disk": "1GB"}


async def answer(engine: PtEngine, prompt: list[int], tokens: int) -> str:
    """The greedy text of exactly `tokens` tokens."""
    params = SamplingParams(tokens, temperature=0, ignore_eos=True)
    return "".join([piece.text async for piece in engine.generator.generate(prompt, params, ())])


async def start(folder: str, limits: dict[str, str] | None) -> PtEngine:
    """A started engine."""
    config = {"model": folder, "infer_backend": "pt", "device": "cpu", "num_cpus": 2, "max_memory": limits}
    engine = PtEngine(ModelConfig.from_args({key: value for key, value in config.items() if value}), "offloaded")
    await engine.start()
    return engine


async def timed(engine: PtEngine, prompts: list[list[int]], tokens: int) -> tuple[float, list[str]]:
    """Seconds until all have ended, and their texts."""
    begin = time.monotonic()
    texts = await asyncio.gather(*(answer(engine, prompt, tokens) for prompt in prompts))
    return time.monotonic() - begin, list(texts)


async def measure(folder: str, tokens: int, rounds: int) -> dict[str, object]:
    """The figures, as printed."""
    draw = random.Random(0)
    prompts = [[draw.randrange(1, VOCABULARY) for _ in range(draw.randint(8, 24))] for _ in range(8)]
    resident = await start(folder, None)
    _, expected = await timed(resident, prompts, tokens)
    await resident.stop()
    engine = await start(folder, LIMITS)
    places = list(engine.generator.loaded.device_map.values())
    await timed(engine, prompts[:1], tokens)  # Warms the page cache.
    one, eight, right = [], [], True
    for _ in range(rounds):
        one.append((await timed(engine, prompts[:1], tokens))[0])
        seconds, texts = await timed(engine, prompts, tokens)
        eight.append(seconds)
        right &= texts == expected
    await engine.stop()
    ratio = statistics.median(eight) / statistics.median(one)
    return {
        "modules_on_disk": f"{places.count('disk')} of {len(places)}",
        "one_s": round(statistics.median(one), 2),
        "eight_s": round(statistics.median(eight), 2),
        "ratio": round(ratio, 2),
        "answers_equal_resident": right,
    }


def main() -> None:
    """Builds the model and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="serve-app-benchmark-") as folder:
        build_model(Path(folder), "float32")
        AutoTokenizer.from_pretrained(model_path(DEMO_MODEL)).save_pretrained(folder)
        print(json.dumps(asyncio.run(measure(folder, options.tokens, options.rounds))))


if __name__ == "__main__":
    main()
