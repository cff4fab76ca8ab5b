"""What goes wrong beside the console holds up nobody."""

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from serve_app.console import cluster_watch
from serve_app.console import console as console_module
from serve_app.console.moment import deltas_for
from serve_app.console.traffic import INTERVAL_S
from serve_app.status.cluster_status import ClusterStatus
from serve_app.status.reader import Reading
from tests.console.served import Stream, ask, client, console_app, status_of
from tests.fakes import Models, open_gate, says


async def test_streams_end_when_the_router_stops() -> None:
    """They would hold up Serve, which waits for all requests of a replica."""
    console, app = console_app(open_gate())
    stream = Stream(app)
    await stream.next()
    directory: Any = console.parts.directory
    directory.applications["router"] = {
        "deployments": {"Router": {"replicas": [{"replica_id": "abc", "state": "STOPPING"}]}}
    }
    console.watch._read_at = 0.0
    await console.tick()
    async with asyncio.timeout(5):
        await stream.task
    again = Stream(app)
    async with asyncio.timeout(5):
        await again.task
    assert len(console._feed) == 0


async def test_a_cluster_that_cannot_be_read_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The state has what is known, and the log has one line."""

    def fails(*_: Any) -> Reading:
        raise RuntimeError("Ray's head does not answer")

    console, app = console_app(open_gate())
    console.watch._read_status = fails
    for _ in range(3):
        console.watch._read_at = 0.0
        assert await status_of(app, {}) == 200
    assert sum("Ray's head does not answer" in record.message for record in caplog.records) == 1


async def test_a_mistake_of_the_console_breaks_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is logged alone."""
    models = Models(m=says(b"{}"))
    console, app = console_app(open_gate(), upstream=models, directory=models)
    monkeypatch.setattr(console.ledger, "began", lambda exchange: 1 / 0)
    monkeypatch.setattr(console.ledger, "ended", lambda exchange: 1 / 0)
    async with client(app) as http:
        reply = await http.post("/v1/chat/completions", json={"model": "m", "messages": []})
    assert reply.status_code == 200


async def test_a_head_of_ray_that_is_gone_holds_up_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray waits for it for a minute and more, in one thread."""
    monkeypatch.setattr(cluster_watch, "READ_TIMEOUT_S", 0.05)
    go_on, calls = threading.Event(), 0

    def hangs(*_: Any) -> Reading:
        nonlocal calls
        calls += 1
        go_on.wait(10)
        return Reading(ClusterStatus((), (), ()), ())

    console, app = console_app(open_gate())
    console.watch._read_status = hangs
    for _ in range(3):
        console.watch._read_at = 0.0
        assert await status_of(app, {}) == 200
    assert calls == 1
    go_on.set()
    await asyncio.sleep(0.1)
    console.watch._read_at = 0.0
    await console.watch.read()
    assert console.watch.snapshot is not None


async def test_a_slow_reading_holds_up_neither_requests_nor_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told beside it, and so is each interval of the traffic that has ended meanwhile."""
    monkeypatch.setattr(console_module, "READ_WAIT_S", 0.05)
    models = Models(m=says(b"{}"))
    console, app = console_app(open_gate(), upstream=models, directory=models)
    stream = Stream(app)
    _, state = await stream.next()
    go_on = threading.Event()

    def hangs(*_: Any) -> Reading:
        go_on.wait(10)
        return Reading(ClusterStatus((), (), ()), ())

    console.watch._read_status, console.watch._read_at = hangs, 0.0
    await ask(app, {})
    console.ledger.own("config", "m", "Something changed.")
    passed = 4 * INTERVAL_S
    monkeypatch.setattr(console, "_clock", lambda: state["time"] + passed)
    await asyncio.wait_for(console.tick(), 5)
    deltas = await stream.all_of_the_next()
    assert [delta["traffic"]["slot"] - state["traffic"]["slot"] for delta in deltas] == [0, 1, 2, 3, 4]
    assert [event["text"] for event in deltas[-1]["events"]] == ["Something changed."]
    assert [row["model"] for row in deltas[-1]["requests"]] == ["m"]
    assert sum(delta["traffic"]["models"]["m"]["requests"] for delta in deltas) == 1
    passed += 1000 * INTERVAL_S
    await asyncio.wait_for(console.tick(), 5)
    assert len(await stream.all_of_the_next()) == 120
    go_on.set()
    await console.close()
    await stream.leave()


async def test_making_what_pages_are_told_does_not_hold_up_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in another thread, and what takes long is made less often."""
    console, app = console_app(open_gate())
    stream = Stream(app)
    await stream.next()
    may_go_on = threading.Event()

    def slow(*arguments: Any) -> Any:
        assert may_go_on.wait(10)
        return replace(deltas_for(*arguments), cpu_s=0.05)

    monkeypatch.setattr(console_module, "deltas_for", slow)
    tick = asyncio.create_task(console.tick())
    await asyncio.sleep(0.1)
    assert not tick.done()
    may_go_on.set()
    await tick
    assert console._pause_s == pytest.approx(2.5)
    await stream.leave()
