"""How long an engine takes to park, to wake and to give its next token, beside its cold start, and what it frees.

    python -m benchmarks.park_and_wake [--rounds 3] [--models demo,100M,1GB] [--conversation TOKENS]
    python -m benchmarks.park_and_wake --device cuda --models 8B [--backends pt,vllm]

Each model is started in a process of its own, all but the demo with random weights that are built on the spot. `8B` has
the shape of Llama 3.1 8B in bfloat16. It takes 16 GB of disk, as much of the host's memory for its copy, and 20 GB of
the GPU, on which nothing else may run. vLLM can park only on a GPU.

A cold start is counted from the start of the process until the engine can answer, with the model's files in the page
cache, as they are after a first start. The engine parks and wakes `--rounds` times, and the figures are medians. The
first park also makes the copy, which vLLM makes each time. A request for one token that comes while the engine is
parked measures the first token after a wake. Prints one line of JSON for each model and engine:

    wake_share      a wake as a share of the cold start, which must be at most 0.25
    freed_share     the memory of the device that a park frees as a share of the weights, and on a GPU of weights and
                    KV cache, at least 0.95 where the tensors are much larger than a page
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

import httpx

from serve_app.config import ModelConfig
from serve_app.engines.engine import create_engine
from serve_app.engines.pt.core.sequence import SamplingParams
from serve_app.engines.pt.engine import PtEngine
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.facts.process_memory import resident_bytes
from serve_app.replica.whole_body import WholeBody

PROMPT = [5 + number % 50 for number in range(64)]
# Models that are built have a context of so many tokens, and a prompt cache has so many bytes.
CONTEXT, CACHE_MEMORY = 16384, "1GiB"
# The longest text and the KV cache of the model for GPUs.
CONTEXT_ON_GPU, CACHE_ON_GPU = 8192, "4GiB"
# A start is given so many seconds. That of a large model reads its files from a disk.
TIMEOUT_S = 900


def build(name: str, folder: Path) -> str:
    """Returns the folder of a model, which is built unless it is the demo."""
    if name == "demo":
        return model_path(DEMO_MODEL)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.pt_engine import shape

    if name == "8B":
        return build_8b(folder)
    config = shape(is_tied=True)
    config.max_position_embeddings = CONTEXT
    if name == "1GB":
        config.hidden_size, config.intermediate_size = 1344, 3584
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path(DEMO_MODEL)).save_pretrained(folder)
    return str(folder)


def build_8b(folder: Path) -> str:
    """Returns the folder of a model with the shape of Llama 3.1 8B."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=CONTEXT_ON_GPU, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def fields_of(folder: str, backend: str, device: str) -> dict[str, Any]:
    """Returns the fields of the config. On a GPU the model is one of a pool, so that vLLM can sleep."""
    fields = {"model": folder, "infer_backend": backend, "device": device}
    if device == "cpu":
        return fields | {"dtype": "float32", "num_cpus": 2}
    return fields | {
        "dtype": "auto", "max_model_len": CONTEXT_ON_GPU, "kv_cache_memory_bytes": CACHE_ON_GPU,
        "residency": {"policy": "swap"},
    }  # fmt: skip


def used_bytes(device: str) -> int:
    """Returns the memory that is in use: of this process on the CPU, and of the whole GPU."""
    if device == "cpu":
        return resident_bytes()
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


