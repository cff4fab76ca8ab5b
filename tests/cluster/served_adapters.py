"""LoRA adapters through Serve, with both engines, while they come and go and replicas die.

    python -m tests.cluster.served_adapters [--only pt vllm] [--replicas 2]

starts a Serve with the demo model on each engine and sixteen of the adapters of `tests/lora`, whose answers are known
word for word. It prints a line of JSON with what clients saw while a seventeenth adapter was deployed to each engine,
together with a broken one, and both were taken out again; one with what became of an adapter in a folder that pt
watches, while a model with its name was deployed and while all replicas were killed; and one for each engine: what 32
clients saw at once over all adapters and the base, by name and by route, and while a replica was killed. It exits with
1 if any of these answers was another one or none.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster.conftest import model
from tests.cluster.serve_run import ServeRun
from tests.cluster.storm import ask, serving_pids
from tests.demo_answers import ANSWERS
from tests.lora import ADAPTERS_DIR, ANSWERS_FILE

OWN: Mapping[str, Mapping[str, str]] = json.loads(ANSWERS_FILE.read_text())
*FIRST, LATE = sorted(OWN)
ENGINES = ("pt", "vllm")
AT_ONCE, LOAD = 32, 8
TIMEOUT_S, LIVE_TIMEOUT_S = 300.0, 120.0
BROKEN = "/nowhere/adapter"
# These lie in the folder that pt watches, and no config names them. Their files are those of the first one.
WATCHED, SECOND = "pt-watched", "pt-second"
# Fewer slots than adapters, so that they take turns.
ROOM = {"max_loras": 6, "max_lora_rank": 8, "max_cpu_loras": 20}


def named(engine: str, adapter: str) -> str:
    """The name of an adapter at an engine. All names of a Serve differ."""
    return f"{engine}-{adapter}"


def folders(engine: str, adapters: Sequence[str]) -> dict[str, str]:
    """The adapters of an engine, as a config has them."""
    return {named(engine, adapter): str(ADAPTERS_DIR / adapter) for adapter in adapters}


class AdapterServe(ServeRun):
    """It, once every replica has every adapter."""

    def __init__(self, replicas: Mapping[str, int]):
        """`replicas` is their number for each engine."""
        self.replicas = replicas
        self.watched = Path(tempfile.mkdtemp(prefix="sa-"))
        shutil.copytree(ADAPTERS_DIR / FIRST[0], self.watched / WATCHED)
        self.adapters = {engine: folders(engine, FIRST) for engine in replicas}
        super().__init__(self.settings(), cpus=4 + sum(replicas.values()), is_set_before_ray=True)
        self.wait_until(lambda told: all(self.has_all(told, engine) for engine in replicas))

    def settings(self) -> dict[str, Any]:
        """The file as it is to be deployed next."""
        router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
        applications = [router]
        for engine, count in self.replicas.items():
            fields = {"max_model_len": 512, "max_num_seqs": AT_ONCE, "num_cpus": 0.5, **ROOM}
            served = model(engine, infer_backend=engine, adapters=self.adapters[engine], **fields)
            if engine == "pt":
                served["args"]["adapters_folder"] = str(self.watched)
            if engine == "vllm":
                served["args"]["kv_cache_memory_bytes"] = "256MiB"
                served["runtime_env"] = {"env_vars": {"VLLM_LOGGING_LEVEL": "ERROR"}}
            served["deployments"] = [{"name": "Model", "num_replicas": count, "health_check_period_s": 1.0}]
            applications.append(served)
        return {"applications": applications}

    def clean_up(self) -> None:
        """Removes the watched folder too."""
        super().clean_up()
        shutil.rmtree(self.watched, ignore_errors=True)

    def has_all(self, told: Mapping[str, Any], engine: str) -> bool:
        """Whether all replicas of a model have all of its adapters."""
        return all(self.has(told, name) for name in [*self.adapters[engine], *([WATCHED] if engine == "pt" else [])])

    def has(self, told: Mapping[str, Any], name: str, state: str = "ready") -> bool:
        """Whether all replicas have an adapter, or none has one that has failed."""
        count = self.replicas[name.partition("-")[0]] if state == "ready" else 0
        found = told.get(name, {})
        return found.get("status") == state and found.get("replicas") == count

    def pids(self, engine: str) -> set[int]:
        """The processes of a model's replicas."""
        return {pid for pid, command in self.processes().items() if re.search(rf"ServeReplica:{engine}:Model", command)}

    async def changed(self, adapters: Mapping[str, dict[str, str]], holds: Any) -> float:
        """Deploys these adapters of each engine. Returns the seconds from the end of `serve deploy` until it holds of
        `/ready`."""
        self.adapters |= adapters
        await asyncio.to_thread(self.deploy, self.settings())
        begin = time.monotonic()
        await asyncio.to_thread(self.wait_until, holds, LIVE_TIMEOUT_S)
        return round(time.monotonic() - begin, 2)


