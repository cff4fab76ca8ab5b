"""The plan of a pt model on the CPU beside what its process really holds.

    python -m benchmarks.planned_memory [--model serve-app/demo] [--kv 300MB] [--max-model-len 512]

Without --model, the model of about 100 M parameters of `benchmarks.pt_engine`. A process of its own imports the engine
(the empty engine), loads the model, and runs as many requests of full length at once as the plan says. Prints the
planned bytes, the process's peak of resident memory beyond the empty engine, and the ratio of the two.
"""

import argparse
import asyncio
import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import psutil


def measure(args: dict[str, Any], requests: int, pipe: Any) -> None:
    """Loads, fills the cache, and sends the bytes beyond the empty engine."""
    import torch

    from serve_app.config import ModelConfig
    from serve_app.engines.pt.engine import PtEngine
    from serve_app.engines.pt.sequence import SamplingParams

    torch.set_num_threads(2)
    torch.nn.Linear(64, 64)(torch.zeros(2, 64))
    process = psutil.Process()
    empty = process.memory_info().rss

    async def run() -> None:
        engine = PtEngine(ModelConfig.from_args(args), "planned")
        await engine.start()
        length = engine.generator.max_tokens_per_request
        params = SamplingParams(length - 8, temperature=0, ignore_eos=True)

        async def one() -> None:
            async for _ in engine.generator.generate([1] * 8, params):
                pass

        await asyncio.gather(*(one() for _ in range(requests)))
        await engine.stop()

    asyncio.run(run())
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    pipe.send(1024 * int(peak) - empty)


def main() -> None:
    """Plans, measures, and prints one line of JSON."""
    from transformers import AutoTokenizer

    from benchmarks.pt_engine import build_model
    from serve_app.cli.plan import request_of
    from serve_app.config import ModelConfig
    from serve_app.facts.checkpoint import DEMO_MODEL, model_path
    from serve_app.facts.inventory import local_inventory
    from serve_app.planning.planner import make_plan

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--kv", default="300MB")
    parser.add_argument("--max-model-len", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="serve-app-benchmark-") as folder:
        if options.model is None:
            build_model(Path(folder), "float32")
            AutoTokenizer.from_pretrained(model_path(DEMO_MODEL)).save_pretrained(folder)
        args = {
            "model": model_path(options.model) if options.model else folder,
            "infer_backend": "pt",
            "device": "cpu",
            "num_cpus": 2,
        }
        args |= {"dtype": "float32", "kv_cache_memory_bytes": options.kv, "max_model_len": options.max_model_len}
        request = request_of("planned", ModelConfig.from_args(args), 1)
        (planned,) = make_plan([request], local_inventory()).models
        (rank,) = planned.ranks
        mine, theirs = multiprocessing.get_context("spawn").Pipe()
        child = multiprocessing.get_context("spawn").Process(
            target=measure, args=(args, planned.max_full_length_requests, theirs)
        )
        child.start()
        held = mine.recv()
        child.join()
    row = {term: round(getattr(rank, term).bytes / 1e6, 1) for term in ("weights", "kv_cache", "activation", "share")}
    row |= {"requests": planned.max_full_length_requests, "measured": round(held / 1e6, 1)}
    print(json.dumps(row | {"planned_to_measured": round(rank.share.bytes / held, 2)}))


if __name__ == "__main__":
    main()
