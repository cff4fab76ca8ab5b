"""A Serve with one model of vLLM over several ranks on the CPU, of which any process may die.

    python -m tests.cluster.served_ranks [--only pp1+3 tp2] [--without-deaths]

prints for each shape (`ranks.py` has them) a line of JSON with the answers that were right by name and by route, one
for each rank with its memory as planned, measured and exported as a gauge, and one for the death of each process in
turn, with what clients saw by name meanwhile and what was left of the replica.
"""

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from serve_app.planning.plan import ModelPlan
from serve_app.replica.replica_plan import plan_replica
from tests.builders import model_config
from tests.cluster.conftest import model
from tests.cluster.ranks import AT_ONCE, SHAPES, engine_first, left_behind, main, shared_files
from tests.cluster.serve_run import ServeRun
from tests.cluster.storm import ask, serving_pids
from tests.demo_answers import ANSWERS, QUESTIONS

# The second one has layers that vLLM would refuse.
NAME, WRONG = "ranked", "wrong"
WAYS = {"by name": "", "by route": f"/models/{NAME}"}
CLIENTS = 8
# What a rank holds beside weights and cache differs by 40 MiB from start to start, which is less than a tenth of the
# smallest rank with this cache.
SERVED_CACHE = "1GiB"
# vLLM's max_num_seqs on the CPU, and a prompt of which several are in a step of 2048 tokens.
MOST_ROWS, LONG_PROMPT = 128, 900
REPLACED_TIMEOUT_S = 300.0
REPORT_TIMEOUT_S = 60.0
HELD = "ray_serve_app_memory_held_bytes"
# Three failures of it end a replica whose engine has died. The usual two seconds are only waited for.
HEALTH_CHECK_PERIOD_S = 1.0


class RankedServe(ServeRun):
    """It, once its one replica serves."""

    def __init__(self, shape: Mapping[str, Any]):
        router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
        served = model(NAME, infer_backend="vllm", kv_cache_memory_bytes=SERVED_CACHE, max_model_len=1024, **shape)
        self.args: dict[str, Any] = served["args"]
        served["deployments"] = [{"name": "Model", "health_check_period_s": HEALTH_CHECK_PERIOD_S}]
        served["runtime_env"] = {"env_vars": {"VLLM_LOGGING_LEVEL": "ERROR"}}
        wrong = model(WRONG, infer_backend="vllm", max_model_len=1024, pipeline_layers=[1, 2])
        super().__init__({"applications": [router, served, wrong]}, cpus=4, is_set_before_ray=True)
        self.wait_until(lambda models: NAME in models and models[NAME]["status"] == "ready")

    def ranks(self) -> dict[int, str]:
        """The processes of vLLM, the engine first: pid to title."""
        return engine_first(self.processes())

    def replica(self) -> int:
        """The process of the replica that serves."""
        (pid,) = serving_pids(self, NAME)
        return pid

    def plan(self) -> ModelPlan:
        """What a replica of this model plans on this machine."""
        plan = plan_replica(model_config(**self.args), [])
        assert plan is not None
        return plan

    def rank_memory(self) -> list[dict[str, Any]]:
        """What the replica reports of each rank after this moment. Raises TimeoutError."""
        asked, deadline = time.time(), time.monotonic() + REPORT_TIMEOUT_S
        while time.monotonic() < deadline:
            (told,) = [each for each in self.status_of_ours()["models"] if each["name"] == NAME]
            (report,) = [replica["report"] for replica in told["replicas"]]
            if report is not None and report["written_at"] > asked:
                return list(report["devices"])
        raise TimeoutError(f"no report after {REPORT_TIMEOUT_S} s")

    def rank_gauges(self, name: str, count: int) -> dict[str, float]:
        """What Prometheus reads of a gauge of the model, once so many ranks have one: the number of the rank to the
        value. Ray exports what was set up to ten seconds before. Raises TimeoutError."""
        deadline = time.monotonic() + REPORT_TIMEOUT_S
        while len(found := self._rank_gauges(name)) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} has {found} after {REPORT_TIMEOUT_S} s")
            time.sleep(1)
        return found

    def _rank_gauges(self, name: str) -> dict[str, float]:
        found = {}
        for line in self.metrics():
            labels, _, value = line.rpartition(" ")
            if labels.startswith(f"{name}{{") and f'application="{NAME}"' in labels:
                found[labels.partition('rank="')[2].partition('"')[0]] = float(value)
        return found

    def wait_for_another(self, replica: int) -> None:
        """Until another replica serves and this one is gone. Raises TimeoutError."""
        deadline = time.monotonic() + REPLACED_TIMEOUT_S
        while not (pids := serving_pids(self, NAME)) or replica in pids:
            if time.monotonic() > deadline:
                raise TimeoutError(self.output()[-4000:])
            time.sleep(0.2)


def body_of(question: str, is_streamed: bool) -> dict[str, Any]:
    """A greedy question."""
    message = {"role": "user", "content": question}
    return {"model": NAME, "messages": [message], "temperature": 0, "max_tokens": 200, "stream": is_streamed}