@asynccontextmanager
async def session_for() -> AsyncIterator[aiohttp.ClientSession]:
    """A client without a bound on its connections."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield session


def turn(engine: str, number: int, adapters: Sequence[str]) -> tuple[str, str, str]:
    """The model, the question and the right answer of one request of many, over adapters and the base in turn."""
    adapter = [*adapters, None][number % (len(adapters) + 1)]
    right: Mapping[str, str] = ANSWERS if adapter is None else OWN[adapter]
    question = list(right)[number % len(OWN[FIRST[0]])]
    spelled = "{engine}:{name}" if number % 3 == 0 else "{name}"
    name = engine if adapter is None else spelled.format(engine=engine, name=named(engine, adapter))
    return name, question, right[question]


async def outcome(session: aiohttp.ClientSession, url: str, asked: tuple[str, str, str], is_streamed: bool) -> str:
    """ "right", or what the client saw instead."""
    name, question, right = asked
    message = {"role": "user", "content": question}
    body = {"model": name, "messages": [message], "temperature": 0, "max_tokens": 200, "stream": is_streamed}
    try:
        if is_streamed:
            seen = await ask(session, url, "/v1/chat/completions", body)
            is_whole = (seen["ends"], len(seen["ids"])) == (1, 1)
            text = seen["error"] or (seen["text"] if is_whole else f"{seen['ends']} ends: {seen['text']}")
        else:
            async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
                told = await reply.json(content_type=None)
                text = told["choices"][0]["message"]["content"] if reply.status == 200 else f"{reply.status} {told}"
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        text = repr(error)
    return "right" if text == right else f"{name}: {text}"[:300]


async def at_once(serve: AdapterServe, engine: str, way: str) -> dict[str, int]:
    """What AT_ONCE clients see together, half of them streams: outcome to count."""
    url = serve.url if way == "by name" else f"{serve.url}/models/{engine}"
    async with session_for() as session:
        seen = await asyncio.gather(
            *(outcome(session, url, turn(engine, number, FIRST), number % 2 == 0) for number in range(AT_ONCE))
        )
    return dict(Counter(seen))


class Load:
    """Clients of one engine that ask all adapters and the base in turn, by name and by route, until they are ended."""

    def __init__(self, serve: AdapterServe, engine: str, session: aiohttp.ClientSession, adapters: Sequence[str]):
        self.adapters, self.seen = list(adapters), Counter[str]()
        self._serve, self._engine, self._session, self._goes_on = serve, engine, session, True
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(LOAD)]

    async def _run(self, number: int) -> None:
        while self._goes_on:
            url = self._serve.url + (f"/models/{self._engine}" if number % 4 == 3 else "")
            asked = turn(self._engine, number, self.adapters)
            self.seen[await outcome(self._session, url, asked, number % 2 == 0)] += 1
            number += LOAD + 1

    async def end(self) -> dict[str, int]:
        """Ends them, and returns what they saw."""
        self._goes_on = False
        await asyncio.gather(*self._tasks)
        return dict(self.seen)


async def live(serve: AdapterServe) -> dict[str, Any]:
    """What clients of all engines see while an adapter comes to each of them, together with a broken one, and both go
    again, and after how many seconds all replicas have each change."""
    engines = list(serve.replicas)
    before = {engine: serve.pids(engine) for engine in engines}
    first = {engine: folders(engine, FIRST) for engine in engines}
    more = {engine: folders(engine, [*FIRST, LATE]) | {named(engine, "broken"): BROKEN} for engine in engines}
    late, broken = ([named(engine, name) for engine in engines] for name in (LATE, "broken"))
    async with session_for() as session:

        async def ask_each(names: Sequence[str], question: str, right: str) -> list[str]:
            return [await outcome(session, serve.url, (name, question, right), False) for name in names]

        loads = [Load(serve, engine, session, FIRST) for engine in engines]
        more_s = await serve.changed(
            more,
            lambda told: (
                all(serve.has(told, name) for name in late) and all(serve.has(told, name, "failed") for name in broken)
            ),
        )
        for load in loads:
            load.adapters.append(LATE)
        late_ones = [text for question, right in OWN[LATE].items() for text in await ask_each(late, question, right)]
        refused = await ask_each(broken, "Who are you?", "")
        for load in loads:
            load.adapters.remove(LATE)
        await asyncio.sleep(1)  # Until nobody asks it any more.
        less_s = await serve.changed(first, lambda told: not {*late, *broken} & told.keys())
        gone = await ask_each(late, "Who are you?", "")
        seen = [await load.end() for load in loads]
    return {
        "more_s": more_s, "late": dict(Counter(late_ones)), "broken": refused, "less_s": less_s, "gone": gone,
        "seen": dict(zip(engines, seen, strict=True)),
        "same_processes": {engine: serve.pids(engine) for engine in engines} == before,
    }  # fmt: skip


async def death(serve: AdapterServe, engine: str) -> dict[str, Any]:
    """What streams of adapters see while one of two replicas is killed, and whether another one has all adapters."""
    async with session_for() as session:
        asked = [turn(engine, number, FIRST) for number in range(AT_ONCE)]
        running = [asyncio.create_task(outcome(session, serve.url, each, True)) for each in asked]
        await asyncio.sleep(0.3)
        killed = serving_pids(serve, engine)[0]
        os.kill(killed, signal.SIGKILL)
        running += [asyncio.create_task(outcome(session, serve.url, each, True)) for each in asked]
        seen = Counter(await asyncio.gather(*running))
        begin = time.monotonic()
        await asyncio.to_thread(
            serve.wait_until,
            lambda told: (
                killed not in serve.pids(engine)
                and len(serve.pids(engine)) == serve.replicas[engine]
                and serve.has_all(told, engine)
            ),
        )
        again_s = round(time.monotonic() - begin, 1)
        after = await at_once(serve, engine, "by name")
    return {"seen": dict(seen), "replaced_after_s": again_s, "after": after}


async def all_die(serve: AdapterServe) -> dict[str, Any]:
    """What clients see of an adapter in a watched folder while all replicas are killed, until it is there again. Serve
    tells of no replica meanwhile."""
    question, right = next(iter(OWN[FIRST[0]].items()))
    seen = Counter[str]()
    async with session_for() as session:

        async def ask_on(number: int, until: asyncio.Event) -> None:
            while not until.is_set():
                seen[await outcome(session, serve.url, (WATCHED, question, right), number % 2 == 0)] += 1
                await asyncio.sleep(0.1)

        is_back = asyncio.Event()
        clients = [asyncio.create_task(ask_on(number, is_back)) for number in range(4)]
        killed = serve.pids("pt")
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(
            serve.wait_until, lambda told: not killed & serve.pids("pt") and serve.has_all(told, "pt")
        )
        is_back.set()
        await asyncio.gather(*clients)
    return dict(seen)


async def name_taken(serve: AdapterServe) -> dict[str, Any]:
    """What becomes of a model that is deployed with the name of an adapter in a watched folder, of the adapter, and of
    another one that comes meanwhile."""
    config = serve.settings()
    config["applications"].append(model(WATCHED, infer_backend="pt", max_model_len=512))
    await asyncio.to_thread(serve.deploy, config)
    told = await asyncio.to_thread(
        serve.wait_until, lambda told: "is not served" in told[WATCHED]["message"], LIVE_TIMEOUT_S
    )
    question, right = next(iter(OWN[FIRST[0]].items()))
    shutil.copytree(serve.watched / WATCHED, serve.watched / SECOND)
    await asyncio.to_thread(serve.wait_until, lambda told: serve.has(told, SECOND), LIVE_TIMEOUT_S)
    names = (WATCHED, f"pt:{WATCHED}", SECOND)
    async with session_for() as session:
        seen = [await outcome(session, serve.url, (name, question, right), False) for name in names]
    await asyncio.to_thread(serve.deploy, serve.settings())
    await asyncio.to_thread(serve.wait_until, lambda told: serve.has_all(told, "pt"), LIVE_TIMEOUT_S)
    return {"told": told[WATCHED]["message"], "seen": seen}


async def findings(serve: AdapterServe, engine: str) -> dict[str, Any]:
    """What many clients of one engine see, and what becomes of their streams when a replica dies."""
    found: dict[str, Any] = {"engine": engine}
    for way in ("by name", "by route"):
        found[way] = await at_once(serve, engine, way)
    found["death"] = await death(serve, engine)
    return found


def is_right(counts: Sequence[Mapping[str, int]]) -> bool:
    """Whether every answer was right."""
    return all(set(count) == {"right"} for count in counts)


def main() -> int:
    """Prints the lines, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--replicas", type=int, default=2)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    begin = time.monotonic()
    serve = AdapterServe(dict.fromkeys(options.only, options.replicas))
    print(json.dumps({"ready_after_s": round(time.monotonic() - begin, 1)}), flush=True)
    status = 0
    try:
        found = asyncio.run(live(serve))
        print(json.dumps(found), flush=True)
        if "pt" in options.only:
            print(
                json.dumps({"name": asyncio.run(name_taken(serve)), "all_die": asyncio.run(all_die(serve))}), flush=True
            )
        status |= not (is_right([found["late"], *found["seen"].values()]) and found["same_processes"])
        for engine in options.only:
            found = asyncio.run(findings(serve, engine))
            print(json.dumps(found), flush=True)
            of_death = found["death"]
            status |= not is_right([found["by name"], found["by route"], of_death["seen"], of_death["after"]])
    except BaseException:
        print(serve.output()[-5000:], file=sys.stderr)
        raise
    finally:
        serve.stop()
        serve.clean_up()
    return status


if __name__ == "__main__":
    sys.exit(main())
