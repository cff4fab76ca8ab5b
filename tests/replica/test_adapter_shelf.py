"""Adapters of a replica come, go and are replaced while it runs, each on its own."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.adapters.records import Adapters, AdapterState
from serve_app.config import ModelConfig
from serve_app.engines.adapters import AdapterCheck
from serve_app.errors import ModelNotFound, ModelUnavailable
from serve_app.replica import adapter_shelf, watched_folder
from serve_app.replica.adapter_shelf import AdapterShelf
from serve_app.wire.asked_model import Asked
from tests.lora_folders import adapter, base
from tests.replica.fake_engine import AdapterEngine

pytestmark = pytest.mark.usefixtures("_fast")


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become hundredths."""
    for module, name, seconds in (
        (adapter_shelf, "LOOK_EVERY_S", 0.02), (adapter_shelf, "RETRY_S", 0.05), (adapter_shelf, "TELL_AGAIN_S", 0.01),
        (watched_folder, "SETTLED_S", 0.1), (watched_folder, "INCOMPLETE_S", 0.4), (watched_folder, "AWAY_S", 0.1),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, seconds)


class Replica:
    """A shelf before a small engine, and what it has told."""

    def __init__(self, folder: Path, taken: dict[str, str] | None = None, **config: Any):
        self.engine = AdapterEngine()
        given = {"model": str(base(folder / "base")), "infer_backend": "pt", "max_loras": 2, "max_lora_rank": 8}
        self.config = ModelConfig.from_args(given | config)
        self.told: list[Adapters] = []
        self.found: list[Adapters] = []
        self.taken = taken or {}
        self.shelf = AdapterShelf(
            "qwen",
            AdapterCheck(self.config),
            self.engine,
            self.told.append,
            lambda _: self.taken,  # type: ignore[arg-type]
            self.found.append,
        )

    def told_of(self, name: str) -> str:
        """The message of an adapter."""
        return self.shelf.states()[name].message

    async def want(self, **adapters: Path | str) -> None:
        """Asks for these, and waits for all of them."""
        await self.shelf.want(self.config.with_live({"adapters": {name: str(path) for name, path in adapters.items()}}))
        await self.shelf.settled()


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Replica]:
    """Without adapters."""
    made = Replica(tmp_path)
    await made.shelf.start(made.config)
    yield made
    await made.shelf.stop()


async def until(holds: Callable[[], bool]) -> None:
    """Waits a moment for it."""
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_adapters_come_and_go_by_what_is_wanted(replica: Replica, tmp_path: Path) -> None:
    """Those that stay are not touched, and readers are told each state."""
    a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    await replica.want(a=a, b=b)
    assert replica.engine.adapters == {"a": a, "b": b}
    assert replica.shelf.require("qwen:a") == Asked("qwen", "a")
    replica.engine.calls.clear()
    await replica.want(b=b)
    assert replica.engine.calls == ["unload a"]
    assert replica.engine.adapters == {"b": b}
    with pytest.raises(ModelNotFound):
        replica.shelf.require("a")
    await until(lambda: bool(replica.told) and replica.told[-1].keys() == {"b"})
    assert replica.told[-1]["b"].state == "ready"


async def test_a_replica_that_starts_has_all_of_them(tmp_path: Path) -> None:
    """Those of its config and those of its folder."""
    adapter(tmp_path / "folder" / "c")
    made = Replica(tmp_path, adapters={"a": str(adapter(tmp_path / "a"))}, adapters_folder=str(tmp_path / "folder"))
    await made.shelf.start(made.config)
    assert made.engine.adapters.keys() == {"a", "c"}
    await until(lambda: bool(made.found) and made.found[-1]["c"].state == "ready")
    assert all(found.keys() == {"c"} for found in made.found)  # It is known from the beginning, and not lost before.
    await made.shelf.stop()


