"""The plan of a model beside what its processes really hold.

    python -m benchmarks.planned_memory [--backend vllm] [--model serve-app/demo] [--kv 300MB] [--max-model-len 512]
    python -m benchmarks.planned_memory --device cuda --shape 7b --kv 8GiB --max-model-len 4096 [--backend vllm]

Without --model, one with random weights: about 100 M parameters, or with `--shape 7b` Qwen2-7B's 7.6 billion in
bfloat16 (15 GB of disk). A process of its own loads the model and runs as many requests of full length at once as the
plan says. Prints the planned bytes, the peak that was measured, and the ratio of the two.

On the CPU the peak is of resident memory, and what an empty engine holds is taken off: for pt a process that has
imported the engine, for vLLM (which allocates much of its own at its start) one that serves a model of a few kilobytes.
On a GPU it is what NVML says that all processes hold, less what they held before: nothing else may run there. The
engine's own account by ranks is printed beside it.
"""

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil


def measure(args: dict[str, Any], requests: int, pipe: Any) -> None:
    """Loads, fills the cache, and sends the bytes beyond the empty engine."""
    import torch

    from serve_app.config import ModelConfig
    from serve_app.engines.pt.core.sequence import SamplingParams
    from serve_app.engines.pt.engine import PtEngine
    from serve_app.facts.gpus import local_gpus, visible_gpus
    from serve_app.replica.replica_plan import plan_replica

    torch.set_num_threads(2)
    torch.nn.Linear(64, 64)(torch.zeros(2, 64))
    process = psutil.Process()
    empty = process.memory_info().rss

    async def run() -> None:
        config = ModelConfig.from_args(args)
        gpus = [] if config.device == "cpu" else visible_gpus(local_gpus())[:1]
        engine = PtEngine(config, "planned", plan_replica(config, gpus))
        await engine.start()
        length = engine.generator.max_tokens_per_request
        params = SamplingParams(length - 8, temperature=0, ignore_eos=True)

        async def one() -> None:
            async for _ in engine.generator.generate([1] * 8, params):
                pass

        await asyncio.gather(*(one() for _ in range(requests)))
        pipe.send((peak_of(process.pid) - empty, [asdict(rank) for rank in await engine.memory()]))
        await engine.stop()

    asyncio.run(run())


def measure_vllm(args: dict[str, Any], requests: int, pipe: Any) -> None:
    """Loads, fills the cache with prompts that differ, and sends the peak of resident memory."""
    import random

    import httpx

    from serve_app.config import ModelConfig
    from serve_app.engines.vllm.engine import VllmEngine
    from serve_app.facts.gpus import local_gpus, visible_gpus
    from serve_app.replica.replica_plan import plan_replica, with_planned_memory

    async def run() -> None:
        config = ModelConfig.from_args(args)
        gpus = [] if config.device == "cpu" else visible_gpus(local_gpus())[:1]
        engine = VllmEngine(with_planned_memory(config, plan_replica(config, gpus)), "planned")
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
        pipe.send((sum(peak_of(process.pid) for process in family), [asdict(rank) for rank in await engine.memory()]))
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


def big_model(folder: Path) -> None:
    """Qwen2-7B's shape with random weights in bfloat16, written in shards."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    config = Qwen2Config(vocab_size=152064, num_key_value_heads=4, max_position_embeddings=32768, **shape)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # The model is planned and measured on the card that made it.


def held_by(target: Any, args: dict[str, Any], requests: int) -> tuple[int, list[dict[str, Any]]]:
    """What the child process sends: its peak, and the engine's own account. On a GPU the peak is NVML's."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    child = context.Process(target=target, args=(args, requests, theirs))
    used = gpu_used() if args["device"] == "cuda" else 0
    peaks, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            peaks.append(gpu_used() - used)

    if args["device"] == "cuda":
        threading.Thread(target=watch, daemon=True).start()
    child.start()
    theirs.close()  # So that a child that dies is not waited for.
    held, ranks = mine.recv()
    done.set()
    child.join()
    return (max(peaks) if args["device"] == "cuda" else held), ranks


def gpu_used() -> int:
    """Bytes of the first GPU that are not free."""
    from serve_app.facts.gpus import local_gpus

    gpu = local_gpus()[0]
    return gpu.total_bytes - gpu.free_bytes


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("pt", "vllm"), default="pt")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=("100m", "7b"), default="100m")
    parser.add_argument("--model")
    parser.add_argument("--kv", default="300MB")
    parser.add_argument("--max-model-len", type=int, default=512)
    return parser.parse_args()


def model_folder(options: argparse.Namespace, folder: Path) -> str:
    """The model that is asked for; one of random weights is made in `folder`."""
    from transformers import AutoTokenizer

    from benchmarks.pt_engine import build_model
    from serve_app.facts.checkpoint import DEMO_MODEL, model_path

    if options.model is not None:
        return model_path(options.model)
    if options.shape == "7b":
        big_model(folder)
    else:
        build_model(folder, "float32")
    AutoTokenizer.from_pretrained(model_path(DEMO_MODEL)).save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Plans, measures, and prints one line of JSON."""
    from serve_app.cli.plan.plan import request_of
    from serve_app.config import ModelConfig
    from serve_app.facts.inventory import local_inventory
    from serve_app.planning.planner import make_plan

    options = parsed()
    with tempfile.TemporaryDirectory(prefix="serve-app-benchmark-") as folder:
        args = {"model": model_folder(options, Path(folder)), "infer_backend": options.backend, "num_cpus": 2}
        args |= {"device": options.device, "dtype": "auto" if options.shape == "7b" else "float32"}
        args |= {"kv_cache_memory_bytes": options.kv, "max_model_len": options.max_model_len}
        request = request_of("planned", ModelConfig.from_args(args), 1)
        seen = local_inventory()  # Of several GPUs, the first one is measured.
        first = replace(seen, devices=tuple(device for device in seen.devices if device.index in (None, 0)))
        (planned,) = make_plan([request], first).models
        (rank,) = planned.ranks
        target = measure if options.backend == "pt" else measure_vllm
        held, ranks = held_by(target, args, planned.max_full_length_requests)
        if options.backend == "vllm" and options.device == "cpu":
            empty = Path(folder) / "empty"
            tiny_model(empty)
            small = {**args, "model": str(empty), "kv_cache_memory_bytes": "1MiB", "max_model_len": 64}
            held -= held_by(measure_vllm, small, 1)[0]
    terms = ("weights", "kv_cache", "activation", "graph", "context", "share")
    row: dict[str, Any] = {term: round(getattr(rank, term).bytes / 1e6, 1) for term in terms}
    row |= {"requests": planned.max_full_length_requests, "measured": round(held / 1e6, 1), "ranks": ranks}
    print(json.dumps(row | {"planned_to_measured": round(rank.share.bytes / held, 3)}))


if __name__ == "__main__":
    main()
