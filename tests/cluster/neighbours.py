"""What one client's requests do to another's: every hostile input in a loop beside steady streams of the same model.

    python -m tests.cluster.neighbours [--backend pt|vllm|both] [--only NAME] [--seconds 6]

Starts a Serve with an API key and one model of each backend. A victim keeps four greedy streams going by name, whose
answers are known word for word. Its gaps between two tokens are measured alone, then beside each input of
`hostile_inputs.py` sent by another process, then alone again; the usual gaps are those before and after together, since
a machine is not equally fast all the time. Prints one row per input, and exits 1 where a law is broken:

- the p99 of the victim's gaps is at most twice the usual one (the median of three where the first is over it),
- no gap is over two seconds, which a p99 would not show,
- no request of the victim fails or gets another text, then and afterwards,
- no process grows by more than 300 MB meanwhile,
- the processes are the same ones afterwards, and the model answers.
"""

import argparse
import asyncio
import functools
import json
import multiprocessing
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.cluster.contract import HEADERS, KEY, config
from tests.cluster.hostile_inputs import INPUTS, HostileInput
from tests.cluster.processes import ended, engines_and_router, watched
from tests.cluster.serve_run import ServeRun
from tests.cluster.wire import Client, Request
from tests.demo_answers import ANSWERS

STREAMS = 4
QUESTIONS = [question for question, answer in ANSWERS.items() if len(answer) > 80]
MOST_SLOWER = 2.0
MOST_GAP_S = 2.0
# A few bodies of 32 MiB at once; a process that grows by more for one client can be ended by the kernel.
MOST_GROWTH_MB = 300
RECOVERY_S = 240.0
VARIANTS = 4


@dataclass
class Heard:
    """What the victim saw: seconds between two pieces of text, seconds to the first, and what went wrong."""

    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    answers: int = 0

    def __add__(self, other: "Heard") -> "Heard":
        return Heard(
            self.gaps + other.gaps,
            self.firsts + other.firsts,
            self.failures + other.failures,
            self.answers + other.answers,
        )

    @property
    def p50_ms(self) -> float:
        """Of the gaps."""
        return 1000 * quantile(self.gaps, 0.5)

    @property
    def p99_ms(self) -> float:
        """Of the gaps."""
        return 1000 * quantile(self.gaps, 0.99)

    @property
    def longest_s(self) -> float:
        """The longest time without a piece of text, the first one's included."""
        return max([*self.gaps, *self.firsts], default=0.0)


def quantile(values: Sequence[float], share: float) -> float:
    """0 where there are no values."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


class Victim:
    """Four streams of known answers, one after another, as long as they are wanted."""

    def __init__(self, session: aiohttp.ClientSession, model: str):
        self._session = session
        self._model = model

    async def listen(self, seconds: float) -> Heard:
        """What it hears for so long. Streams that have begun are heard to their end."""
        heard, ends = Heard(), time.monotonic() + seconds
        await asyncio.gather(*(self._follow(number, ends, heard) for number in range(STREAMS)))
        return heard

    async def _follow(self, number: int, ends: float, heard: Heard) -> None:
        while time.monotonic() < ends:
            question = QUESTIONS[number % len(QUESTIONS)]
            number += STREAMS
            try:
                text = await self._ask(question, heard)
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
                heard.failures[f"{type(error).__name__}: {error}"[:160]] += 1
                await asyncio.sleep(0.1)
                continue
            heard.answers += 1
            if text != ANSWERS[question]:
                heard.failures[f"other text: {text[:60]!r}"] += 1

    async def _ask(self, question: str, heard: Heard) -> str:
        body = {"model": self._model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        text, last, is_first = "", time.monotonic(), True
        async with self._session.post("/v1/chat/completions", json={**body, "stream": True}) as reply:
            if reply.status != 200:
                raise ValueError(f"{reply.status} {(await reply.text())[:120]}")
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                if piece:
                    now = time.monotonic()
                    (heard.firsts if is_first else heard.gaps).append(now - last)
                    text, last, is_first = text + piece, now, False
        return text


@dataclass
class Attack:
    """What the hostile client saw of its own requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