async def test_a_broken_one_fails_alone_and_says_why(replica: Replica, tmp_path: Path) -> None:
    """By its files, by the engine, by a mistake of ours, and because there is none."""
    await replica.want(
        good=adapter(tmp_path / "good"), large=adapter(tmp_path / "large", rank=9), none="/nowhere",
        bad=adapter(tmp_path / "bad"), bug=adapter(tmp_path / "bug"),
    )  # fmt: skip
    states = replica.shelf.states()
    assert {name: state.state for name, state in states.items()} == {
        "good": "ready", "large": "failed", "none": "failed", "bad": "failed", "bug": "failed",
    }  # fmt: skip
    assert "Set max_lora_rank: 16" in states["large"].message
    assert "there is no folder /nowhere" in states["none"].message
    assert states["bad"].message == "the engine does not like it"
    assert "ZeroDivisionError" in states["bug"].message
    with pytest.raises(ModelUnavailable, match="The model 'bad' has failed: the engine does not like it") as caught:
        replica.shelf.require("qwen:bad")
    assert caught.value.retry_after_s == 60.0
    assert replica.shelf.require(None) == Asked("qwen")


async def test_one_that_failed_is_served_when_its_folder_is_right(replica: Replica, tmp_path: Path) -> None:
    """Nobody has to ask again."""
    await replica.want(late=tmp_path / "late")
    assert replica.shelf.states()["late"].state == "failed"
    adapter(tmp_path / "late")
    await until(lambda: replica.shelf.states()["late"] == AdapterState("ready", replica.shelf.states()["late"].message))


async def test_running_requests_of_one_that_goes_end_first_and_new_ones_are_refused(
    replica: Replica, tmp_path: Path
) -> None:
    """One that comes back meanwhile is there at once, and one that goes again waits for all of them."""
    folder = adapter(tmp_path / "a")
    await replica.want(a=folder)
    replica.engine.running["a"] = 1
    await replica.shelf.want(replica.config)
    await until(lambda: replica.shelf.states()["a"].state == "leaving")
    with pytest.raises(ModelNotFound, match="is being removed"):
        replica.shelf.require("a")
    assert replica.engine.adapters == {"a": folder}
    await replica.want(a=folder)
    assert replica.engine.calls == ["load a", "unload a", "load a"]
    assert replica.shelf.require("a") == Asked("qwen", "a")
    await replica.shelf.want(replica.config)
    await until(lambda: replica.engine.calls[-1] == "unload a" and replica.shelf.states()["a"].state == "leaving")
    replica.engine.running["a"] = 0
    await replica.shelf.settled()
    assert replica.shelf.states() == replica.engine.adapters == {}


async def test_a_replaced_one_is_served_until_the_new_one_is_there(replica: Replica, tmp_path: Path) -> None:
    """And stays if the new one is broken, which is told."""
    old, new = adapter(tmp_path / "old"), adapter(tmp_path / "new")
    await replica.want(a=old)
    replica.engine.slow = asyncio.Event()
    await replica.shelf.want(replica.config.with_live({"adapters": {"a": str(new)}}))
    await until(lambda: replica.engine.calls == ["load a", "load a"])
    assert replica.shelf.require("a") == Asked("qwen", "a")
    replica.engine.slow.set()
    await replica.shelf.settled()
    assert replica.engine.adapters == {"a": new}
    await replica.want(a=adapter(tmp_path / "worse", use_dora=True))
    state = replica.shelf.states()["a"]
    assert state.state == "ready"
    assert "its last version is served, because the new one has failed: it is a DoRA" in state.message
    assert replica.engine.adapters == {"a": new}


async def test_the_same_folder_with_other_files_is_loaded_again(replica: Replica, tmp_path: Path) -> None:
    """When it is deployed again."""
    await replica.want(a=adapter(tmp_path / "a", rank=4))
    await replica.want(a=adapter(tmp_path / "a", rank=8))
    assert replica.engine.calls == ["load a", "load a"]


