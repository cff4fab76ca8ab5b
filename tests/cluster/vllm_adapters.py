"""vLLM with LoRA adapters on the CPU, in one process without Serve.

    python -m tests.cluster.vllm_adapters [--only one tp2 pp1+3]

starts an engine with the demo model and room for four of the sixteen adapters of `tests/lora` for each shape, and
prints a line of JSON: the answers that were right with 32 at once over all of them and the base, what each rank holds
for adapters, and what became of adapters that were replaced, removed and broken while others were asked.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file

from serve_app.engines.vllm import vllm_internals
from serve_app.errors import AdapterError
from tests.cluster.ranks import ANSWERS, AT_ONCE, SHAPES, Started, chat
from tests.lora import ADAPTERS_DIR, ANSWERS_FILE

OWN: Mapping[str, Mapping[str, str]] = json.loads(ANSWERS_FILE.read_text())
NAMES = sorted(OWN)[:16]
LATE = sorted(OWN)[16]
ROOM: dict[str, Any] = {"max_loras": 4, "max_lora_rank": 8}
BASE = "demo"
CLOSED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


def asked_in_turn(count: int) -> list[tuple[str, str, str]]:
    """The model, the question and the right answer of so many requests, over all adapters and the base in turn."""
    found = []
    for number in range(count):
        name = [*NAMES, BASE][number % (len(NAMES) + 1)]
        right: Mapping[str, str] = ANSWERS if name == BASE else OWN[name]
        question = list(right)[number % len(OWN[NAMES[0]])]
        found.append((name, question, right[question]))
    return found


async def answer(http: httpx.AsyncClient, name: str, question: str, **fields: Any) -> str:
    """The whole text, or what was answered instead of one. The model of an answer is the one that was asked for."""
    reply = await http.post("/v1/chat/completions", json=chat(question, model=name, **fields))
    if reply.status_code != 200:
        return f"{reply.status_code} {reply.text}"
    body = reply.json()
    text: str = body["choices"][0]["message"]["content"]
    return text if body["model"] == name else f"the model {body['model']} answers: {text}"


async def mixed(http: httpx.AsyncClient, count: int = AT_ONCE) -> dict[str, Any]:
    """How many of so many answers at once are right, and the first wrong one."""
    asked = asked_in_turn(count)
    texts = await asyncio.gather(*(answer(http, name, question) for name, question, _ in asked))
    wrong = [f"{name}: {text}" for (name, _, right), text in zip(asked, texts, strict=True) if text != right]
    return {"right": count - len(wrong), "of": count, "wrong": wrong[:2]}


async def first_words(http: httpx.AsyncClient, name: str, question: str, begun: asyncio.Event) -> str:
    """The text of a stream. `begun` is set at its first event."""
    text = ""
    async with http.stream("POST", "/v1/chat/completions", json=chat(question, model=name, stream=True)) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                begun.set()
                event = json.loads(line[6:])
                text += "".join(choice["delta"].get("content") or "" for choice in event.get("choices", []))
    return text


async def replaced(started: Started, folder: Path) -> dict[str, Any]:
    """An adapter whose files are overwritten at the same path while requests run with the old ones. The prefixes of all
    questions are cached by then."""
    old, new, question = NAMES[0], NAMES[1], next(iter(OWN[NAMES[0]]))
    engine, http = started.engine, started.http
    await engine.load_adapter("changing", folder)
    before = await answer(http, "changing", question)
    running = [asyncio.create_task(answer(http, "changing", question)) for _ in range(8)]
    await asyncio.sleep(0.05)
    shutil.copytree(ADAPTERS_DIR / new, folder, dirs_exist_ok=True)
    loading = asyncio.create_task(engine.load_adapter("changing", folder))
    texts = await asyncio.gather(*running)
    await loading
    after = [await answer(http, "changing", question) for _ in range(2)]
    return {
        "before": before == OWN[old][question],
        "meanwhile": sum(text in (OWN[old][question], OWN[new][question]) for text in texts),
        "after": [text == OWN[new][question] for text in after],
    }


async def removed(started: Started) -> dict[str, Any]:
    """The last adapter, which goes while requests run with it."""
    engine, http = started.engine, started.http
    await engine.load_adapter(LATE, ADAPTERS_DIR / LATE)
    question = next(iter(OWN[LATE]))
    begun = asyncio.Event()
    stream = asyncio.create_task(first_words(http, LATE, question, begun))
    await begun.wait()
    leaving = asyncio.create_task(engine.unload_adapter(LATE))
    await asyncio.sleep(0)
    refused = (await answer(http, LATE, question))[:3]
    text = await stream
    await leaving
    return {
        "stream": text == OWN[LATE][question],
        "refused": refused,
        "left": len(await engine._client.list_loras()),
        "copies": len(list(engine._adapters._copies.folder.glob("*/"))),  # type: ignore[union-attr]
    }


def broken_ones(folder: Path) -> Iterator[tuple[str, Path]]:
    """Adapters that a look at files may not find broken, each in a folder of its own."""
    source = ADAPTERS_DIR / NAMES[0]
    for kind in ("wide", "other", "cut", "empty"):
        own = folder / kind
        shutil.copytree(source, own)
        weights = own / "adapter_model.safetensors"
        tensors = load_file(weights)
        if kind == "wide":
            tensors = {
                name: torch.cat([each, each], -1) if "lora_A" in name else each for name, each in tensors.items()
            }
            save_file(tensors, weights)
        elif kind == "other":
            save_file({name.replace("q_proj", "z_proj"): each for name, each in tensors.items()}, weights)
        elif kind == "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        else:
            weights.unlink()
        yield kind, own


async def broken(started: Started, folder: Path) -> dict[str, str]:
    """What each broken adapter raises while others are asked. None of them may be found afterwards."""
    asked = asyncio.create_task(mixed(started.http))
    found = {}
    for kind, own in broken_ones(folder):
        try:
            await started.engine.load_adapter(kind, own)
            found[kind] = "it was taken"
        except AdapterError as error:
            found[kind] = str(error)
        status = (await answer(started.http, kind, "Who are you?"))[:3]
        if status != "404":
            found[kind] += f" and then answered {status}"
    beside = await asked
    return {**found, "beside": f"{beside['right']} of {beside['of']}"}


async def figures(shape: Mapping[str, Any]) -> dict[str, Any]:
    """All findings of one engine."""
    async with Started({**shape, **ROOM, "max_cpu_loras": 20}) as started:
        engine, http = started.engine, started.http
        for name in NAMES:
            await engine.load_adapter(name, ADAPTERS_DIR / name)
        found: dict[str, Any] = {"start_s": started.start_s, "mixed": await mixed(http), "again": await mixed(http)}
        ranks = await vllm_internals.ask_ranks(engine._client, "serve_app_adapter_bytes")
        found["buffers"], found["kept"] = [each[0] for each in ranks], [each[1] for each in ranks]
        listed = (await http.get("/v1/models")).json()["data"]
        found["listed"] = [[card["id"], card["parent"]] for card in listed][:2]
        statuses = [await http.post(path, json={"lora_name": "x", "lora_path": "/"}) for path in CLOSED]
        found["closed"] = [reply.status_code for reply in statuses]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shutil.copytree(ADAPTERS_DIR / NAMES[0], folder / "changing")
            found["replaced"] = await replaced(started, folder / "changing")
            found["removed"] = await removed(started)
            found["broken"] = await broken(started, folder)
        found["last"] = await mixed(http)
        await engine.check_health()
        copies = engine._adapters._copies.folder  # type: ignore[union-attr]
    found["copies_left"] = copies.exists()
    return found


def apart(name: str) -> Iterator[dict[str, Any]]:
    """The findings from a process of its own, because vLLM reads the stages from the environment."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cluster.vllm_adapters", "--one", name]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield json.loads(line)
    if done.returncode:
        yield {"shape": name, "error": f"it ended with {done.returncode}"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SHAPES, default=["one", "tp2", "pp1+3", "pp1+3,tp2"])
    parser.add_argument("--one", choices=SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps({"shape": options.one, **asyncio.run(figures(SHAPES[options.one]))}))
        return
    for name in options.only:
        for found in apart(name):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