@functools.lru_cache(maxsize=1)
def requests_of(name: str, model: str, key: str | None) -> tuple[HostileInput, list[Request]]:
    """The input of that name and its requests, some of which take a second to build."""
    (hostile,) = (known for known in INPUTS if known.name == name)
    return hostile, [hostile.request(model, number, key) for number in range(VARIANTS)]


def attack(name: str, model: str, port: int, key: str | None, seconds: float) -> Attack:
    """Sends the input of that name in a closed loop for so long, in a process beside the victim's."""
    hostile, requests = requests_of(name, model, key)
    seen, ends = Attack(), time.monotonic() + seconds
    patience_s = 2 + 2 * seconds  # What takes longer is given up, and the next one is sent.

    async def loop(connection: int) -> None:
        client, number = Client(port), connection
        while time.monotonic() < ends:
            answer = await client.send(requests[number % VARIANTS], patience_s)
            number += hostile.connections
            seen.statuses[str(answer.status) if not answer.problem else answer.problem] += 1
            seen.seconds.append(answer.seconds)
        client.close()

    async def loops() -> None:
        await asyncio.gather(*(loop(number) for number in range(hostile.connections)))

    asyncio.run(loops())
    return seen


@dataclass(frozen=True)
class Row:
    """One input beside the victim."""

    hostile: HostileInput
    model: str
    attack: Attack
    usual: Heard
    beside: Heard
    growth: dict[str, int]
    recovery_s: float
    ratios: tuple[float, ...]
    failures: Counter[str]
    ended: tuple[str, ...]

    @property
    def slower(self) -> float:
        """The p99 of the gaps against the usual one; the median where it was measured several times."""
        return statistics.median(self.ratios)

    @property
    def grown(self) -> tuple[str, int]:
        """The kind of process that grew most, and by how many MB."""
        return max(self.growth.items(), key=lambda pair: pair[1], default=("nothing", 0))

    def broken(self, by_time: bool = True) -> list[str]:
        """The laws that do not hold."""
        laws = {
            f"p99 × {self.slower:.1f}": by_time and self.slower > MOST_SLOWER,
            f"a gap of {self.beside.longest_s:.1f} s": self.beside.longest_s > MOST_GAP_S,
            f"{self.failures.total()} failed": bool(self.failures),
            "nothing was answered": not self.beside.answers,
            f"{self.grown[0]} grew by {self.grown[1]} MB": self.grown[1] > MOST_GROWTH_MB,
            f"ended: {', '.join(self.ended)}": bool(self.ended),
            f"no answer for {RECOVERY_S:g} s": self.recovery_s >= RECOVERY_S,
        }
        return [law for law, is_broken in laws.items() if is_broken]

    def told(self) -> dict[str, Any]:
        """For a reader, times in ms where not said."""
        own = self.attack.seconds or [0.0]
        return {
            "model": self.model,
            "input": self.hostile.name,
            "aims_at": self.hostile.defect,
            "sent": self.attack.statuses.total(),
            "statuses": dict(self.attack.statuses),
            "own_s": [round(statistics.median(own), 3), round(max(own), 2)],
            "usual_p50_p99": [round(self.usual.p50_ms, 1), round(self.usual.p99_ms, 1)],
            "p50_p99": [round(self.beside.p50_ms, 1), round(self.beside.p99_ms, 1)],
            "slower": [round(ratio, 2) for ratio in self.ratios],
            "first_p99": [
                round(1000 * quantile(self.usual.firsts, 0.99)),
                round(1000 * quantile(self.beside.firsts, 0.99)),
            ],
            "longest_s": round(self.beside.longest_s, 2),
            "answers": self.beside.answers,
            "failures": dict(self.failures.most_common(3)),
            "recovery_s": round(self.recovery_s, 1),
            "grown_mb": f"{self.grown[0]} +{self.grown[1]}",
            "broken": self.broken(),
        }


