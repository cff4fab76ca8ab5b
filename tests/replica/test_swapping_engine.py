"""An engine that has memory only while its pool has leased it some, in front of which requests wait."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.engines.engine import Engine, Parking
from serve_app.engines.lost_adapter import LostAdapter
from serve_app.engines.rank_memory import RankMemory
from serve_app.errors import AdapterError, EngineError, StillTooLarge
from serve_app.model_fields import ResidencyConfig
from serve_app.replica import held_requests
from serve_app.replica.held_requests import HeldRequests
from serve_app.replica.report import ResidencyReport
from serve_app.replica.swapping_engine import FIRST_WAKE_S, MOST_WAKE_S, Seat, SwappingEngine
from serve_app.residency import life_lock
from serve_app.router.engine_loss import is_away, is_lost_event
from tests.residency.one_process import LocalKeeper

USES_VIRTUAL_CLOCK = True


@pytest.fixture(autouse=True)
def _locks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has replicas of the same names."""
    monkeypatch.setattr(life_lock, "lock_folder", lambda: tmp_path)


async def _nothing(_: str) -> None: ...


class Small:
    """A small engine that needs 10 s to load and 1 s to park or wake. `POST /run` takes the seconds that it asks for,
    which pass only while it is there."""

    def __init__(self, log: list[str], parks: bool = True, fails: bool = False, keeps_copy: bool = True):
        self.log, self._parks, self._fails, self._keeps_copy = log, parks, fails, keeps_copy
        self.is_awake = asyncio.Event()
        self.copy, self.runs = 0, 0
        self.on_load: Callable[[str], Awaitable[None]] = _nothing

    async def start(self) -> ASGIApp:
        """Loads."""
        await asyncio.sleep(10)
        if self._fails:
            raise EngineError("the weights are broken")
        self.log.append("start")
        self.is_awake.set()
        return Starlette(
            routes=[
                Route("/run", self._run, methods=["POST"]),
                Route("/stream", self._stream, methods=["POST"]),
                Route("/v1/models", lambda _: JSONResponse({"data": []})),
            ]
        )

    async def _pass(self, seconds: float) -> None:
        self.runs += 1
        try:
            for _ in range(round(seconds * 10)):
                await self.is_awake.wait()
                await asyncio.sleep(0.1)
        finally:
            self.runs -= 1

    async def _run(self, request: Request) -> Response:
        await self._pass((await request.json())["seconds"])
        return JSONResponse({"text": "done"})

    async def _stream(self, request: Request) -> Response:
        seconds = (await request.json())["seconds"]

        async def pieces() -> Any:
            for _ in range(round(seconds)):
                await self._pass(1)
                yield b'data: {"text": "x"}\n\n'
            yield b"data: [DONE]\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream")

    async def check_health(self) -> None:
        """Is always well."""

    def load(self) -> float:
        """A half."""
        return 0.5

    def cache_blocks(self) -> None:
        """None."""

    def draft_counts(self) -> None:
        """None."""

    def prompt_cache_counts(self) -> None:
        """None."""

    def parking(self) -> Parking | None:
        """Itself."""
        return self if self._parks else None

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Refuses what is broken."""
        self.log.append(f"load {name}")
        await self.on_load(name)
        if name == "broken":
            raise AdapterError("it is broken")

    def watch_adapters(self, lost: LostAdapter) -> None:
        """Nothing is lost by itself."""

    async def unload_adapter(self, name: str) -> None:
        """Forgets it."""
        self.log.append(f"unload {name}")

    async def memory(self) -> Sequence[RankMemory]:
        """Nothing."""
        return ()

    async def stop(self) -> None:
        """Ends."""
        self.log.append("stop")

    async def park(self, still_bytes: int | None = None) -> None:
        """In a second. Each request that runs holds a byte."""
        if still_bytes is not None and self.runs > still_bytes:
            raise StillTooLarge(f"they hold {self.runs} bytes")
        self.is_awake.clear()
        await asyncio.sleep(1)
        self.copy = 1
        self.log.append("park")

    async def wake(self) -> None:
        """In a second."""
        await asyncio.sleep(1)
        self.copy = int(self._keeps_copy)
        self.log.append("wake")
        self.is_awake.set()

    def copy_bytes(self) -> int:
        """One."""
        return self.copy

    async def forget_copy(self) -> None:
        """At once."""
        self.copy = 0
        self.log.append("forget")


class Made:
    """A replica in a pool for one, and a client of its application."""

    def __init__(
        self, keeper: LocalKeeper, name: str, swaps: dict[str, Any] | None = None, still: int = 10, **engine: bool
    ):
        self.log: list[str] = []
        config = ResidencyConfig(policy="swap", min_resident_s=2, drain_s=5, **(swaps or {}))

        self.on_load: Callable[[str], Awaitable[None]] = _nothing

        def make() -> Engine:
            made = Small(self.log, **engine)
            made.on_load = self.on_load
            return made

        clock = asyncio.get_running_loop().time
        self.engine = SwappingEngine(name, f"{name}#1", config, [Seat({"cpu": 1}, make)], 1, keeper, clock, still=still)
        self.client: httpx.AsyncClient

    async def start(self) -> "Made":
        """Once it has been resident for the first time."""
        app = await self.engine.start()
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine", timeout=1000)
        return self

    async def ask(self, seconds: float, path: str = "/run") -> httpx.Response:
        """One request that runs for so long."""
        return await self.client.post(path, json={"seconds": seconds})


async def pool(*names: str, **engine: bool) -> list[Made]:
    """Replicas of a pool that has memory for one."""
    keeper = LocalKeeper(budget=1)
    return list(await asyncio.gather(*(Made(keeper, name, **engine).start() for name in names)))


async def test_each_is_loaded_once_at_its_start() -> None:
    """So a broken model is known at once, and the time of a start is measured."""
    a, b = await pool("a", "b")
    assert [a.engine.state, b.engine.state] == ["parked", "resident"]
    assert (a.log, b.log) == (["start", "park"], ["start"])
    assert a.engine.residency() == ResidencyReport("parked", "default", FIRST_WAKE_S, is_guess=True)


async def test_a_request_wakes_its_model_and_is_answered() -> None:
    """The other one parks for it."""
    a, b = await pool("a", "b")
    assert (await a.ask(1)).json() == {"text": "done"}
    assert (a.log, b.log) == (["start", "park", "wake"], ["start", "park"])
    assert b.engine.residency().ready_in_s == FIRST_WAKE_S
    await b.ask(1)
    assert a.engine.residency().ready_in_s == 1.0


async def test_questions_need_no_memory() -> None:
    """A parked model still tells its models, and nobody leaves for that."""
    a, b = await pool("a", "b")
    assert (await a.client.get("/v1/models")).status_code == 200
    assert b.engine.state == "resident"


async def test_requests_that_run_have_their_time() -> None:
    """A short one ends before its model leaves. A long one stands still and goes on later, without a loss."""
    a, b = await pool("a", "b")
    short, long = asyncio.create_task(b.ask(4)), asyncio.create_task(b.ask(60))
    await asyncio.sleep(1)
    await a.ask(1)
    assert short.done()
    assert not long.done()
    assert (await long).json() == {"text": "done"}
    assert b.log == ["start", "park", "wake"]


async def test_requests_that_hold_too_much_do_not_stand_still() -> None:
    """The router sends them again, and the model parks without them."""
    keeper = LocalKeeper(budget=1)
    a, b = await asyncio.gather(Made(keeper, "a").start(), Made(keeper, "b", still=1).start())
    runs = [asyncio.create_task(b.ask(100)) for _ in range(2)]
    await asyncio.sleep(1)
    await a.ask(1)
    for run in runs:
        assert is_away((await run).content)
    assert b.log == ["start", "park"]
    alone = asyncio.create_task(b.ask(100))  # It holds no more than it may.
    await asyncio.sleep(10)
    await a.ask(1)
    assert (await alone).json() == {"text": "done"}
    assert (await b.client.get("/v1/models")).status_code == 200


async def test_one_that_cannot_park_is_stopped() -> None:
    """A stream that it must cut ends as one of a lost engine, which the router continues elsewhere or later."""
    a, b = await pool("a", "b", parks=False)
    stream = asyncio.create_task(b.ask(100, "/stream"))
    whole = asyncio.create_task(b.ask(100))
    await asyncio.sleep(1)
    await a.ask(1)
    told = (await stream).content
    assert is_lost_event(told)
    assert is_away(told)
    assert b'"x"' in told
    assert (await whole).status_code == 503
    assert is_away((await whole).content)
    assert (await a.client.get("/v1/models")).status_code == 200
    refused = await b.client.get("/v1/models")
    assert (refused.status_code, is_away(refused.content)) == (503, False)
    assert b.engine.state == "stopped"
    assert (a.log, b.log) == (["start", "stop", "start"], ["start", "stop"])


async def test_a_model_may_have_no_copy() -> None:
    """With host_memory: 0 it is stopped."""
    keeper = LocalKeeper(budget=1)
    a, b = Made(keeper, "a", {"host_memory": 0}), Made(keeper, "b")
    await asyncio.gather(a.start(), b.start())
    assert a.log == ["start", "stop"]


async def test_a_copy_makes_room_for_another_one() -> None:
    """The host has memory for one copy, and that of the model that counts more is kept."""
    keeper = LocalKeeper(budget=1, host_budget=11)
    a = await Made(keeper, "a").start()
    b = await Made(keeper, "b", {"priority": 5}).start()
    assert (a.log, a.engine.state) == (["start", "park"], "parked")
    c = await Made(keeper, "c").start()
    assert (a.log, a.engine.state) == (["start", "park", "stop"], "stopped")
    assert (b.log, b.engine.state) == (["start", "park"], "parked")
    await a.ask(1)
    assert (c.log, c.engine.state) == (["start", "stop"], "stopped")


def copies(keeper: LocalKeeper) -> dict[str, bool]:
    """Which replicas have a copy, as the keeper's book has it."""
    return {member.terms.model: member.has_copy for member in keeper.keeper._book.pool.members}


