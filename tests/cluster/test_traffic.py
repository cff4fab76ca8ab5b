"""Traffic that goes wrong, on a Serve with API keys: replicas die, clients vanish, keys are missing."""

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx
import psutil
import pytest
from playwright.sync_api import Page, expect

from tests.browser import Watched, chromium
from tests.cluster import counting, faults, hostile
from tests.cluster.contract import HEADERS, KEY, document_of, without_key
from tests.cluster.mortal import MortalServe
from tests.cluster.serve_run import ServeRun
from tests.cluster.storm import Trouble, ask, body_of, storm
from tests.demo_answers import ANSWERS, QUESTIONS


@pytest.fixture
def serve(mortal: MortalServe) -> MortalServe:
    """With both replicas, whatever a test before has killed."""
    mortal.wait_for_both()
    return mortal


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


async def test_a_request_that_kills_its_replica_is_refused_and_nobody_else(serve: MortalServe) -> None:
    """It takes two or three along, or all of its four tries where the machine is so busy that its rivals' turns run
    out (`suspicion.TURN_S`); then it is known. The exact law: `test_suspicion.py`. The streams beside it go on. The
    first test here: deaths in the minute before would speak for the request."""
    before = serve.dead()
    poison = {"model": "mortal", "prompt": "What is Ray?", "seed": faults.POISON_SEED, "max_tokens": 8}
    async with (
        streams(serve, clients=8) as seen,
        httpx.AsyncClient(base_url=serve.url, timeout=240, headers=HEADERS) as client,
    ):
        await asyncio.sleep(2)
        reply = await client.post("/v1/completions", json=poison)
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "request_may_be_harmful"), reply.text
    assert 2 <= len(serve.dead() - before) <= 4
    assert not [answer for answer in seen if answer["error"] or answer["ends"] != 1]


async def test_streams_survive_the_death_of_the_engine_in_a_living_replica(serve: MortalServe) -> None:
    """Every request completes, with the text, the one id and the one end of an undisturbed run."""
    before = serve.dead()
    trouble = Trouble(kill_after=frozenset({50}), deaths="thread")
    told = await storm(serve, "mortal", requests=200, clients=32, trouble=trouble, headers=HEADERS)
    assert told["outcomes"] == {"right": 200}
    assert len(serve.dead() - before) == 1


async def test_whole_answers_survive_it_too(serve: MortalServe) -> None:
    """Asked again elsewhere; with every engine dead, once one has been replaced."""
    body = {"model": "mortal", "prompt": "What is Ray?", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    pids = serve.living()
    async with httpx.AsyncClient(base_url=serve.url, timeout=120, headers=HEADERS) as client:
        expected = (await client.post("/v1/completions", json=body)).json()["choices"]
        asking = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(16)]
        await asyncio.sleep(0.2)
        for pid in pids:
            os.kill(pid, faults.DIES)
        replies = await asyncio.gather(*asking)
    assert [reply.status_code for reply in replies] == [200] * 16, replies[0].text
    assert all(reply.json()["choices"] == expected for reply in replies)
    assert pids <= serve.dead()


def test_a_long_redirect_is_an_answer(serve: MortalServe) -> None:
    """A slash too many; `location` has the query. A header of that size counted as a lost replica."""
    reply = httpx.post(
        f"{serve.url}/v1/completions/?{'x' * 9000}", json={"model": "mortal"}, headers=HEADERS, timeout=60
    )
    assert (reply.status_code, len(reply.headers["location"]) > 9000) == (307, True), reply.text