class Neighbourhood:
    """A victim and a hostile client of one model in a Serve that runs."""

    def __init__(self, serve: ServeRun, session: aiohttp.ClientSession, model: str, key: str | None, pool: Executor):
        self._serve, self._session, self._model, self._key, self._pool = serve, session, model, key, pool
        self._victim = Victim(session, model)
        self._last: Heard | None = None

    async def row(self, hostile: HostileInput, seconds: float, again: int = 2) -> Row:
        """One row; measured so many times more where its first p99 alone breaks a law."""
        row = await self._measure(hostile, seconds, ())
        while len(row.ratios) <= again and row.ratios[0] > MOST_SLOWER and not row.broken(by_time=False):
            row = await self._measure(hostile, seconds, row.ratios)
        return row

    async def _measure(self, hostile: HostileInput, seconds: float, ratios: tuple[float, ...]) -> Row:
        before = self._last or await self._victim.listen(seconds)
        pids = await asyncio.to_thread(engines_and_router, self._serve, [self._model])
        arguments = (hostile.name, self._model, self._serve.port, self._key)
        begin = functools.partial(asyncio.get_running_loop().run_in_executor, self._pool, attack, *arguments)
        await begin(0.0)  # So that the process is there and the requests are built.
        with watched(pids) as peak:
            sent = begin(seconds)
            beside = await self._victim.listen(seconds)
            seen = await sent
        recovery_s = await self._recover()
        after = self._last = await self._victim.listen(seconds)
        usual = before + after
        gone = tuple(await asyncio.to_thread(ended, self._serve, pids))
        ratio = beside.p99_ms / usual.p99_ms if usual.p99_ms else float("inf")
        failures = beside.failures + after.failures
        return Row(hostile, self._model, seen, usual, beside, peak.growth, recovery_s, (*ratios, ratio), failures, gone)

    async def _recover(self) -> float:
        """Seconds until the model gives a whole answer in a second, as it does when it is idle."""
        start = time.monotonic()
        body = {"model": self._model, "prompt": "x", "max_tokens": 2}
        while (waited := time.monotonic() - start) < RECOVERY_S:
            asked = time.monotonic()
            try:
                async with self._session.post("/v1/completions", json=body) as reply:
                    if reply.status == 200 and time.monotonic() - asked < 1:
                        return waited
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(0.1)
        return RECOVERY_S


async def measure(serve: ServeRun, models: Sequence[str], inputs: Sequence[HostileInput], seconds: float) -> list[Row]:
    """All rows, printed as they come."""
    timeout, connector = aiohttp.ClientTimeout(total=120), aiohttp.TCPConnector(limit=0)
    context = multiprocessing.get_context("spawn")
    rows = []
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        async with aiohttp.ClientSession(serve.url, connector=connector, timeout=timeout, headers=HEADERS) as session:
            for model in models:
                place = Neighbourhood(serve, session, model, KEY, pool)
                for hostile in inputs:
                    rows.append(await place.row(hostile, seconds))
                    print(json.dumps(rows[-1].told()), flush=True)
    return rows


def main() -> None:
    """Prints the rows."""
    names = [hostile.name for hostile in INPUTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("pt", "vllm", "both"), default="both")
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=6, help="of each measurement; a row has two")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # So that what was started is stopped too.
    inputs = [hostile for hostile in INPUTS if options.only is None or hostile.name in options.only]
    models = ("pt", "vllm") if options.backend == "both" else (options.backend,)
    serve = ServeRun(config(models), cpus=4, controller={"SERVE_APP_API_KEYS": KEY}, headers=HEADERS)
    try:
        serve.wait_until(lambda told: all(model["status"] == "ready" for model in told.values()) and bool(told))
        rows = asyncio.run(measure(serve, models, inputs, options.seconds))
        sys.exit(1 if any(row.broken() for row in rows) else 0)
    finally:
        serve.stop(signal.SIGTERM)
        serve.clean_up()


if __name__ == "__main__":
    main()
