"""Sends a workload to a server and notes what each request saw.

Requests are streams of `/v1/completions` with token ids for prompts that are made, and of `/v1/chat/completions` or
`/v1/completions` with the texts of a log. Made answers, and those of a log whose lengths it has, are exactly as long as
the workload says (`ignore_eos`).

guidellm, aiperf, evalscope and vLLM's own `bench serve` send such loads too. Each brings an engine, a data set or a
plotting library of hundreds of MB, which a tool on the same machine as what it measures should not start; what is
needed of them is in this file."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from serve_app.tuning.measurement import Level, Measurement, Sample, measured
from serve_app.tuning.workload import Ask, Workload

# An answer may take so many seconds.
ANSWER_TIMEOUT_S = 300.0
# After the end of a level, the requests that were due in it may take so many seconds. What is still running then is
# ended and counts as failed.
DRAIN_TIMEOUT_S = 300.0
# A warm-up lasts until each client has had an answer, but not longer than so many seconds.
MOST_WARM_UP_S = 120.0
# A level lasts until so many requests that were due in it have ended, but not longer than so many times its seconds.
LEAST_REQUESTS, MOST_STRETCH = 20, 4.0
POLL_S = 0.02
# An open load has at most so many requests in flight. More than these mean that the server does not keep up.
MOST_IN_FLIGHT = 2000
# Characters of an error that are kept.
MOST_ERROR = 200
# Of the events after the first token, only those with one of these are read. To read all would cost processors that the
# server needs.
READ = (b'"usage":{', b'"usage": {', b'"error"')
# Token ids below this one are special in many vocabularies.
FIRST_TOKEN = 16


@dataclass(frozen=True)
class Target:
    """This is what is asked: the server's address, the model's name and the size of its vocabulary in tokens."""

    url: str
    model: str
    vocabulary: int


async def run_level(
    target: Target,
    workload: Workload,
    level: Level,
    warm_up_s: float,
    seconds: float,
    together: asyncio.Barrier | None = None,
) -> Measurement:
    """Sends a load for at least `warm_up_s` and then at least `seconds`, and returns what was seen after the warm-up.

    The load goes on until the requests that were due in these seconds have ended, because the last ones would be
    faster on a server that becomes empty. The loads of several models have a barrier of so many parties: what counts
    begins when all are warm, and ends when all have enough, and no load ends before the others."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**20) as session:
        load = _Load(session, target.url, _bodies(target, workload, f"{level.title} for {seconds:g} s"))
        begin, end = await load.run(level, warm_up_s, seconds, together)
        return measured(target.model, level, load.samples, begin, end)


class _Load:
    """One level: its clients, and what they saw. Times are in seconds since it began."""

    def __init__(self, session: aiohttp.ClientSession, url: str, bodies: Iterator[tuple[str, dict[str, Any]]]):
        self.samples: list[Sample] = []
        self._session, self._url, self._bodies = session, url, bodies
        self._begin = time.perf_counter()
        self._answered: set[int] = set()
        # When each request that is on its way was due.
        self._due: dict[int, float] = {}
        self._numbers = itertools.count()

    def _now(self) -> float:
        return time.perf_counter() - self._begin

    async def run(
        self, level: Level, warm_up_s: float, seconds: float, together: asyncio.Barrier | None
    ) -> tuple[float, float]:
        """Sends the level, and returns when what counts of it began and ended."""
        source = asyncio.create_task(
            self._open(level.rate) if level.rate else self._closed(level.clients, warm_up_s), name="load"
        )
        try:
            least = level.clients or 1
            await self._until(source, lambda: len(self._answered) >= least, warm_up_s, MOST_WARM_UP_S)
            await _meet(together)
            begin = self._now()
            await self._until(source, lambda: self._ended_since(begin), begin + seconds, begin + MOST_STRETCH * seconds)
            await _meet(together)
            end = self._now()
            await self._until(source, lambda: not self._running(end), end, end + DRAIN_TIMEOUT_S)
            late = f"no answer {DRAIN_TIMEOUT_S:g} s after the load"
            self.samples += [Sample(due, None, self._now(), 0, late) for due in self._running(end)]
            await _meet(together)
        finally:
            source.cancel()
            await asyncio.gather(source, return_exceptions=True)
        return begin, end

    async def _until(
        self, source: asyncio.Task[None], is_reached: Callable[[], bool], least: float, most: float
    ) -> None:
        """Waits at least until `least`, and then until something is reached or it is `most`. Raises what the load has
        raised."""
        while self._now() < least or (self._now() < most and not is_reached()):
            if source.done():
                await source
            await asyncio.sleep(POLL_S)

    def _ended_since(self, begin: float) -> bool:
        return sum(sample.due >= begin for sample in self.samples) >= LEAST_REQUESTS

    def _running(self, end: float) -> list[float]:
        return [due for due in self._due.values() if due < end]

    async def _closed(self, clients: int, spread_s: float) -> None:
        """Has each of so many clients ask again when it has its answer. They begin one after another, or all would
        stay in step for a while."""

        async def client(number: int) -> None:
            await asyncio.sleep(spread_s * number / clients)
            while True:
                await self._ask(self._now())
                self._answered.add(number)

        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(client(number))

    async def _open(self, rate: float) -> None:
        """Sends requests at random moments, `rate` of them a second on average, whether others have ended or not."""

        async def client(due: float) -> None:
            await self._ask(due)
            self._answered.add(0)

        draw, due = random.Random(0), 0.0
        async with asyncio.TaskGroup() as group:
            while True:
                due += draw.expovariate(rate)
                await asyncio.sleep(max(0.0, due - self._now()))
                if len(self._due) >= MOST_IN_FLIGHT:
                    text = f"{MOST_IN_FLIGHT} requests were waiting already"
                    self.samples.append(Sample(due, None, self._now(), 0, text))
                    continue
                group.create_task(client(due))

    async def _ask(self, due: float) -> None:
        path, body = next(self._bodies)
        heard, number = _Heard(), next(self._numbers)
        self._due[number] = due
        try:
            async with self._session.post(self._url + path, json=body) as reply:
                if reply.status != 200:
                    heard.error = f"{reply.status} {await reply.text()}"[:MOST_ERROR]
                else:
                    async for line in reply.content:
                        heard.read(line, self._now)
                    heard.end_of_stream()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            heard.error = f"{type(error).__name__}: {error}"[:MOST_ERROR]
        finally:
            del self._due[number]
        self.samples.append(Sample(due, heard.first, self._now(), heard.tokens, heard.error))
        if heard.error:
            await asyncio.sleep(0.1)  # A server that refuses at once would be asked in a busy loop.


