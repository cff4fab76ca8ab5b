"""A hundred thousand requests that mean harm, or nothing: does anything break, hang, grow or end?

    python -m tests.cluster.fuzz [--requests 100000] [--seed 1] [--backend pt|vllm|both] [--faults FILE]
    python -m tests.cluster.fuzz --replay FILE

Starts a Serve with an API key and one model of each backend. The requests are those of `fuzz_cases.py`, drawn from the
seed, together with what schemathesis makes of every OpenAPI document there. Prints one JSON object, and before it up to
three requests of every fault, as lines that `--replay` sends again one by one; `--faults` gets all of them. Exits 1
where a law is broken:

- no 5xx, also not as an event of a stream, but for an overload's 503 with `retry-after`, which a 429 has too, and for
  vLLM's 501; no answer that is cut or missing; no model that is called unavailable, since none is stopped,
- a request of another connection to each model, four times a second, never waits longer than two seconds,
- no process holds over 5 % more than after the first requests (10 MB where that is more, which allocators move by),
- the processes are the same ones at the end, and the models answer.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from serve_app.wire.error_events import error_of
from tests.cluster.contract import HEADERS, KEY, bounded, config, document_of
from tests.cluster.fuzz_cases import Cases
from tests.cluster.hostile_inputs import JSON
from tests.cluster.processes import ended, engines_and_router, megabytes
from tests.cluster.serve_run import ServeRun
from tests.cluster.wire import Answer, Client, Header, Request

TIMEOUT_S = 60.0
MOST_WAIT_S = 2.0
CANARY_EVERY_S = 0.25
MOST_GROWTH, FREE_GROWTH_MB = 0.05, 10.0
# Idle engines give memory back; a replica's report and Ray's metrics settle too.
SETTLE_S = 30.0
SHOWN_PER_FAULT = 3
# Large schemas take schemathesis a second a request.
SECONDS_PER_OPERATION = 10.0
NOT_MADE = (hypothesis.errors.HypothesisException, schemathesis.errors.SchemathesisError)
AUTHORIZATION: Header = (b"authorization", f"Bearer {KEY}".encode())


class _Enough(Exception):
    """Ends the making of requests to an operation."""


def corpus_of(url: str, routes: Sequence[str], models: Sequence[str], cases: int) -> list[Request]:
    """At most so many right and wrong requests to every operation of the documents at these routes."""
    made: list[Request] = []
    for route in routes:
        document = document_of(url + route)
        with contextlib.suppress(KeyError):
            document = bounded(document, list(models), is_open=True)
        for found in schemathesis.openapi.from_dict(document).get_all_operations():
            operation = found.ok()
            for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
                ends = time.monotonic() + SECONDS_PER_OPERATION

                @settings(
                    max_examples=cases if operation.body else 3, deadline=None, database=None,
                    phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=True,
                )  # fmt: skip
                @given(case=operation.as_strategy(generation_mode=mode))
                def make(case: schemathesis.Case) -> None:
                    if time.monotonic() > ends:  # noqa: B023 — called before the loop goes on.
                        raise _Enough
                    request = _request(case, route)  # noqa: B023
                    if request is not None:
                        made.append(request)

                with contextlib.suppress(_Enough, *NOT_MADE):
                    make()
    return made


def _request(case: schemathesis.Case, route: str) -> Request | None:
    """What `requests` would send; None for what it refuses to write."""
    try:
        sent = requests.Request(**case.as_transport_kwargs(base_url="http://localhost")).prepare()
    except (ValueError, TypeError, requests.RequestException):
        return None
    body = sent.body if isinstance(sent.body, bytes) else (sent.body or "").encode("utf-8", "surrogatepass")
    kind = (sent.headers.get("content-type") or "application/json").encode("latin-1", "replace")
    path = (sent.path_url or "/").replace(" ", "%20")
    return Request(sent.method or "GET", route + path, (AUTHORIZATION, (b"content-type", kind)), body)


def fault_of(answer: Answer) -> str:
    """Why an answer must not be, or an empty string."""
    if answer.problem:
        return "" if answer.problem == "left" else answer.problem
    if answer.status == 501 and b'"error"' in answer.body:  # vLLM's honest word on an endpoint without its model.
        return ""
    is_overload = answer.status == 503 and b"retry-after" in answer.headers and b"model_unavailable" not in answer.body
    if (answer.status >= 500 and not is_overload) or (answer.status == 429 and b"retry-after" not in answer.headers):
        return f"status {answer.status}"
    if answer.headers.get(b"content-type", b"").startswith(b"text/event-stream") and b'"error"' in answer.body:
        return _fault_in_stream(answer.body)
    return ""


def _fault_in_stream(body: bytes) -> str:
    for line in body.splitlines():
        with contextlib.suppress(ValueError):
            error = error_of(json.loads(line.removeprefix(b"data: ")))
            # The Responses API has the type, or else the code, as its code.
            said = () if error is None else (error.get("code"), error.get("type"))
            if {500, "server_error", "api_error"} & set(said):
                return "server_error in a stream"
    return ""


@dataclass
class Canary:
    """A small request to each model four times a second, from a thread and connections of its own."""

    port: int
    models: Sequence[str]
    headers: Sequence[Header]
    waits: list[float] = field(default_factory=list)
    troubles: Counter[str] = field(default_factory=Counter)
    slow_at: list[tuple[str, float, float]] = field(default_factory=list)
    # What is under way, by connection, and what was when the canary had to wait too long.
    flying: dict[int, Request] = field(default_factory=dict)
    suspects: list[Request] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def singing(self) -> Iterator[None]:
        """Until the block ends. The last requests are awaited."""
        thread = threading.Thread(target=lambda: asyncio.run(self._sing_all()))
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()

    async def _sing_all(self) -> None:
        await asyncio.gather(*map(self._sing, self.models))

    async def _sing(self, model: str) -> None:
        client, began = Client(self.port), time.monotonic()
        body = json.dumps({"model": model, "prompt": "x", "max_tokens": 1}).encode()
        request = Request("POST", "/v1/completions", (JSON, *self.headers), body)
        while not self._stopped.is_set():
            sent = asyncio.create_task(client.send(request, TIMEOUT_S))
            await asyncio.wait({sent}, timeout=MOST_WAIT_S)
            if not sent.done():
                self.suspects += list(self.flying.values())
            answer = await sent
            self.waits.append(answer.seconds)
            if answer.status != 200 or answer.problem:
                self.troubles[f"{model}: {answer.status} {answer.problem} {answer.body[:100]!r}"] += 1
            if answer.seconds > MOST_WAIT_S:
                self.slow_at.append((model, round(time.monotonic() - began, 1), round(answer.seconds, 1)))
            await asyncio.sleep(max(0.0, CANARY_EVERY_S - answer.seconds))
        client.close()


@dataclass
class Seen:
    """What became of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    lines: list[dict[str, Any]] = field(default_factory=list)
    slow: list[dict[str, Any]] = field(default_factory=list)

    def note(self, request: Request, answer: Answer) -> None:
        """Counts the answer, and keeps a request that got what it must not, or waited long."""
        self.statuses[answer.status] += 1
        line = {"seconds": round(answer.seconds, 2), "status": answer.status, "request": json.loads(request.line())}
        if fault := fault_of(answer):
            said = answer.body[-300:].decode(errors="replace")
            kind = f"{fault}: {said[:60]}" if answer.status >= 500 else fault
            self.faults[kind] += 1
            self.lines.append({"fault": fault, "said": said, **line})
            if self.faults[kind] <= SHOWN_PER_FAULT:
                print(json.dumps(self.lines[-1]), flush=True)
        elif answer.seconds > MOST_WAIT_S and not answer.problem:
            self.slow.append({"fault": "slow", **line})

    def suspect(self, requests: Sequence[Request]) -> None:
        """Keeps what was under way when another client had to wait: one of them is to blame."""
        fault = "under way when another client waited"
        self.slow += [{"fault": fault, "seconds": 0.0, "request": json.loads(each.line())} for each in requests]


