"""vLLM over several ranks on the CPU, in one process without Serve, and the death of each of its processes.

    python -m tests.cluster.ranks [--only pp1+3 tp2] [--without-deaths]
    python -m tests.cluster.ranks --served [--only pp1+3 tp2] [--without-deaths]

starts an engine with the demo model for each shape, and one more for the death of each further process of it. It prints
a line of JSON for each: the answers that were right (greedy, float32, as the model was trained to give them), one after
the other, 32 at once and streamed, the seconds that each took, and what each rank holds; and after the death what was
raised, how long it took, and what was left behind. `--served` does it through Serve (`served_ranks.py`).
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from serve_app.engines.vllm.engine import VllmEngine
from serve_app.errors import EngineError
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.replica.whole_body import WholeBody
from tests.builders import model_config
from tests.demo_answers import ANSWERS, QUESTIONS

# The demo model has 4 layers, 4 heads and 2 heads of KV cache.
SHAPES: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_parallel_size": 2},
    "pp1+3": {"pipeline_layers": [1, 3]},
    "pp3+1": {"pipeline_layers": [3, 1]},
    "pp3": {"pipeline_parallel_size": 3},
    "pp1+3,tp2": {"pipeline_layers": [1, 3], "tensor_parallel_size": 2},
}
AT_ONCE = 32
CACHE = "256MiB"
TIMEOUT_S = 120.0
SHARED_MEMORY = "/dev/shm"  # noqa: S108


def chat(question: str, **fields: Any) -> dict[str, Any]:
    """A greedy question."""
    return {
        "model": "demo", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 200,
        **fields,
    }  # fmt: skip


def rank_processes(of: int) -> dict[int, str]:
    """The processes of vLLM below a process: pid to title, the engine first, then its ranks in order."""
    titles = {}
    for child in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            titles[child.pid] = " ".join(child.cmdline())
    return engine_first(titles)


def engine_first(commands: Mapping[int, str]) -> dict[int, str]:
    """Those of vLLM among these processes, in the order of their ranks."""
    titles = {pid: title.strip() for pid, title in commands.items() if title.startswith("VLLM::")}
    return dict(sorted(titles.items(), key=lambda item: ("EngineCore" not in item[1], item[1])))


def is_running(pid: int) -> bool:
    """Whether the process runs. One that has ended may wait for its parent to ask for its exit code."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shared_files(pids: Iterable[int]) -> set[Path]:
    """The files of shared memory that these processes have mapped."""
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found |= {Path(region.path) for region in psutil.Process(pid).memory_maps() if is_shared(region.path)}
    return found


def is_shared(path: str) -> bool:
    """Whether it is a name in /dev/shm. The kernel marks one that was removed."""
    return path.startswith(f"{SHARED_MEMORY}/") and not path.endswith("(deleted)")