async def _meet(together: asyncio.Barrier | None) -> None:
    """Waits until the loads of all models are here."""
    if together is not None:
        await together.wait()


@dataclass
class _Heard:
    """What one stream said. `tokens` are those of its usage."""

    first: float | None = None
    tokens: int = 0
    error: str = ""
    is_done: bool = False

    def read(self, line: bytes, now: Any) -> None:
        """Takes one line of a stream of server-sent events."""
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            self.is_done = True
            return
        if self.first is not None and not any(part in data for part in READ):
            return
        event = json.loads(data)
        if "error" in event:
            self.error = str(event["error"])[:MOST_ERROR]
        if event.get("usage"):
            self.tokens = int(event["usage"]["completion_tokens"])
        if self.first is None and any(_has_token(choice) for choice in event.get("choices") or ()):
            self.first = now()

    def end_of_stream(self) -> None:
        """Notes that the stream has ended."""
        if not self.error and not self.is_done:
            self.error = "the stream ended before its end"
        if not self.error and self.first is not None and not self.tokens:
            self.error = "the stream told no usage"


def _has_token(choice: dict[str, Any]) -> bool:
    """Returns whether an event has a token, whose text may be empty for half a character."""
    delta = choice.get("delta")
    if delta is None:
        return "text" in choice
    return any(delta.get(key) for key in ("content", "reasoning", "reasoning_content", "tool_calls"))


def _bodies(target: Target, workload: Workload, seed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields paths and bodies of requests for ever, in the workload's order.

    They are the same at each start, but no two levels of one start have the same `seed`, so a prompt that was sent
    before is not found in a cache of prompts, beyond the tokens that all share. Requests of a log begin at another
    line."""
    draw = random.Random(seed)
    tokens = range(FIRST_TOKEN, max(FIRST_TOKEN + 1, target.vocabulary))
    shared = random.Random(0).choices(tokens, k=max(ask.shared_tokens for ask in workload.asks))
    first = draw.randrange(len(workload.asks)) if workload.has_texts else 0
    for ask in itertools.cycle([*workload.asks[first:], *workload.asks[:first]]):
        own = draw.choices(tokens, k=ask.prompt_tokens - ask.shared_tokens) if ask.body is None else []
        yield _body(ask, target.model, [*shared[: ask.shared_tokens], *own])


def _body(ask: Ask, model: str, prompt: Sequence[int]) -> tuple[str, dict[str, Any]]:
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    fields = {"model": model, "max_tokens": ask.output_tokens, "temperature": 0, **stream}
    if ask.is_exact:
        fields["ignore_eos"] = True
    if ask.body is not None:
        path = "/v1/chat/completions" if "messages" in ask.body else "/v1/completions"
        return path, {**ask.body, **fields}
    return "/v1/completions", {**fields, "prompt": prompt}
