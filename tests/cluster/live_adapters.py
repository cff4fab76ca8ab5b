"""Adapters more and less by `serve deploy`, under load, on two replicas.

    python -m tests.cluster.live_adapters FOLDER [--backend pt] [--in-user-config] [--loads 8]

FOLDER has adapters of the demo model in subfolders. All but the last serve from the start. While clients ask all of
them and the base, the last one is deployed, then a broken one, then both are taken out again. Prints one JSON object:
the seconds after each `serve deploy` until all replicas have what is wanted, the failed requests, whether the replicas'
processes are the same, how many texts each adapter gave (one is right, since decoding is greedy), and what a key for
one adapter reaches.
"""

import argparse
import asyncio
import json
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import aiohttp

from serve_app.access.keys import sha256_of
from tests.cluster.serve_run import ServeRun

QUESTION = "What is serve-app?"
REPLICAS = 2
ADMIN, ONE = "sk-of-the-administrator", "sk-of-one-adapter"
BROKEN = "/nowhere/adapter"


def config(adapters: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """A router and a model of two replicas with these adapters."""
    args: dict[str, Any] = {
        "model": "serve-app/demo", "infer_backend": options.backend, "device": "cpu", "dtype": "float32",
        "num_cpus": 0.5, "max_model_len": 512, "max_num_seqs": 16, "max_loras": 4, "max_lora_rank": 8,
    }  # fmt: skip
    deployment: dict[str, Any] = {"name": "Model", "num_replicas": REPLICAS}
    if options.in_user_config:
        deployment["user_config"] = {"adapters": adapters}
    else:
        args["adapters"] = adapters
    return {
        "applications": [
            {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"},
            {
                "name": "qwen", "import_path": "serve_app.app:model", "route_prefix": "/models/qwen", "args": args,
                "deployments": [deployment],
            },
        ]
    }  # fmt: skip


def replicas(serve: ServeRun) -> set[int]:
    """The pids of the replicas."""
    return {pid for pid, command in serve.processes().items() if re.search(r"ServeReplica:qwen:Model", command)}


class Load:
    """Clients that ask one name after the other, and what they were told."""

    def __init__(self, session: aiohttp.ClientSession, names: list[str], clients: int):
        self.names, self.texts = names, defaultdict[str, Counter[str]](Counter)
        self.failed: list[str] = []
        self._session, self._wanted = session, True
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(clients)]

    async def _run(self, number: int) -> None:
        turn = number
        while self._wanted:
            name = self.names[turn % len(self.names)]
            turn += 1
            try:
                status, text = await ask(self._session, name, stream=bool(turn % 2))
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                status, text = 0, repr(error)
            if status != 200:
                self.failed.append(f"{name}: {status} {text[:300]}")
            else:
                self.texts[name][text] += 1

    async def end(self) -> None:
        """Ends all."""
        self._wanted = False
        await asyncio.gather(*self._tasks)


async def ask(
    session: aiohttp.ClientSession, name: str, stream: bool = False, key: str = ADMIN, path: str = ""
) -> tuple[int, str]:
    """The status and the text of one answer."""
    body = {
        "model": name, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 40,
        "stream": stream,
    }  # fmt: skip
    headers = {"authorization": f"Bearer {key}"}
    async with session.post(f"{path}/v1/chat/completions", json=body, headers=headers) as reply:
        if reply.status != 200:
            return reply.status, await reply.text()
        if not stream:
            return 200, str((await reply.json())["choices"][0]["message"]["content"])
        text = ""
        async for line in reply.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return 500, json.dumps(event)
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        return 200, text


def has(name: str, state: str, count: int) -> Any:
    """Whether an adapter is so on so many replicas."""
    return lambda told: told.get(name, {}).get("status") == state and told[name]["replicas"] == count


async def settled(serve: ServeRun, adapters: dict[str, str], options: argparse.Namespace, *until: Any) -> float:
    """The seconds from the end of `serve deploy` until all of this holds."""
    await asyncio.to_thread(serve.deploy, config(adapters, options))
    start = time.monotonic()
    await asyncio.to_thread(serve.wait_until, lambda told: all(holds(told) for holds in until), 120)
    return round(time.monotonic() - start, 2)


async def live(serve: ServeRun, adapters: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """One more, a broken one, and both less."""
    *first, late = adapters
    at_start = {name: adapters[name] for name in first}
    async with aiohttp.ClientSession(serve.url, timeout=aiohttp.ClientTimeout(total=120)) as session:
        load = Load(session, ["qwen", *first, *(f"qwen:{name}" for name in first)], options.loads)
        await asyncio.sleep(3)
        before = replicas(serve)
        more = await settled(serve, adapters, options, has(late, "ready", REPLICAS))
        load.names.append(late)
        await asyncio.sleep(3)
        with_broken = {**adapters, "broken": BROKEN}
        broken = await settled(serve, with_broken, options, has("broken", "failed", 0), has(late, "ready", REPLICAS))
        told = await ask(session, "broken")
        status = await asyncio.to_thread(serve.status_of_ours)
        load.names.remove(late)
        await asyncio.sleep(5)  # Those that ask it still are answered.
        less = await settled(serve, at_start, options, lambda seen: late not in seen and "broken" not in seen)
        gone = await ask(session, late)
        await asyncio.sleep(2)
        await load.end()
        reached = {
            f"{path or 'by name'} {name}": (await ask(session, name, key=ONE, path=path))[0]
            for path in ("", "/models/qwen")
            for name in (first[0], f"qwen:{first[0]}", first[1], f"qwen:{first[1]}", "qwen")
        }
    texts = {name: next(iter(said)) for name, said in load.texts.items() if ":" not in name}
    return {
        "more_s": more, "broken_s": broken, "less_s": less,
        "broken": (told[0], told[1][:200]), "gone": (gone[0], gone[1][:200]),
        "status_of_adapters": {each["name"]: each["state"] for each in status["models"][0]["adapters"]},
        "same_processes": before == replicas(serve), "requests": sum(map(Counter.total, load.texts.values())),
        "failed": load.failed[:5], "failures": len(load.failed),
        "texts_each": max(map(len, load.texts.values())), "different_texts": len(set(texts.values())),
        "names": len(texts), "key_of_one": reached, "texts": texts,
    }  # fmt: skip


def main() -> None:
    """Prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", default="pt")
    parser.add_argument("--in-user-config", action="store_true")
    parser.add_argument("--loads", type=int, default=8)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    adapters = {path.name: str(path.absolute()) for path in sorted(options.folder.iterdir()) if path.is_dir()}
    first = {name: adapters[name] for name in list(adapters)[:-1]}
    serve = ServeRun(
        config(first, options), 16, headers={"authorization": f"Bearer {ADMIN}"}, start=False, is_set_before_ray=True
    )
    keys = serve.folder / "keys.yaml"
    keys.write_text(
        f"keys:\n- {{name: admin, sha256: {sha256_of(ADMIN)}}}\n"
        f"- {{name: one, sha256: {sha256_of(ONE)}, models: [{next(iter(adapters))}]}}\n"
    )
    serve.environment["SERVE_APP_API_KEYS_FILE"] = str(keys)
    try:
        serve._run()
        serve.wait_until(lambda told: all(has(name, "ready", REPLICAS)(told) for name in first))
        print(json.dumps(asyncio.run(live(serve, adapters, options)), indent=1))
    except BaseException:
        print(serve.output()[-6000:], file=sys.stderr)
        raise
    finally:
        serve.stop(signal.SIGTERM)
        serve.clean_up()


if __name__ == "__main__":
    main()