@pytest.mark.parametrize("keeps_copy", [True, False])
async def test_the_book_knows_whether_a_copy_stays_after_a_wake(keeps_copy: bool) -> None:
    """pt keeps it, and vLLM frees it. A copy that is being made has its place in the host's memory already."""
    keeper = LocalKeeper(budget=1)
    a, b = await asyncio.gather(*(Made(keeper, name, keeps_copy=keeps_copy).start() for name in "ab"))
    assert copies(keeper) == {"a": True, "b": False}
    busy, asked = asyncio.create_task(b.ask(60)), asyncio.create_task(a.ask(1))
    await asyncio.sleep(8)  # It has to stay for three times the guessed 2 s of a wake.
    assert b.engine.state == "draining"
    assert copies(keeper) == {"a": True, "b": True}
    await asked
    assert copies(keeper) == {"a": keeps_copy, "b": True}
    await busy
    assert copies(keeper) == {"a": True, "b": keeps_copy}


async def test_a_replica_keeps_the_residue_of_the_devices_that_it_has() -> None:
    """Its second way to run is on another device, which keeps something else."""
    keeper, log = LocalKeeper(budget=10), list[str]()
    seats = [Seat({"gpu": 10}, lambda: Small(log), {"gpu": 3}), Seat({"cpu": 10}, lambda: Small(log), {"cpu": 2})]
    config = ResidencyConfig(policy="swap", min_resident_s=2, drain_s=5)
    engine = SwappingEngine("a", "a#1", config, seats, 1, keeper, asyncio.get_running_loop().time)
    await engine.start()
    await asyncio.sleep(1)
    (member,) = keeper.keeper._book.pool.members
    assert member.lease == {"cpu": 10}
    assert member.gives == {"cpu": 8}
    await engine.stop()