async def test_an_older_config_whose_folder_is_slow_does_not_undo_a_newer_one(
    replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its adapters nor which of them may be pickled."""
    old, new = adapter(tmp_path / "old"), adapter(tmp_path / "new")
    answers, asked = threading.Event(), threading.Event()
    stamp = adapter_shelf.stamp_of

    def slow(folder: Path) -> watched_folder.Stamp:
        if folder == old:
            asked.set()
            assert answers.wait(5)
        return stamp(folder)

    monkeypatch.setattr(adapter_shelf, "stamp_of", slow)
    live = {"adapters": {"a": str(old)}, "allow_pickled_adapters": ["a"]}
    older = asyncio.create_task(replica.shelf.want(replica.config.with_live(live)))
    await until(asked.is_set)
    await replica.want(a=new)
    answers.set()
    await older
    await replica.shelf.settled()
    assert replica.engine.adapters == {"a": new}
    assert replica.engine.calls == ["load a"]
    assert list(replica.shelf._pickled) == []


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A file server with the folders `away…` and a hub, of which only `id/quick` comes at once. The others answer when
    the event is set, and what waits for them is given up soon."""
    answers = threading.Event()

    def slowly(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(source: str | Path, *rest: Any) -> Any:
            if str(source).startswith(str(tmp_path / "away")):
                answers.wait(30)
            return work(source, *rest)

        return run

    for name, seconds in (("MOST_STAMP_S", 0.05), ("MOST_FIND_S", 0.3), ("MOST_DOWNLOAD_S", 0.3)):
        monkeypatch.setattr(adapter_shelf, name, seconds)
    monkeypatch.setattr(adapter_shelf, "stamp_of", slowly(adapter_shelf.stamp_of))
    here = adapter_shelf.folder_here
    monkeypatch.setattr(
        adapter_shelf,
        "folder_here",
        slowly(lambda source, *rest: None if source.startswith("id/") else here(source, *rest)),
    )

    def download(source: str, *_: Any) -> Path:
        if source != "id/quick":
            answers.wait(30)
        return adapter(tmp_path / source.replace("/", "-"))

    monkeypatch.setattr(adapter_shelf, "adapter_folder", download)
    yield answers
    answers.set()


async def test_sources_that_are_away_hold_up_no_other_adapter_and_are_tried_again(
    replica: Replica, tmp_path: Path, away: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither folders of a file server nor downloads. They fail, each with one thread that waits, and are loaded when
    their source answers."""
    monkeypatch.setattr(adapter_shelf, "MOST_FIND_S", 0.6)
    slow = {f"s{number}": tmp_path / f"away{number}" for number in range(4)} | {"d": "id/slow"}
    for number in range(4):
        adapter(tmp_path / f"away{number}")
    quick = adapter(tmp_path / "quick")
    await replica.shelf.want(
        replica.config.with_live({"adapters": {n: str(p) for n, p in {**slow, "q": quick, "e": "id/quick"}.items()}})
    )
    await until(lambda: replica.engine.adapters.keys() == {"q", "e"})
    assert replica.told_of("s0") == ""  # It was not given up before.
    await until(lambda: all(replica.shelf.states()[name].state == "failed" for name in slow))
    assert "away0 could not be read within 0.6 seconds" in replica.told_of("s0")
    assert "id/slow could not be read within 0.3 seconds" in replica.told_of("d")
    await asyncio.sleep(0.3)  # They are tried again some times.
    own = [thread for thread in threading.enumerate() if thread.name == "serve-app-own"]
    assert len(own) <= 2 * len(slow)
    assert all(thread.daemon for thread in own)
    away.set()
    await until(lambda: replica.engine.adapters.keys() == {"q", "e", *slow})


async def test_a_folder_that_does_not_answer_leaves_its_adapter_and_a_config_in_force(
    replica: Replica, tmp_path: Path, away: threading.Event
) -> None:
    """Another adapter is loaded meanwhile, and the one that is loaded is not read again."""
    folder = adapter(tmp_path / "away")
    away.set()
    await replica.want(a=folder)
    away.clear()
    await replica.want(a=folder, b=adapter(tmp_path / "b"))
    assert replica.engine.calls == ["load a", "load b"]
    assert replica.shelf.require("a") == Asked("qwen", "a")


async def test_the_state_of_an_adapter_of_the_hub_has_its_commit(replica: Replica, tmp_path: Path) -> None:
    """By which replicas that have found different ones are told apart."""
    folder = adapter(tmp_path / "models--org--lora" / "snapshots" / ("c" * 40))
    await replica.want(a=folder)
    assert replica.shelf.states()["a"].state == "ready"
    assert replica.told_of("a").startswith("its commit is " + "c" * 40)


async def test_names_that_others_have_are_refused(tmp_path: Path) -> None:
    """With who has it."""
    made = Replica(tmp_path, {"sql": "adapters.sql of alpha", "qwen:law": "the model qwen:law"})
    await made.shelf.start(made.config)
    folder = adapter(tmp_path / "a")
    await made.want(sql=folder, law=folder, qwen=folder, fine=folder)
    states = made.shelf.states()
    assert states["sql"].message == "the name 'sql' is also that of adapters.sql of alpha. Rename one of them."
    assert "the model qwen:law" in states["law"].message
    assert "its name 'qwen' is that of its model" in states["qwen"].message
    assert made.engine.adapters.keys() == {"fine"}
    await made.shelf.stop()


async def test_a_watched_folder_is_followed(tmp_path: Path) -> None:
    """A half-written adapter is not loaded before it settles, and one that is moved away goes."""
    folder = tmp_path / "folder"
    folder.mkdir()
    made = Replica(tmp_path, adapters_folder=str(folder))
    await made.shelf.start(made.config)
    whole = adapter(tmp_path / "whole", rank=8)
    weights = (whole / "adapter_model.safetensors").read_bytes()
    half = folder / "sql"
    half.mkdir()
    shutil.copy(whole / "adapter_config.json", half)
    for end in range(100, len(weights), 300):  # It grows while it is looked at.
        (half / "adapter_model.safetensors").write_bytes(weights[:end])
        await asyncio.sleep(0.03)
        assert made.shelf.names() == set()
    (half / "adapter_model.safetensors").write_bytes(weights)
    await until(lambda: made.shelf.states().get("sql", AdapterState("loading")).state == "ready")
    assert made.engine.calls == ["load sql"]
    half.rename(tmp_path / "gone")
    await until(lambda: made.engine.adapters == {})
    await made.shelf.stop()


async def test_what_the_folder_has_is_told_for_the_time_without_replicas(tmp_path: Path) -> None:
    """Those that the config names are left out. A folder that could not be read yet says nothing, and an empty one
    says that there are none."""
    folder = tmp_path / "folder"
    own = adapter(tmp_path / "own")
    made = Replica(tmp_path, adapters={"a": str(own)}, adapters_folder=str(folder))
    await made.shelf.start(made.config)
    await until(lambda: bool(made.told))
    assert made.found == []
    folder.mkdir()
    adapter(folder / "a")
    adapter(folder / "b")
    await until(
        lambda: bool(made.found) and made.found[-1] == {"b": AdapterState("ready", made.found[-1]["b"].message)}
    )
    shutil.rmtree(folder / "b")
    await until(lambda: made.found[-1] == {})
    await made.shelf.stop()
    again = Replica(tmp_path, adapters_folder=str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    await again.shelf.start(again.config)
    await until(lambda: again.found == [{}])
    await again.shelf.stop()


async def test_a_newer_version_and_a_removal_do_not_wait_for_requests_of_a_replaced_one(
    replica: Replica, tmp_path: Path
) -> None:
    """The engine says that a version is there, and what ran before goes on."""
    versions = [adapter(tmp_path / str(number)) for number in range(3)]
    replica.engine.running["a"] = 1
    for folder in versions:
        await replica.want(a=folder)
        assert replica.engine.adapters == {"a": folder}


async def test_an_adapter_that_the_engine_has_lost_is_not_ready_and_is_tried_again(
    replica: Replica, tmp_path: Path
) -> None:
    """At once, since its files may be others by now, and then every while. If the engine has an older version, that one
    is served and told."""
    folder = adapter(tmp_path / "a")
    await replica.want(a=folder)
    replica.engine.lost("nobody", "it is gone", False)
    replica.engine.slow = asyncio.Event()
    replica.engine.lost("a", "it is gone", False)
    assert replica.shelf.states()["a"] == AdapterState("failed", "it is gone")
    with pytest.raises(ModelUnavailable, match="has failed: it is gone"):
        replica.shelf.require("a")
    replica.engine.slow.set()
    await replica.shelf.settled()
    assert replica.shelf.states()["a"].state == "ready"
    replica.engine.slow = asyncio.Event()
    replica.engine.lost("a", "it is gone", True)
    assert replica.shelf.states()["a"].state == "ready"
    assert "its last version is served, because the new one has failed: it is gone" in replica.told_of("a")
    replica.engine.slow.set()
    shutil.rmtree(folder)
    replica.engine.lost("a", "it is gone", False)
    await until(lambda: "there is no folder" in replica.told_of("a"))
    adapter(folder)
    await until(lambda: replica.shelf.states()["a"].state == "ready")


async def test_an_incomplete_folder_is_told_after_a_while_and_a_name_of_the_config_wins(tmp_path: Path) -> None:
    """A folder whose copy has stopped is no secret."""
    folder = tmp_path / "folder"
    (folder / "empty").mkdir(parents=True)
    adapter(folder / "a")
    (folder / "two words").mkdir()
    own = adapter(tmp_path / "own")
    made = Replica(tmp_path, adapters={"a": str(own)}, adapters_folder=str(folder))
    await made.shelf.start(made.config)
    assert made.engine.adapters == {"a": own}
    await until(lambda: "empty" in made.shelf.states() and made.shelf.states()["empty"].state == "failed")
    assert "has no adapter_config.json" in made.shelf.states()["empty"].message
    assert made.shelf.names() == {"a", "empty"}
    await made.shelf.stop()


async def test_a_folder_that_cannot_be_read_for_a_while_takes_nothing_away(tmp_path: Path) -> None:
    """Such as a file server that is away."""
    folder = tmp_path / "folder"
    adapter(folder / "a")
    made = Replica(tmp_path, adapters_folder=str(folder))
    await made.shelf.start(made.config)
    folder.rename(tmp_path / "away")
    await asyncio.sleep(0.3)
    assert made.shelf.states()["a"].state == "ready"
    await made.shelf.stop()


@pytest.mark.slow
async def test_a_pickled_adapter_that_is_allowed_reaches_the_engine_as_safetensors(tmp_path: Path) -> None:
    """Only tensors are taken from it, and it is checked like any other."""
    import torch
    from safetensors import safe_open

    folder = adapter(tmp_path / "p", rank=4)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    torch.save(tensors, folder / "adapter_model.bin")
    evil = adapter(tmp_path / "evil")
    torch.save({"x": Evil()}, evil / "adapter_model.bin")
    for each in (folder, evil):
        (each / "adapter_model.safetensors").unlink()
    made = Replica(tmp_path, allow_pickled_adapters=["p", "evil"])
    await made.shelf.start(made.config)
    await made.want(p=folder, q=folder, evil=evil)
    states = made.shelf.states()
    assert (states["p"].state, states["q"].state, states["evil"].state) == ("ready", "failed", "failed")
    assert "name it in allow_pickled_adapters" in states["q"].message
    assert "holds more than tensors" in states["evil"].message
    made_folder = made.engine.adapters["p"]
    assert (made_folder / "adapter_model.safetensors").exists()
    assert made_folder.parent == made.shelf._copies.folder  # Which is swept if this process is killed.
    await made.want()
    assert not made_folder.exists()
    await made.shelf.stop()


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('it ran')",))


async def test_what_is_told_is_told_again_until_it_arrives(tmp_path: Path) -> None:
    """Ray's head may be away for a while."""
    made = Replica(tmp_path)
    tries = 0

    def tell(adapters: Adapters) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise RuntimeError("no answer")
        made.told.append(adapters)

    made.shelf._tell = tell
    await made.shelf.start(made.config)
    await made.want(a=adapter(tmp_path / "a"))
    await until(lambda: bool(made.told) and made.told[-1] == {"a": made.shelf.states()["a"]})
    await made.shelf.stop()