def test_nothing_but_health_answers_without_a_key(serve: MortalServe) -> None:
    """By name and by route, paths that do not exist too."""
    paths = ["/ready", "/v1/models", "/v1/models/mortal", "/docs", "/openapi.json", "/metrics", "/nothing"]
    paths += [f"/models/mortal{path}" for path in [*paths, "/tokenize", "/v1/chat/completions", "/load"]]
    bodies = {"model": "mortal", "prompt": "x"}
    with httpx.Client(base_url=serve.url, timeout=30) as client:
        for path in paths:
            assert client.get(path).status_code == 401, path
            assert client.post(path, json=bodies).status_code == 401, path
            wrong = client.post(path, json=bodies, headers={"authorization": "Bearer sk-wrong"})
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key"), path
        assert client.get("/health").status_code == 200
        assert client.get("/models/mortal/health").status_code == 200
        assert client.get("/v1/models", headers=HEADERS).status_code == 200
        for url in (serve.url, f"{serve.url}/models/mortal"):  # vLLM's document: `python -m tests.cluster.contract`.
            seen = without_key(url, document_of(url))
            assert {operation for operation, status in seen.items() if status != 401} == {"GET /health"}, seen
        reply = client.post("/v1/completions", json={**bodies, "max_tokens": 2}, headers=HEADERS)
        assert reply.status_code == 200
        assert client.post("/models/mortal/v1/completions", json=bodies, headers=HEADERS).status_code == 200


COUNTED = b'{"prompt": "x"}'
FORGED = {"serve_app.identity": "a", "serve-app-identity": "a", "serve_app.body": "x", "x-serve-app-key-name": "a"}


@pytest.mark.parametrize("prefix", [counting.ROUTER_PREFIX, counting.MODEL_PREFIX])
def test_a_replica_behind_haproxy_looks_a_key_up_once(serve: MortalServe, prefix: str) -> None:
    """The door of the same process has done so, and its finding goes through Serve's own wrapping."""
    url = f"{serve.url}{prefix}/v1/x"
    wait_until_haproxy_knows(url, serve)
    for _ in range(3):
        told: Any = httpx.post(url, content=COUNTED, headers=HEADERS, timeout=30).json()
        assert told == {"lookups": 1, "has_identity": True, "same_body": True, "bytes": len(COUNTED)}
    refused = httpx.post(url, content=COUNTED, headers=FORGED, timeout=30)
    assert refused.status_code == 401


