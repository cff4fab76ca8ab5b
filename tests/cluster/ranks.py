"""vLLM over several ranks on the CPU, in one process without Serve, and the death of each rank.

    python -m tests.cluster.ranks [--only pp1+3 tp2] [--without-deaths]

starts an engine with the demo model for each shape, and one more for the death of each of its ranks. It prints a line
of JSON for each: the answers that were right (greedy, float32, as the model was trained to give them), one after the
other, streamed and 32 at once, the seconds that each took, what each rank holds, and after the death what was raised,
how long it took, and what was left behind.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
START_TIMEOUT_S = 420.0
SHARED_MEMORY = Path("/dev/shm")


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
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if "VLLM::" in title:
            titles[child.pid] = title.strip()
    return dict(sorted(titles.items(), key=lambda item: ("EngineCore" not in item[1], item[1])))


def is_running(pid: int) -> bool:
    """Whether the process runs. One that has ended may wait for its parent to ask for its exit code."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shared_files() -> set[str]:
    """The files of shared memory on this machine, and the files by which vLLM's ranks find each other."""
    meetings = Path(tempfile.gettempdir()).glob("*vllm*")
    return {path.name for path in SHARED_MEMORY.iterdir()} | {path.name for path in meetings}


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


async def after_death(engine: VllmEngine, http: httpx.AsyncClient, pid: int) -> dict[str, Any]:
    """What is raised and answered once this process has been killed while requests run."""
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
        "raised": raised[:200], "noticed_after_s": round(noticed, 2), "answered_after_s": round(answers, 2),
        "statuses_of_lost": lost,
    }  # fmt: skip


async def one(shape: dict[str, Any], kill: int | None) -> dict[str, Any]:
    """The figures of one engine. `kill` is the number of the process that dies: the engine's own is 0."""
    before = shared_files()
    config = model_config(
        model=model_path(DEMO_MODEL), infer_backend="vllm", device="cpu", dtype="float32",
        kv_cache_memory_bytes=CACHE, max_model_len=1024, **shape,
    )  # fmt: skip
    engine = VllmEngine(config, "demo")
    started = time.monotonic()
    app = WholeBody(await engine.start(), config)
    found: dict[str, Any] = {"start_s": round(time.monotonic() - started, 1)}
    processes = rank_processes(os.getpid())
    found["processes"] = list(processes.values())
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=TIMEOUT_S) as http:
        if kill is None:
            found |= await asked(http)
            found["cache_blocks"] = engine.cache_blocks()
            ranks = await engine.memory()
            found["ranks"] = [
                {"pid": list(processes).index(rank.pid), "weights": rank.weights, "kv_cache": rank.kv_cache,
                 "held": rank.held} for rank in ranks
            ]  # fmt: skip
        else:
            found["killed"] = list(processes.values())[kill]
            found |= await after_death(engine, http, list(processes)[kill])
    stopping = time.monotonic()
    await engine.stop()
    found["stop_s"] = round(time.monotonic() - stopping, 2)
    deadline = time.monotonic() + 30
    while (left := [pid for pid in processes if is_running(pid)]) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    found["gone_after_s"] = round(time.monotonic() - stopping, 2)
    found["left"] = [processes[pid] for pid in left]
    found["left_files"] = sorted(shared_files() - before)
    return found


def apart(name: str, kill: int | None = None) -> dict[str, Any]:
    """The figures of one engine from a process of its own, because vLLM reads the stages from the environment."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    before = shared_files()
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.ranks", "--one", json.dumps([SHAPES[name], kill])],
        env=environment, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        return {"shape": name, "kill": kill, "error": done.stderr[-3000:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"shape": name, "kill": kill, **found, "left_files_at_end": sorted(shared_files() - before)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--without-deaths", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        shape, kill = json.loads(options.one)
        print(json.dumps(asyncio.run(one(shape, kill))))
        return
    for name in options.only:
        found = apart(name)
        print(json.dumps(found), flush=True)
        for kill in range(0 if options.without_deaths else len(found.get("processes", ()))):
            print(json.dumps(apart(name, kill)), flush=True)


if __name__ == "__main__":
    main()