async def test_a_model_that_cannot_load_fails_its_start() -> None:
    """Its lease is free once its process has ended, because nobody knows what it has loaded."""
    keeper = LocalKeeper(budget=1)
    broken, good = Made(keeper, "a", fails=True), Made(keeper, "b")
    started = asyncio.create_task(good.start())
    with pytest.raises(EngineError, match="the weights are broken"):
        await broken.start()
    with pytest.raises(EngineError, match="the weights are broken"):
        await broken.engine.check_health()
    await broken.engine.stop()
    await asyncio.sleep(60)
    assert good.engine.state == "stopped"
    keeper.dead.add("a#1")
    await started
    assert good.engine.state == "resident"


async def test_a_stop_in_the_middle_of_a_load_gives_nothing_back() -> None:
    """What it has loaded by then is free only once its process has ended."""
    keeper = LocalKeeper(budget=1)
    a, b = Made(keeper, "a"), Made(keeper, "b")
    starting, waiting = asyncio.create_task(a.start()), asyncio.create_task(b.start())
    await asyncio.sleep(5)
    starting.cancel()
    await a.engine.stop()
    await asyncio.sleep(60)
    assert b.engine.state == "stopped"
    keeper.dead.add("a#1")
    await waiting
    assert b.engine.state == "resident"


async def test_a_stream_that_stands_still_gets_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody takes the silence for an end."""
    monkeypatch.setattr(held_requests, "COMMENT_EVERY_S", 1.0)
    a, b = await pool("a", "b")
    stream = asyncio.create_task(b.ask(30, "/stream"))
    await asyncio.sleep(1)
    busy = asyncio.create_task(a.ask(100))
    text = (await stream).text
    assert ": parked\n\n" in text
    assert text.count('"x"') == 30
    await busy


async def test_an_order_that_hangs_ends_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would hold its lease for ever, and look healthy."""
    keeper = LocalKeeper(budget=1)
    a = Made(keeper, "a")

    async def hangs(_: Small) -> ASGIApp:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(Small, "start", hangs)
    starting = asyncio.create_task(a.start())
    await asyncio.sleep(MOST_WAKE_S - 1)
    await a.engine.check_health()
    await asyncio.sleep(2)
    with pytest.raises(EngineError, match="still waking"):
        await a.engine.check_health()
    starting.cancel()
    await a.engine.stop()


