"""The plan of a model on the CPU beside what its process really holds.

    python -m benchmarks.planned_memory [--backend vllm] [--model serve-app/demo] [--kv 300MB] [--max-model-len 512]

Without --model, the model of about 100 M parameters of `benchmarks.pt_engine`. A process of its own loads the model and
runs as many requests of full length at once as the plan says. What an empty engine holds is taken off: for pt a process
that has imported the engine, for vLLM (which allocates much of its own at its start) one that serves a model of a few
kilobytes. Prints the planned bytes, the peak of resident memory beyond the empty engine, and the ratio of the two.
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
    pipe.send(peak_of(process.pid) - empty)


def measure_vllm(args: dict[str, Any], requests: int, pipe: Any) -> None:
    """Loads, fills the cache with prompts that differ, and sends the peak of resident memory."""
    import random

    import httpx

    from serve_app.config import ModelConfig
    from serve_app.engines.vllm_engine import VllmEngine

    async def run() -> None:
        engine = VllmEngine(ModelConfig.from_args(args), "planned")
        app = await engine.start()
        draw = random.Random(0)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=600) as client:

            async def one() -> None:
                prompt = [draw.randrange(10, 200) for _ in range(args["max_model_len"] - 2)]
                body = {"model": "planned", "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
                (await client.post("/v1/completions", json=body)).raise_for_status()

            await asyncio.gather(*(one() for _ in range(requests)))
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]  # The engine has a process of its own.
        pipe.send(sum(peak_of(process.pid) for process in family))
        await engine.stop()

    asyncio.run(run())


def peak_of(pid: int) -> int:
    """The most memory that was resident, in bytes."""
    return 1024 * int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0])


def tiny_model(folder: Path) -> None:
    """A model of a few kilobytes."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from serve_app.facts.checkpoint import DEMO_MODEL, model_path

    tokenizer = AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)


def held_by(target: Any, args: dict[str, Any], requests: int) -> int:
    """What the child process sends."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    child = context.Process(target=target, args=(args, requests, theirs))
    child.start()
    held: int = mine.recv()
    child.join()
    return held


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
    parser.add_argument("--backend", choices=("pt", "vllm"), default="pt")
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
            "infer_backend": options.backend,
            "device": "cpu",
            "num_cpus": 2,
        }
        args |= {"dtype": "float32", "kv_cache_memory_bytes": options.kv, "max_model_len": options.max_model_len}
        request = request_of("planned", ModelConfig.from_args(args), 1)
        (planned,) = make_plan([request], local_inventory()).models
        (rank,) = planned.ranks
        if options.backend == "pt":
            held = held_by(measure, args, planned.max_full_length_requests)
        else:
            empty = Path(folder) / "empty"
            tiny_model(empty)
            small = {**args, "model": str(empty), "kv_cache_memory_bytes": "1MiB", "max_model_len": 64}
            held = held_by(measure_vllm, args, planned.max_full_length_requests) - held_by(measure_vllm, small, 1)
    row = {term: round(getattr(rank, term).bytes / 1e6, 1) for term in ("weights", "kv_cache", "activation", "share")}
    row |= {"requests": planned.max_full_length_requests, "measured": round(held / 1e6, 1)}
    print(json.dumps(row | {"planned_to_measured": round(rank.share.bytes / held, 2)}))


if __name__ == "__main__":
    main()
