"""LoRA adapters through Serve, with both engines, while they come and go and replicas die.

    python -m tests.cluster.served_adapters [--only pt vllm] [--replicas 2]

starts a Serve with the demo model on each engine and sixteen of the adapters of `tests/lora`, whose answers are known
word for word. It prints a line of JSON for each engine: what 32 clients saw at once over all adapters and the base, by
name and by route, and what clients saw while a seventeenth adapter was deployed, then a broken one, both were taken out
again, and a replica was killed. It exits with 1 if any answer was another one or none.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
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
            if engine == "vllm":
                served["args"]["kv_cache_memory_bytes"] = "256MiB"
                served["runtime_env"] = {"env_vars": {"VLLM_LOGGING_LEVEL": "ERROR"}}
            served["deployments"] = [{"name": "Model", "num_replicas": count, "health_check_period_s": 1.0}]
            applications.append(served)
        return {"applications": applications}

    def has_all(self, told: Mapping[str, Any], engine: str) -> bool:
        """Whether all replicas of a model have all of its adapters."""
        return all(self.has(told, name) for name in self.adapters[engine])

    def has(self, told: Mapping[str, Any], name: str, state: str = "ready") -> bool:
        """Whether all replicas have an adapter, or none has one that has failed."""
        count = self.replicas[name.partition("-")[0]] if state == "ready" else 0
        found = told.get(name, {})
        return found.get("status") == state and found.get("replicas") == count

    def pids(self, engine: str) -> set[int]:
        """The processes of a model's replicas."""
        return {pid for pid, command in self.processes().items() if re.search(rf"ServeReplica:{engine}:Model", command)}

    async def changed(self, engine: str, adapters: dict[str, str], holds: Any) -> float:
        """Deploys these adapters. Returns the seconds from the end of `serve deploy` until it holds of `/ready`."""
        self.adapters[engine] = adapters
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


async def live(serve: AdapterServe, engine: str) -> dict[str, Any]:
    """What clients see while adapters come and go, and after how many seconds all replicas have each change."""
    before, late = serve.pids(engine), named(engine, LATE)
    first, broken = folders(engine, FIRST), named(engine, "broken")
    async with session_for() as session:
        load = Load(serve, engine, session, FIRST)
        more_s = await serve.changed(engine, folders(engine, [*FIRST, LATE]), lambda told: serve.has(told, late))
        load.adapters.append(LATE)
        own = OWN[LATE]
        late_ones = await asyncio.gather(
            *(outcome(session, serve.url, (late, question, own[question]), True) for question in own)
        )
        with_broken = folders(engine, [*FIRST, LATE]) | {broken: BROKEN}
        broken_s = await serve.changed(engine, with_broken, lambda told: serve.has(told, broken, "failed"))
        refused = await outcome(session, serve.url, (broken, "Who are you?", ""), False)
        load.adapters.remove(LATE)
        await asyncio.sleep(2)  # Until nobody asks it any more.
        less_s = await serve.changed(engine, first, lambda told: late not in told and broken not in told)
        gone = await outcome(session, serve.url, (late, "Who are you?", ""), False)
        seen = await load.end()
    return {
        "more_s": more_s, "late": dict(Counter(late_ones)), "broken_s": broken_s, "broken": refused, "less_s": less_s,
        "gone": gone, "seen": seen, "same_processes": serve.pids(engine) == before,
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


async def findings(serve: AdapterServe, engine: str) -> dict[str, Any]:
    """All of it for one engine."""
    found: dict[str, Any] = {"engine": engine}
    for way in ("by name", "by route"):
        found[way] = await at_once(serve, engine, way)
    found |= await live(serve, engine)
    found["death"] = await death(serve, engine)
    return found


def is_right(found: Mapping[str, Any]) -> bool:
    """Whether every answer was right."""
    counts = [found["by name"], found["by route"], found["late"], found["seen"]]
    counts += [found["death"]["seen"], found["death"]["after"]]
    return all(set(count) == {"right"} for count in counts) and found["same_processes"]


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
        for engine in options.only:
            found = asyncio.run(findings(serve, engine))
            print(json.dumps(found), flush=True)
            status |= not is_right(found)
    except BaseException:
        print(serve.output()[-5000:], file=sys.stderr)
        raise
    finally:
        serve.stop()
        serve.clean_up()
    return status


if __name__ == "__main__":
    sys.exit(main())
