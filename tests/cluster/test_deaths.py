"""The pt engine's thread dies in a replica that lives on (`faults.py`)."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx

from tests.cluster import faults
from tests.cluster.contract import HEADERS
from tests.cluster.mortal import MortalServe
from tests.cluster.serve_run import ServeRun
from tests.cluster.storm import Trouble, ask, body_of, storm


@asynccontextmanager
async def streams(run: ServeRun, clients: int) -> AsyncIterator[list[dict[str, Any]]]:
    """Clients that ask for one text after the other meanwhile; and what each of them saw."""
    seen: list[dict[str, Any]] = []
    is_over = asyncio.Event()

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        while not is_over.is_set():
            path, body = body_of(number, "mortal")
            seen.append(await ask(session, run.url, path, body))
            number += clients

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=HEADERS) as session:
        tasks = [asyncio.create_task(client(session, number)) for number in range(clients)]
        yield seen
        is_over.set()
        await asyncio.gather(*tasks)


async def test_a_request_that_kills_its_replica_is_refused_and_nobody_else(mortal: MortalServe) -> None:
    """It takes two or three along, or all of its four tries where the machine is so busy that its rivals' turns run
    out (`suspicion.TURN_S`); then it is known. The exact law: `test_suspicion.py`. The streams beside it go on. The
    first test here: deaths in the minute before would speak for the request."""
    before = mortal.dead()
    poison = {"model": "mortal", "prompt": "What is Ray?", "seed": faults.POISON_SEED, "max_tokens": 8}
    async with (
        streams(mortal, clients=8) as seen,
        httpx.AsyncClient(base_url=mortal.url, timeout=240, headers=HEADERS) as client,
    ):
        await asyncio.sleep(2)
        reply = await client.post("/v1/completions", json=poison)
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "request_may_be_harmful"), reply.text
    assert 2 <= len(mortal.dead() - before) <= 4
    assert not [answer for answer in seen if answer["error"] or answer["ends"] != 1]


async def test_streams_survive_the_death_of_the_engine_in_a_living_replica(mortal: MortalServe) -> None:
    """Every request completes, with the text, the one id and the one end of an undisturbed run."""
    await asyncio.to_thread(mortal.wait_for_both)
    before = mortal.dead()
    trouble = Trouble(kill_every_s=6.0, deaths="thread")
    told = await storm(mortal, "mortal", requests=200, clients=32, trouble=trouble, headers=HEADERS)
    assert told["outcomes"] == {"right": 200}
    assert mortal.dead() > before


async def test_whole_answers_survive_it_too(mortal: MortalServe) -> None:
    """Asked again elsewhere; with every engine dead, once one has been replaced."""
    await asyncio.to_thread(mortal.wait_for_both)
    body = {"model": "mortal", "prompt": "What is Ray?", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    pids = mortal.living()
    async with httpx.AsyncClient(base_url=mortal.url, timeout=120, headers=HEADERS) as client:
        expected = (await client.post("/v1/completions", json=body)).json()["choices"]
        asking = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(16)]
        await asyncio.sleep(0.2)
        for pid in pids:
            os.kill(pid, faults.DIES)
        replies = await asyncio.gather(*asking)
    assert [reply.status_code for reply in replies] == [200] * 16, replies[0].text
    assert all(reply.json()["choices"] == expected for reply in replies)
    assert pids <= mortal.dead()


def test_a_long_redirect_is_an_answer(mortal: MortalServe) -> None:
    """A slash too many; `location` has the query. A header of that size counted as a lost replica."""
    mortal.wait_for_both()
    started = time.monotonic()
    reply = httpx.post(
        f"{mortal.url}/v1/completions/?{'x' * 9000}", json={"model": "mortal"}, headers=HEADERS, timeout=60
    )
    assert (reply.status_code, len(reply.headers["location"]) > 9000) == (307, True), reply.text
    assert time.monotonic() - started < 2