async def outcome(session: aiohttp.ClientSession, url: str, question: str, is_streamed: bool) -> str:
    """ "right", or what the client saw instead."""
    body = body_of(question, is_streamed)
    if is_streamed:
        seen = await ask(session, url, "/v1/chat/completions", body)
        is_whole = (seen["ends"], len(seen["ids"])) == (1, 1)
        text = seen["error"] or (seen["text"] if is_whole else f"{seen['ends']} ends: {seen['text']}")
    else:
        async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
            told = await reply.json(content_type=None)
            text = told["choices"][0]["message"]["content"] if reply.status == 200 else f"{reply.status} {told}"
    return "right" if text == ANSWERS[question] else str(text)[:300]


@asynccontextmanager
async def session_for(timeout_s: float = REPLACED_TIMEOUT_S) -> AsyncIterator[aiohttp.ClientSession]:
    """A client without a bound on its connections."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield session


async def at_once(serve: RankedServe, way: str) -> dict[str, int]:
    """What AT_ONCE clients see together, half of them streams: outcome to count."""
    url = serve.url + WAYS[way]
    async with session_for() as session:
        seen = await asyncio.gather(
            *(outcome(session, url, QUESTIONS[number], number % 2 == 0) for number in range(AT_ONCE))
        )
    return dict(Counter(seen))


async def fill(serve: RankedServe) -> None:
    """Fills steps of vLLM with as many tokens and as many requests as one may have on the CPU, which the plan's
    activations are meant for."""
    body = {"model": NAME, "prompt": [1] * LONG_PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True}

    async def status(session: aiohttp.ClientSession) -> int:
        async with session.post(f"{serve.url}/v1/completions", json=body) as reply:
            await reply.read()
            return reply.status

    async with session_for() as session:
        for _ in range(2):
            assert set(await asyncio.gather(*(status(session) for _ in range(MOST_ROWS)))) == {200}


@asynccontextmanager
async def asking(serve: RankedServe) -> AsyncIterator[Counter[str]]:
    """Clients that ask by name, one question after the other, meanwhile. Half of them stream."""
    seen: Counter[str] = Counter()
    is_over = asyncio.Event()

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        while not is_over.is_set():
            seen[await outcome(session, serve.url, QUESTIONS[number % len(QUESTIONS)], number % 2 == 0)] += 1
            number += CLIENTS

    async with session_for() as session:
        tasks = [asyncio.create_task(client(session, number)) for number in range(CLIENTS)]
        yield seen
        is_over.set()
        await asyncio.gather(*tasks)


async def answered(seen: Counter[str], more: int) -> None:
    """Waits until clients have seen so many more answers. Raises TimeoutError."""
    least, deadline = seen.total() + more, time.monotonic() + REPLACED_TIMEOUT_S
    while seen.total() < least:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{dict(seen)} after {REPLACED_TIMEOUT_S} s")
        await asyncio.sleep(0.05)


async def death(serve: RankedServe, title: str) -> dict[str, Any]:
    """What clients see by name while this process of vLLM dies and the replica is replaced, and what is left of it."""
    replica, ranks = serve.replica(), serve.ranks()
    (pid,) = [pid for pid, name in ranks.items() if name == title]
    files = shared_files(ranks)
    async with asking(serve) as seen:
        await answered(seen, CLIENTS)
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        await asyncio.to_thread(serve.wait_for_another, replica)
        replaced_after_s = round(time.monotonic() - started, 1)
        await answered(seen, 2 * CLIENTS)
    left = left_behind([*ranks, replica], files)
    return {"killed": title, "replaced_after_s": replaced_after_s, "by_name": dict(seen), "left": left}


def memory(serve: RankedServe) -> list[dict[str, Any]]:
    """What each rank holds beside its plan, in bytes, with what its gauge says."""
    found = serve.rank_memory()
    gauges = serve.rank_gauges(HELD, len(found))
    return [
        {"rank": told["rank"], "layers": plan.layers, "planned": plan.share.bytes, "reported_plan": told["planned"],
         "held": told["held"], "peak": told["peak"], "of_plan": round(told["peak"] / plan.share.bytes, 3),
         "overhead": [plan.share.bytes - plan.weights.bytes - plan.kv_cache.bytes,
                      told["peak"] - told["weights"] - told["kv_cache"]],
         "weights": [plan.weights.bytes, told["weights"]], "kv_cache": [plan.kv_cache.bytes, told["kv_cache"]],
         "gauge": gauges.get(str(told["rank"]))}
        for plan, told in zip(serve.plan().ranks, found, strict=True)
    ]  # fmt: skip


def findings(name: str, with_deaths: bool) -> Iterator[dict[str, Any]]:
    """The answers by each way, and what comes after the death of each process in turn."""
    started = time.monotonic()
    serve = RankedServe(SHAPES[name])
    try:
        found = {"shape": name, "ready_after_s": round(time.monotonic() - started, 1)}
        for way in WAYS:
            found[way] = asyncio.run(at_once(serve, way))
        yield found
        asyncio.run(fill(serve))
        for rank in memory(serve):
            yield {"shape": name, **rank}
        for title in serve.ranks().values() if with_deaths else ():
            told = asyncio.run(death(serve, title))
            yield {"shape": name, **told, "by route": asyncio.run(at_once(serve, "by route"))}
        ranks = serve.ranks()
        files = shared_files(ranks)
        yield {"shape": name, "left_at_end": [*serve.stop().values(), *left_behind(ranks, files)]}
    finally:
        serve.stop()
        serve.clean_up()


if __name__ == "__main__":
    main(["--served", *sys.argv[1:]])
