"""What open pages are told, and when."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from serve_app.console import console as console_module
from serve_app.console.moment import state_of
from serve_app.status.cluster_status import ClusterStatus, ModelView, ReplicaView
from serve_app.status.reader import Reading
from tests.console.served import BEGINS, Stream, ask, console_app, status_of
from tests.fakes import AUTH, OUTSIDE, Models, ModelsFake, make_gate, open_gate, says


async def test_a_stream_tells_the_state_and_then_what_is_new() -> None:
    """A request is told once it has begun or changed, and an event exactly once."""
    models = Models(m=says(b"{}"), other=says(b"{}"))
    console, app = console_app(open_gate(), upstream=models, directory=models)
    stream = Stream(app)
    name, state = await stream.next()
    assert (name, state["requests"], state["router"]) == ("state", [], "abc")
    await ask(app, {})
    console.ledger.own("config", "m", "Something changed.")
    await console.tick()
    name, delta = await stream.next()
    assert name == "delta"
    assert [(row["model"], row["outcome"]) for row in delta["requests"]] == [("m", "ok")]
    assert [event["text"] for event in delta["events"]] == ["Something changed."]
    assert delta["traffic"]["models"]["m"]["requests"] == 1
    second = Stream(app)
    assert [event["text"] for event in (await second.next())[1]["events"]] == ["Something changed."]
    await console.tick()
    assert not {"nodes", "models", "events", "requests"} & set((await stream.next())[1])
    assert "events" not in (await second.next())[1]
    await stream.leave()
    await second.leave()
    assert len(console._feed) == 0


async def test_a_page_that_opens_between_two_ticks_is_told_each_event_once() -> None:
    """In its state or in the next delta."""
    console, app = console_app(open_gate())
    first = Stream(app)
    await first.next()
    console.ledger.own("config", "m", "Something changed.")
    late = Stream(app)
    told = [event["text"] for event in (await late.next())[1]["events"]]
    await console.tick()
    told += [event["text"] for event in (await late.next())[1].get("events", ())]
    assert told == ["Something changed."]
    for stream in (first, late):
        await stream.leave()


async def test_a_page_is_told_of_earlier_intervals_that_have_changed() -> None:
    """An answer that comes whole has made its tokens in all of its time. They are told once."""
    models = Models(m=says(b'{"usage":{"prompt_tokens":1,"completion_tokens":30,"total_tokens":31}}'))
    console, app = console_app(open_gate(), upstream=models, directory=models)
    now = BEGINS
    console._clock = console.ledger._clock = console.ledger.requests._clock = lambda: now
    stream = Stream(app)
    (_, state) = await stream.next()
    exchanges: list[Any] = []
    ended = console.ended
    console.ended = exchanges.append  # type: ignore[method-assign]
    await ask(app, {})
    now += 12.0
    await console.tick()
    await stream.next()
    now += 0.5
    ended(*exchanges)
    await console.tick()
    told = [delta["traffic"] for delta in await stream.all_of_the_next()]
    slot = state["traffic"]["slot"]
    assert [(each["slot"], each["models"]["m"]["tokens_per_s"]) for each in told] == [
        (slot, 2.4), (slot + 1, 2.4), (slot + 2, 2.4),
    ]  # fmt: skip
    await console.tick()
    assert len(await stream.all_of_the_next()) == 1
    await stream.leave()


async def test_a_late_page_ends_with_the_same_models_as_an_early_one() -> None:
    """Also if a model is again what the early page was told, after it was something else when the late page opened."""
    directory = ModelsFake(m="ready", other="ready")
    console, app = console_app(open_gate(), directory=directory)
    first = Stream(app)
    pages = [(first, {model["name"]: model["state"] for model in (await first.next())[1]["models"]})]
    await console.tick()
    await first.next()
    directory.states["m"] = "loading"
    await console.ledger.tick()
    late = Stream(app)
    pages.append((late, {model["name"]: model["state"] for model in (await late.next())[1]["models"]}))
    for states in ({"m": "ready", "other": "ready"}, {"m": "failed", "new": "ready"}, {"m": "failed"}):
        directory.states = states
        await console.tick()
        for stream, models in pages:
            delta = (await stream.next())[1]
            models |= {model["name"]: model["state"] for model in delta.get("models", ())}
            for name in delta.get("gone_models", ()):
                del models[name]
            assert models == states
    for stream, _ in pages:
        await stream.leave()


async def test_a_page_that_opens_after_nobody_looked_is_told_what_is_there_now() -> None:
    """And not what the last page before it was told."""
    directory = ModelsFake(m="ready", other="ready")
    console, app = console_app(open_gate(), directory=directory)
    stream = Stream(app)
    await stream.next()
    await stream.leave()
    directory.states = {"m": "loading"}
    await console._idle_tick()
    stream = Stream(app)
    assert [(model["name"], model["state"]) for model in (await stream.next())[1]["models"]] == [("m", "loading")]
    await stream.leave()


async def test_many_who_ask_for_the_state_have_it_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each view, and anew after a moment."""
    console, app = console_app(make_gate(tmp_path)[0])
    made: list[str] = []

    def counted(moment: Any, view: Any, *more: Any) -> Any:
        made.append(view.key.name)
        return state_of(moment, view, *more)

    monkeypatch.setattr(console_module, "state_of", counted)
    now = 1000.0
    monkeypatch.setattr(console, "_clock", lambda: now)
    assert await asyncio.gather(*(status_of(app, AUTH) for _ in range(20)), status_of(app, OUTSIDE)) == [200] * 21
    assert sorted(Counter(made).values()) == [1, 1]
    now += 0.6
    assert await status_of(app, AUTH) == 200
    assert made[0] in made[2:]
    assert len(console._states) == 1


async def test_what_happened_while_nobody_looked_is_not_told_as_if_it_were_new() -> None:
    """The first page would see old losses with the time of its opening."""
    now = 1000.0
    here = [ReplicaView("r0", "RUNNING", "a", 1, None), ReplicaView("r1", "RUNNING", "a", 2, None)]
    readings: list[list[ReplicaView]] = [here, here[:1], here, here[:1]]

    def reads(*_: Any) -> Reading:
        model = ModelView("m", "ready", 2, 2, readings.pop(0), "", "")
        return Reading(ClusterStatus((), (), (model,)), ())

    console, _ = console_app(open_gate())
    console.watch._clock = lambda: now
    console.watch._read_status = reads
    told = []
    for passed in (0.0, 3600.0, 1.0, 1.0):
        now += passed
        await console.watch.read()
        told.append([event.kind for event in console.ledger.events.since()])
    assert told == [[], [], ["started"], ["started", "lost"]]


async def test_when_a_model_is_ready_is_not_told_once_the_estimate_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients are told to wait the least time then, which is no estimate."""
    directory = ModelsFake(m="loading")
    console, _ = console_app(open_gate(), directory=directory)
    await console.ledger.tick()
    await console.watch.read()
    for left_s, told in ((12.34, 12.3), (None, None)):
        monkeypatch.setattr(directory, "time_left_s", lambda _, left_s=left_s: left_s)
        snapshot = console.watch.now()
        assert snapshot is not None
        assert snapshot.ready_in_s["m"] == told