async def first_answer(http: httpx.AsyncClient) -> float:
    """Seconds until the answer to a request for a single token."""
    begin = time.monotonic()
    body = {"model": "parked", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    (await http.post("/v1/completions", json=body)).raise_for_status()
    return time.monotonic() - begin


async def first_token(engine: PtEngine, prompt: list[int] = PROMPT) -> float:
    """Seconds until the first token of a greedy text."""
    begin = time.monotonic()
    await text_of(engine, prompt, 1)
    return time.monotonic() - begin


async def text_of(engine: PtEngine, prompt: list[int], tokens: int) -> str:
    """The greedy text of exactly `tokens` tokens."""
    params = SamplingParams(tokens, temperature=0, ignore_eos=True)
    return "".join([piece.text async for piece in engine.generator.generate(prompt, params)])


async def measure(folder: str, began: float, rounds: int, backend: str, device: str) -> dict[str, Any]:
    """The figures of one model in this process, which was started at `began` of the monotonic clock."""
    config = ModelConfig.from_args(fields_of(folder, backend, device))
    engine = create_engine(config, "parked")
    app = WholeBody(await engine.start(), config)  # As the replica has it.
    cold = time.monotonic() - began
    parking = engine.parking()
    if parking is None:
        raise SystemExit(f"{backend} cannot park on {device}. Its log says why.")
    parks, wakes, firsts, freed, copies = [], [], [], [], []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://parked", timeout=60) as http:
        usual = statistics.median([await first_answer(http) for _ in range(5)])
        ranks = await engine.memory()
        for _ in range(rounds):
            before = used_bytes(device)
            begin = time.monotonic()
            await parking.park()
            parks.append(time.monotonic() - begin)
            freed.append(before - used_bytes(device))
            copies.append(parking.copy_bytes())
            asked = asyncio.create_task(first_answer(http))
            await asyncio.sleep(0.1)
            begin = time.monotonic()
            await parking.wake()
            wakes.append(time.monotonic() - begin)
            await asked
            firsts.append(time.monotonic() - begin)
    await engine.stop()
    weights = sum(rank.weights for rank in ranks)
    held = weights + (0 if device == "cpu" else sum(rank.kv_cache for rank in ranks))
    wake = statistics.median(wakes)
    return {
        "backend": backend,
        "device": device,
        "weights_mb": round(weights / 1e6, 1),
        "copy_mb": round(max(copies) / 1e6, 1),
        "cold_start_s": round(cold, 2),
        "first_park_s": round(parks[0], 3),
        "park_s": round(statistics.median(parks[1:] or parks), 3),
        "wake_s": round(wake, 3),
        "usual_first_token_s": round(usual, 3),
        "first_token_after_wake_s": round(statistics.median(firsts), 3),
        "freed_mb": round(statistics.median(freed) / 1e6, 1),
        "wake_share": round(wake / cold, 3),
        "freed_share": round(statistics.median(freed) / held, 3),
        "first_share": round(statistics.median(firsts) / (wake + usual), 3),
    }


async def converse(folder: str, tokens: int) -> dict[str, Any]:
    """The figures of a conversation of so many tokens that is parked."""
    draw = random.Random(0)
    history, more = ([draw.randrange(5, 900) for _ in range(count)] for count in (tokens, 16))
    fields = fields_of(folder, "pt", "cpu")
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


def start(folder: str, rounds: int, conversation: int = 0, backend: str = "pt", device: str = "cpu") -> dict[str, Any]:
    """The figures of a process that is started for this model."""
    command = [sys.executable, "-m", "benchmarks.park_and_wake", "--folder", folder, "--rounds", str(rounds)]
    command += ["--began", str(time.monotonic()), "--conversation", str(conversation)]
    command += ["--backends", backend, "--device", device]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    figures: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Prints the figures of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="demo,100M,1GB")
    parser.add_argument("--conversation", type=int, default=0)
    parser.add_argument("--backends", default="pt")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        if options.conversation:
            print(json.dumps(asyncio.run(converse(options.folder, options.conversation))))
        else:
            told = measure(options.folder, options.began, options.rounds, options.backends, options.device)
            print(json.dumps(asyncio.run(told)))
        return
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory(prefix="serve-app-benchmark-") as folder:
            model = build(name, Path(folder))
            if options.conversation:
                if name != "demo":
                    print(json.dumps({"model": name, **start(model, 1, options.conversation)}), flush=True)
                continue
            for backend in options.backends.split(","):
                start(model, 1, 0, backend, options.device)  # Brings the files into the page cache.
                found = start(model, options.rounds, 0, backend, options.device)
                print(json.dumps({"model": name, **found}), flush=True)


if __name__ == "__main__":
    main()