def left_behind(pids: Iterable[int], files: Iterable[Path], timeout_s: float = 30.0) -> list[str]:
    """Those of these processes and files that are there still after a bounded wait."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = [f"process {pid}" for pid in pids if is_running(pid)] + [str(path) for path in files if path.exists()]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


async def answer(http: httpx.AsyncClient, question: str) -> str:
    """The whole text."""
    reply = await http.post("/v1/chat/completions", json=chat(question))
    if reply.status_code != 200:
        return f"{reply.status_code} {reply.text}"
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


async def streamed(http: httpx.AsyncClient, question: str) -> str:
    """The text of a stream, put together."""
    text = ""
    async with http.stream("POST", "/v1/chat/completions", json=chat(question, stream=True)) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                text += "".join(choice["delta"].get("content") or "" for choice in event.get("choices", []))
    return text


async def asked(http: httpx.AsyncClient) -> dict[str, Any]:
    """How many answers are right, and the seconds."""
    started = time.monotonic()
    one = [await answer(http, question) for question in QUESTIONS[:8]]
    first = time.monotonic()
    together = await asyncio.gather(*(answer(http, QUESTIONS[number % len(QUESTIONS)]) for number in range(AT_ONCE)))
    second = time.monotonic()
    streams = await asyncio.gather(*(streamed(http, question) for question in QUESTIONS))
    third = time.monotonic()
    return {
        "one_by_one": sum(text == ANSWERS[QUESTIONS[number]] for number, text in enumerate(one)),
        "at_once": sum(text == ANSWERS[QUESTIONS[number % len(QUESTIONS)]] for number, text in enumerate(together)),
        "streamed": sum(text == ANSWERS[QUESTIONS[number]] for number, text in enumerate(streams)),
        "asked": [len(one), len(together), len(streams)],
        "seconds": [round(first - started, 2), round(second - first, 2), round(third - second, 2)],
    }


async def after_death(
    engine: VllmEngine, http: httpx.AsyncClient, processes: Mapping[int, str], number: int
) -> dict[str, Any]:
    """What is raised and answered once this process has been killed while requests run."""
    pid, title = list(processes.items())[number]
    running = [asyncio.create_task(answer(http, question)) for question in QUESTIONS[:8]]
    await asyncio.sleep(0.05)
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    raised = ""
    async with asyncio.timeout(TIMEOUT_S):
        while not raised:
            try:
                await engine.check_health()
                await asyncio.sleep(0.05)
            except EngineError as error:
                raised = str(error)
    noticed = time.monotonic() - killed
    async with asyncio.timeout(TIMEOUT_S):
        texts = await asyncio.gather(*running)
    answers = time.monotonic() - killed
    lost = sorted({text[:3] for number, text in enumerate(texts) if text != ANSWERS[QUESTIONS[number]]})
    return {
        "killed": title, "raised": raised[:200], "noticed_after_s": round(noticed, 2),
        "answered_after_s": round(answers, 2),
        "statuses_of_lost": lost,
    }  # fmt: skip


class Started:
    """An engine that runs, and a client of it."""

    def __init__(self, shape: Mapping[str, Any]):
        self._config = model_config(
            model=model_path(DEMO_MODEL), infer_backend="vllm", device="cpu", dtype="float32",
            kv_cache_memory_bytes=CACHE, max_model_len=1024, **shape,
        )  # fmt: skip
        self.engine = VllmEngine(self._config, "demo")

    async def __aenter__(self) -> Self:
        started = time.monotonic()
        app = WholeBody(await self.engine.start(), self._config)
        self.start_s = round(time.monotonic() - started, 1)
        self.processes = rank_processes(os.getpid())
        self.files = shared_files(self.processes)
        transport = httpx.ASGITransport(app=app)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=TIMEOUT_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()
        await self.engine.stop()


async def figures(started: Started) -> dict[str, Any]:
    """What it answers and what it holds."""
    engine = started.engine
    ranks = [
        {"process": started.processes.get(rank.pid), "weights": rank.weights, "kv_cache": rank.kv_cache,
         "held": rank.held} for rank in await engine.memory()
    ]  # fmt: skip
    return {
        "start_s": started.start_s, "processes": list(started.processes.values()), **await asked(started.http),
        "cache_blocks": engine.cache_blocks(), "ranks": ranks,
    }  # fmt: skip


async def run_shape(shape: Mapping[str, Any], with_deaths: bool) -> AsyncIterator[dict[str, Any]]:
    """The figures of one engine, and what comes after the death of each of its processes in an engine of its own."""
    async with Started(shape) as started:
        yield await figures(started)
        count = len(started.processes)
        if with_deaths:
            yield await after_death(started.engine, started.http, started.processes, 0)
    ended = time.monotonic()
    left = left_behind(started.processes, started.files)
    yield {"left": left, "gone_after_s": round(time.monotonic() - ended, 2)}
    for number in range(1, count if with_deaths else 1):
        async with Started(shape) as started:
            told = await after_death(started.engine, started.http, started.processes, number)
        ended = time.monotonic()
        left = left_behind(started.processes, started.files)
        yield {**told, "left": left, "gone_after_s": round(time.monotonic() - ended, 2)}


async def print_shape(name: str, with_deaths: bool) -> None:
    """A line for each finding."""
    async for found in run_shape(SHAPES[name], with_deaths):
        print(json.dumps({"shape": name, **found}), flush=True)


def apart(name: str, with_deaths: bool) -> Iterator[dict[str, Any]]:
    """The findings from a process of its own, because vLLM reads the stages from the environment."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cluster.ranks", "--one", name]
    command += [] if with_deaths else ["--without-deaths"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        yield {"shape": name, "error": f"it ended with {process.returncode}"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--without-deaths", action="store_true")
    parser.add_argument("--served", action="store_true")
    parser.add_argument("--one", choices=SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        asyncio.run(print_shape(options.one, not options.without_deaths))
        return
    if options.served:
        from tests.cluster.served_ranks import findings  # It needs the functions above.
    else:
        findings = apart
    for name in options.only:
        for found in findings(name, not options.without_deaths):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