async def test_a_stop_gives_everything_back() -> None:
    """Those that wait are told so."""
    a, b = await pool("a", "b")
    waiting = asyncio.create_task(a.ask(1))
    await asyncio.sleep(0.01)
    await a.engine.stop()
    assert (await waiting).status_code == 503
    await b.engine.stop()
    assert b.log[-1] == "stop"


async def test_no_more_go_in_than_the_engine_takes() -> None:
    """Those that have gathered while it was away go in one after the other, in the order in which they came."""
    ended, running, most = [], 0, 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(1)
        running -= 1
        ended.append(scope["path"])
        await Response("done")(scope, receive, send)

    held = HeldRequests("m", lambda: None, asyncio.get_running_loop().time, most_running=2)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(held), base_url="http://engine", timeout=1000)
    asked = []
    for number in range(5):
        asked.append(asyncio.create_task(client.post(f"/{number}")))
        await asyncio.sleep(0.01)
    asked[1].cancel()
    await asyncio.sleep(0.01)
    assert (held.waiting, held.running) == (4, 0)
    held.open(app)
    await asyncio.sleep(0.5)
    assert (held.waiting, held.running) == (2, 2)
    held.close()
    await asyncio.sleep(5)
    assert (held.waiting, held.running) == (2, 0)
    held.open(app)
    replies = await asyncio.gather(*asked, return_exceptions=True)
    assert [getattr(reply, "status_code", None) for reply in replies] == [200, None, 200, 200, 200]
    assert (ended, most, held.waiting) == (["/0", "/2", "/3", "/4"], 2, 0)


async def test_a_client_that_leaves_waits_no_more() -> None:
    """Its model is not woken for nobody."""
    a, b = await pool("a", "b")
    busy = asyncio.create_task(b.ask(3))
    await asyncio.sleep(0.5)
    waiting = asyncio.create_task(a.ask(1))
    await asyncio.sleep(0.5)
    waiting.cancel()
    await busy
    await asyncio.sleep(60)
    assert b.engine.state == "resident"


async def test_an_engine_that_starts_again_has_its_adapters_again() -> None:
    """Also those that came while there was no engine. One that is broken by then concerns no other one, and is told
    once the engine could be given it again."""
    a, b = await pool("a", "b", parks=False)
    assert (a.engine.state, b.engine.state) == ("stopped", "resident")
    await b.engine.load_adapter("x", Path("/x"))
    with pytest.raises(AdapterError):
        await b.engine.load_adapter("broken", Path("/x"))
    lost: list[tuple[str, str, bool]] = []
    again: list[asyncio.Task[None]] = []

    def tell(*told: Any) -> None:
        lost.append(told)
        again.append(asyncio.create_task(a.engine.load_adapter("broken", Path("/z"))))

    a.engine.watch_adapters(tell)
    for name in ("y", "broken", "gone"):
        await a.engine.load_adapter(name, Path("/y"))
    await a.engine.unload_adapter("gone")
    await a.ask(1)
    assert lost == [("broken", "it is broken", False)]
    with pytest.raises(AdapterError):  # The engine runs, so it says at once that this one is broken too.
        await again[0]
    assert a.log[-4:] == ["start", "load y", "load broken", "load broken"]
    await b.ask(1)
    assert b.log[-2:] == ["start", "load x"]
    await a.ask(1)
    assert a.log[-2:] == ["start", "load y"]  # The broken one is not brought for ever.


async def test_versions_of_adapters_that_change_while_they_are_brought(tmp_path: Path) -> None:
    """A newer version of the same folder is brought too, one that is removed goes, and files that are others by then
    are not taken for the version that was loaded."""
    a, b = await pool("a", "b", parks=False)
    assert (a.engine.state, b.engine.state) == ("stopped", "resident")
    changed = tmp_path / "changed"
    for name in ("x", "gone", "changed"):
        (tmp_path / name).mkdir()
        await a.engine.load_adapter(name, tmp_path / name)
    (changed / "adapter_config.json").write_text("{}")
    lost: list[tuple[str, str, bool]] = []
    a.engine.watch_adapters(lambda *told: lost.append(told))

    async def meanwhile(name: str) -> None:
        if name == "gone" and "load gone" in a.log:
            await a.engine.load_adapter("x", tmp_path / "x")
            await a.engine.unload_adapter("gone")

    a.on_load = meanwhile
    await a.ask(1)
    assert a.log[-5:] == ["start", "load x", "load gone", "load x", "unload gone"]
    assert lost == [("changed", f"the files in {changed} have changed since it was loaded", False)]