async def send_all(canary: Canary, cases: Iterator[Request], count: int, clients: int, seen: Seen) -> None:
    """The next so many cases, over so many connections."""
    left = iter(range(count))

    async def loop(number: int) -> None:
        client = Client(canary.port)
        for _ in left:
            request = canary.flying[number] = next(cases)
            seen.note(request, await client.send(request, TIMEOUT_S))
        client.close()

    await asyncio.gather(*map(loop, range(clients)))
    canary.flying.clear()


@dataclass(frozen=True)
class Plan:
    """A run: how many requests, of which so many come before the memory is measured the first time."""

    count: int
    warm_up: int
    clients: int = 32
    settle_s: float = SETTLE_S


async def fuzz(serve: ServeRun, cases: Cases, canary: Canary, plan: Plan) -> tuple[dict[str, Any], Seen]:
    """Sends them all. Returns what a reader wants to know, with the laws that are broken, and the faults."""
    stream, seen, began = iter(cases), Seen(), time.monotonic()
    before = await asyncio.to_thread(engines_and_router, serve, canary.models)
    settling = 0.0
    memory: list[dict[str, float]] = []
    with canary.singing():
        for count in (plan.warm_up, plan.count - plan.warm_up):
            await send_all(canary, stream, count, plan.clients, seen)
            if plan.warm_up:
                await asyncio.sleep(plan.settle_s)
                settling += plan.settle_s
                memory.append(await asyncio.to_thread(megabytes, before))
        seconds = time.monotonic() - began - settling
    seen.suspect(canary.suspects)
    gone = await asyncio.to_thread(ended, serve, before)
    growth = {kind: (size, memory[1].get(kind, 0.0)) for kind, size in memory[0].items()} if memory else {}
    grown = {
        kind: f"{early:.0f} to {late:.0f} MB"
        for kind, (early, late) in growth.items()
        if late - early > max(MOST_GROWTH * early, FREE_GROWTH_MB)
    }
    waits = sorted(canary.waits)
    laws = {
        "faults": bool(seen.faults),
        f"another client waited {waits[-1]:.1f} s": waits[-1] > MOST_WAIT_S,
        "another client failed": bool(canary.troubles),
        f"grown: {grown}": bool(grown),
        f"ended: {', '.join(gone)}": bool(gone),
    }
    return {
        "requests": seen.statuses.total(),
        "seconds": round(seconds, 1),
        "a_second": round(seen.statuses.total() / seconds, 1),
        "statuses": dict(sorted(seen.statuses.items())),
        "faults": dict(seen.faults.most_common()),
        "canary": {
            "sent": len(waits),
            "p50_s": round(waits[len(waits) // 2], 3),
            "p99_s": round(waits[int(0.99 * len(waits))], 3),
            "max_s": round(waits[-1], 2),
            "slow_model_at_waited": canary.slow_at[:20],
            "troubles": dict(canary.troubles.most_common(5)),
        },
        "memory_mb": {kind: [round(early), round(late)] for kind, (early, late) in growth.items()},
        "slow_requests": len(seen.slow),
        "broken": [law for law, is_broken in laws.items() if is_broken],
    }, seen


def replay(port: int, lines: Sequence[str]) -> bool:
    """Sends each line's request, and prints what comes back. Whether none is a fault."""

    async def send() -> list[str]:
        faults = []
        for line in lines:
            told = json.loads(line)
            request = Request.read(json.dumps(told.get("request", told)))
            client = Client(port)
            answer = await client.send(request, TIMEOUT_S)
            client.close()
            faults.append(fault_of(answer))
            row = {"fault": faults[-1], "status": answer.status, "seconds": round(answer.seconds, 2)}
            print(json.dumps(row | {"said": answer.body[-300:].decode(errors="replace"), "path": request.path[:200]}))
        return faults

    return not any(asyncio.run(send()))


def _run(serve: ServeRun, models: Sequence[str], options: argparse.Namespace) -> bool:
    """Whether all laws held."""
    if options.replay is not None:
        return replay(serve.port, options.replay.read_text().splitlines())
    began = time.monotonic()
    corpus = corpus_of(serve.url, ["", *(f"/models/{name}" for name in models)], models, options.cases)
    made_s = round(time.monotonic() - began, 1)
    print(json.dumps({"seed": options.seed, "from_documents": len(corpus), "made_in_s": made_s}), flush=True)
    cases = Cases(options.seed, models, corpus, [AUTHORIZATION])
    plan = Plan(options.requests, min(5000, options.requests // 4), options.clients)
    told, seen = asyncio.run(fuzz(serve, cases, Canary(serve.port, models, [AUTHORIZATION]), plan))
    for line in sorted(seen.slow, key=lambda slow: -float(slow["seconds"]))[:SHOWN_PER_FAULT]:
        print(json.dumps(line))
    if options.faults is not None:
        options.faults.write_text("".join(json.dumps(line) + "\n" for line in [*seen.lines, *seen.slow]))
    print(json.dumps({"seed": options.seed, **told}, indent=1))
    return not told["broken"]


def main() -> None:
    """Prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", choices=("pt", "vllm", "both"), default="both")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--cases", type=int, default=40, help="from the documents, for each operation and mode")
    parser.add_argument("--faults", type=Path, help="where all requests with a fault go, and the slow ones")
    parser.add_argument("--replay", type=Path, help="sends the requests of such a file")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    models = ("pt", "vllm") if options.backend == "both" else (options.backend,)
    serve = ServeRun(config(models), cpus=4, controller={"SERVE_APP_API_KEYS": KEY}, headers=HEADERS)
    try:
        serve.wait_until(lambda told: all(model["status"] == "ready" for model in told.values()) and bool(told))
        sys.exit(0 if _run(serve, models, options) else 1)
    finally:
        serve.stop(signal.SIGTERM)
        serve.clean_up()


if __name__ == "__main__":
    main()