def wait_until_haproxy_knows(url: str, serve: MortalServe) -> None:
    """Returns when HAProxy sends to the replica itself. Until it knows that one, it sends to Serve's Python proxy."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
            if httpx.post(url, content=COUNTED, headers=HEADERS, timeout=10).json()["has_identity"]:
                return
        time.sleep(0.5)
    raise TimeoutError(serve.output()[-4000:])


def test_a_replica_behind_serves_proxy_asks_itself(serve: MortalServe) -> None:
    """What the proxy's door has found does not leave the proxy's process."""
    proxy = f"http://127.0.0.1:{serve.environment['RAY_SERVE_FALLBACK_PROXY_HTTP_PORT']}"
    url = f"{proxy}{counting.MODEL_PREFIX}/v1/x"
    httpx.post(url, content=COUNTED, headers=HEADERS, timeout=30)  # Lookups are counted from here.
    told: Any = httpx.post(url, content=COUNTED, headers=HEADERS, timeout=30).json()
    assert told == {"lookups": 1, "has_identity": False, "same_body": True, "bytes": len(COUNTED)}
    assert httpx.post(url, content=COUNTED, headers=FORGED, timeout=30).status_code == 401


def memory_of(serve: ServeRun, *parts: str) -> dict[str, float]:
    """MB of the processes whose command has one of these in it."""
    found: dict[str, float] = {}
    for pid, command in serve.processes().items():
        for part in parts:
            with contextlib.suppress(psutil.Error):
                if part in command:
                    found[part] = found.get(part, 0.0) + psutil.Process(pid).memory_info().rss / 1e6
    return found


async def idle(session: aiohttp.ClientSession) -> bool:
    """Whether, within half a minute, no engine holds a row. The route takes the replica with fewer connections."""
    loads = [1]
    for _ in range(60):
        loads = []
        for _ in range(6):
            async with session.get("/models/mortal/load") as reply:
                loads.append((await reply.json())["server_load"])
        if not any(loads):
            break
        await asyncio.sleep(0.5)
    return not any(loads)


ROUTES = ("", "/models/mortal")
PARTS = ("ServeReplica:router", "ServeReplica:mortal", "haproxy")


async def test_hostile_clients_are_refused_and_hurt_nobody(serve: MortalServe) -> None:
    """By name and by route: 200 that send a byte a second, 200 that read one, bodies of 100 MB, ten thousand headers.
    Each gets a clear error, others are answered meanwhile, and the memory stays where it was."""
    body = {"model": "mortal", "prompt": "Tell me", "max_tokens": 64, "ignore_eos": True, "temperature": 0}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base_url=serve.url, connector=connector, headers=HEADERS) as session:
        async with session.post("/v1/completions", json=body) as reply:
            assert reply.status == 200
        before = memory_of(serve, *PARTS)
        slow = [asyncio.create_task(hostile.slow_sender(serve.port, ROUTES[number % 2], KEY)) for number in range(200)]
        reading = [
            asyncio.create_task(
                hostile.slow_reader(serve.port, ROUTES[number % 2], KEY, {**body, "stream": True}, seconds=15)
            )
            for number in range(200)
        ]
        for route in ROUTES:
            for declared in (True, False):
                status, said = await hostile.large_body(serve.port, route, KEY, declared)
                assert (status, b"request_too_large" in said) == (413, True), (route, declared, said[:300])
            status, said = await hostile.many_headers(serve.port, route, KEY)
            assert status == 400, said[:300]
            async with session.post(f"{route}/v1/completions", json={**body, "max_tokens": 4}) as reply:
                assert reply.status == 200
        answers = await asyncio.gather(*slow)
        assert {status for status, _ in answers} == {408}
        assert all(b"body_timeout_s" in said for _, said in answers)
        assert min(await asyncio.gather(*reading)) == 15
        assert await idle(session)
    after = memory_of(serve, *PARTS)
    assert all(after[part] < before[part] + 100 for part in PARTS), (before, after)


async def test_clients_that_vanish_leave_nothing_behind(serve: MortalServe) -> None:
    """500, by name and by route, streaming and not, at random moments: afterwards no engine holds a row, nothing waits,
    and the memory is where it was."""
    draw = random.Random(1)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base_url=serve.url, connector=connector, headers=HEADERS) as session:

        async def vanish(number: int) -> None:
            body = {"model": "mortal", "prompt": "Tell me", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
            path = "/v1/completions" if number % 2 else "/models/mortal/v1/completions"
            try:
                async with asyncio.timeout(draw.uniform(0.01, 2.0)):
                    async with session.post(path, json={**body, "stream": number % 3 != 0}) as reply:
                        await reply.read()
            except (TimeoutError, aiohttp.ClientError):
                pass

        for _ in range(6):  # Allocators reach their size: of 250 requests the first add 19 MB, the fourth ones 7.
            await asyncio.gather(*(vanish(number) for number in range(50)))
        assert await idle(session)
        before = memory_of(serve, *PARTS)
        for _ in range(10):
            await asyncio.gather(*(vanish(number) for number in range(50)))
        assert await idle(session)
        async with session.get("/ready") as reply:
            told = (await reply.json())["models"]["mortal"]
        assert (told["waiting"], told["held"]) == (0, 0)
    after = memory_of(serve, *PARTS)
    # MB, of all processes of a kind together; 5 % is what two replicas' allocators still move by.
    assert all(after[part] < before[part] + max(50, 0.05 * before[part]) for part in PARTS), (before, after)


def test_an_update_that_cannot_be_built_leaves_what_runs(serve: MortalServe) -> None:
    """Serve's status then knows of no replica; they answer all the same, and the reason is told."""
    wrong = serve.config()
    wrong["applications"][1]["args"]["max_seqs"] = 8
    serve.deploy(wrong)
    told = serve.wait_until(lambda models: models["mortal"]["message"], timeout_s=60)["mortal"]
    assert (told["status"], told["replicas"], "max_num_seqs" in told["message"]) == ("ready", 2, True)
    body = {"model": "mortal", "prompt": "x", "max_tokens": 2}
    assert httpx.post(f"{serve.url}/v1/completions", json=body, headers=HEADERS, timeout=30).status_code == 200
    before = set(serve.processes())
    serve.deploy(serve.config())
    serve.wait_until(lambda models: not models["mortal"]["message"], timeout_s=60)
    assert {pid for pid, command in serve.processes().items() if "ServeReplica" in command} <= before


async def test_streams_survive_the_death_of_their_replicas(serve: MortalServe) -> None:
    """Every request completes, with the text, the one id and the one end of an undisturbed run."""
    trouble = Trouble(kill_after=frozenset({100, 300}))
    told = await storm(serve, "mortal", requests=400, clients=32, trouble=trouble, headers=HEADERS)
    assert told["outcomes"] == {"right": 400}
    assert told["kills"] == 2


def test_the_console_sees_a_killed_replica_at_once_and_the_answers_go_on(serve: MortalServe) -> None:
    """It shows nothing without the right key. With it, a killed replica is an event within 5 s, and the answers of both
    panes are those of an undisturbed run."""
    question = max(QUESTIONS, key=lambda each: len(ANSWERS[each]))
    with busy_clients(serve, 6), chromium() as browser:
        watched = Watched(browser, serve.url)
        watched.expected = ("status of 401",)
        page = watched.open()
        sign_in(page, "sk-wrong")
        expect(page.get_by_role("alert")).to_contain_text("does not accept this key")
        sign_in(page, KEY)
        expect(page.get_by_text("Live", exact=True)).to_be_visible()
        watched.show("playground")
        page.get_by_role("button", name="Two side by side").click()
        for letter in "AB":
            pane = page.get_by_role("region", name=f"Pane {letter}")
            pane.get_by_label(f"Model {letter}").select_option("mortal")
            pane.get_by_text("Parameters").click()
            pane.get_by_label("Temperature").fill("0")
        page.locator("#draft").fill(question)
        answers = page.locator(".answer")
        pids = serve.living()
        with slowed(pids):
            page.keyboard.press("Enter")
            expect(answers).to_have_count(2)
            note_what_is_read_out(page)
            begun = answers.all_inner_texts()
            os.kill(min(pids), signal.SIGKILL)
            killed = time.monotonic()
        assert all(len(text) < len(ANSWERS[question]) for text in begun), begun
        while not any("mortal" in text and "was lost" in text for text in read_out(page)):
            assert time.monotonic() - killed < 5, read_out(page)
            page.wait_for_timeout(50)
        expect(page.get_by_role("button", name="Stop")).to_be_disabled(timeout=60_000)
        assert answers.all_inner_texts() == [ANSWERS[question]] * 2
        watched.show("requests")
        expect(page.locator("#panel-requests tbody tr", has_text="resumed 1×")).not_to_have_count(0)
        watched.close()


def note_what_is_read_out(page: Page) -> None:
    """From now on. A text may be replaced by the next event's before anybody looks."""
    page.evaluate(
        """() => {
          const log = document.querySelector("[role=log]");
          window.readOut = [];
          new MutationObserver(() => window.readOut.push(log.textContent)).observe(log, {
            subtree: true, childList: true, characterData: true,
          });
        }"""
    )


def read_out(page: Page) -> list[str]:
    """The texts for screen readers since `note_what_is_read_out`."""
    texts: list[str] = page.evaluate("window.readOut")
    return texts


def sign_in(page: Page, key: str) -> None:
    """By the form."""
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()


@contextlib.contextmanager
def slowed(pids: set[int]) -> Iterator[None]:
    """These processes stand still most of the time meanwhile, so that a short answer takes seconds."""
    is_over = threading.Event()

    def send(number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def hold() -> None:
        while not is_over.is_set():
            send(signal.SIGSTOP)
            is_over.wait(0.2)
            send(signal.SIGCONT)
            is_over.wait(0.02)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        send(signal.SIGCONT)


@contextlib.contextmanager
def busy_clients(serve: MortalServe, clients: int) -> Iterator[None]:
    """Clients that stream one answer after the other meanwhile, in threads, for a test that is not async."""
    is_over = threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(base_url=serve.url, timeout=120, headers=HEADERS) as client:
            while not is_over.is_set():
                path, body = body_of(number, "mortal")
                client.post(path, json=body)
                number += clients

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join(60)


def test_a_killed_serve_run_leaves_no_process_behind(mortal: MortalServe) -> None:
    """Nobody is left who could end Ray, its workers, the engines and HAProxy, and they end, whatever was done to them.
    The last test here: it ends the cluster."""
    commands = " ".join(mortal.processes().values())
    assert all(name in commands for name in ("raylet", "ServeReplica:mortal", "bin/haproxy")), commands
    assert mortal.stop(signal.SIGKILL) == {}
