"""How adapters come and go in vLLM, with a small engine in the place of vLLM's own. `tests/cluster/vllm_adapters.py`
asks a real one."""

import asyncio
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from starlette.types import Message, Receive, Scope, Send

from serve_app.engines.vllm import adapters, vllm_internals
from serve_app.engines.vllm.adapters import VllmAdapters
from serve_app.engines.vllm.engine import NEVER_SET, VllmEngine, engine_arguments
from serve_app.engines.vllm.parking import VllmParking
from serve_app.errors import AdapterError
from serve_app.model_fields import ADAPTER_NAME
from serve_app.wire.arrival import with_body
from serve_app.wire.body import RequestBody
from tests.builders import model_config


class Engine:
    """An engine and its server as far as adapters concern them. It reads an adapter's files again where it has been
    told of one that it does not have, and dies if they are gone, as vLLM does."""

    def __init__(self) -> None:
        self.loaded: dict[int, bytes] = {}
        self.lora_requests: dict[str, Any] = {}
        self.count = 0
        self.lora_id_counter = SimpleNamespace(inc=self._inc)
        self.output_processor = SimpleNamespace(request_states={})
        self.refuses = False
        self.removed: list[int] = []
        self.is_asleep = False

    def _inc(self, by: int) -> int:
        self.count += by
        return self.count

    async def add_lora(self, adapter: Any) -> None:
        """As `AsyncLLM.add_lora`."""
        assert not self.is_asleep, "its buffers are away"
        self.loaded[adapter.lora_int_id] = (Path(adapter.lora_path) / "adapter_model.safetensors").read_bytes()
        if self.refuses:
            raise ValueError(f"While loading {adapter.lora_path}, something is wrong")

    async def remove_lora(self, number: int) -> None:
        """As `AsyncLLM.remove_lora`."""
        assert not self.is_asleep, "its buffers are away"
        self.loaded.pop(number, None)
        self.removed.append(number)

    async def sleep(self, level: int, mode: str) -> None:
        """As `AsyncLLM.sleep`."""
        self.is_asleep = True

    async def wake_up(self) -> bool:
        """As `AsyncLLM.wake_up`."""
        self.is_asleep = False
        return True

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[int]:
        """As `AsyncLLM.collective_rpc`."""
        return [0]


class Server:
    """An application that looks a request's adapter up after a moment, and answers with what it has loaded then."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.texts: list[bytes | None] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        name = json.loads((await receive())["body"]).get("model")
        await asyncio.sleep(0)
        adapter = self.engine.lora_requests.get(name)
        key = object()
        self.engine.output_processor.request_states[key] = SimpleNamespace(lora_request=adapter)
        await self.go_on.wait()
        self.texts.append(None if adapter is None else self.engine.loaded[adapter.lora_int_id])
        del self.engine.output_processor.request_states[key]


def folder_of(folder: Path, content: bytes) -> Path:
    """An adapter's folder, whose weights are these bytes."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


@pytest.fixture
def engine() -> Engine:
    """A fresh engine."""
    return Engine()


@pytest.fixture
def served(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmAdapters]:
    """Its adapters, whose copies lie in a folder of the test. vLLM's own object for an adapter is a plain one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def add(client: Engine, models: Engine, name: str, folder: Path) -> Any:
        number = models.lora_id_counter.inc(1)
        adapter = SimpleNamespace(lora_name=f"{name}:{number}", lora_int_id=number, lora_path=str(folder))
        await client.add_lora(adapter)
        return adapter

    monkeypatch.setattr(vllm_internals, "add_adapter", add)
    monkeypatch.setattr(adapters, "_require_finite", lambda *_: None)
    found = VllmAdapters(engine, engine)
    yield found
    found.close()


def weights_of(adapter: Any) -> bytes | None:
    """What the copy of an adapter holds, or None if it is gone."""
    file = Path(adapter.lora_path) / "adapter_model.safetensors"
    return file.read_bytes() if file.exists() else None


async def asked(app: Any, name: object) -> None:
    """One request for a model."""
    body = RequestBody(json.dumps({"model": name}).encode())

    async def receive() -> Message:
        return {"type": "http.request", "body": body.content, "more_body": False}

    async def send(_: Message) -> None: ...

    scope, receive = with_body({"type": "http", "headers": []}, receive, body)
    await app(scope, receive, send)


async def retired(served: VllmAdapters) -> None:
    """Waits until versions that were replaced have gone."""
    async with asyncio.timeout(5):
        await asyncio.gather(*served._retiring)


async def test_a_version_is_a_copy_that_nobody_changes(served: VllmAdapters, engine: Engine, tmp_path: Path) -> None:
    """Another version has another name and another path in vLLM, by which its prefix cache is keyed."""
    folder = folder_of(tmp_path / "own", b"one")
    await served.load("sql", folder)
    first = engine.lora_requests["sql"]
    folder_of(folder, b"two")
    assert weights_of(first) == b"one"
    await served.load("sql", folder)
    second = engine.lora_requests["sql"]
    assert first.lora_name != second.lora_name
    assert first.lora_path != second.lora_path
    await retired(served)
    assert list(engine.loaded.values()) == [b"two"]
    assert [weights_of(first), weights_of(second)] == [None, b"two"]
    served.close()
    assert weights_of(second) is None


async def test_requests_that_run_end_with_the_old_version(served: VllmAdapters, engine: Engine, tmp_path: Path) -> None:
    """Also one that has come in and has not been looked up yet. New ones get the new version at once."""
    app = Server(engine)
    counted = served.counted(app)
    await served.load("sql", folder_of(tmp_path / "own", b"one"))
    app.go_on.clear()
    running = asyncio.create_task(asked(counted, "sql"))
    await asyncio.sleep(0.01)
    replacing = asyncio.create_task(served.load("sql", folder_of(tmp_path / "own", b"two")))
    while engine.lora_requests["sql"].lora_int_id == 1:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    later = asyncio.create_task(asked(counted, "sql"))
    async with asyncio.timeout(5):
        await replacing  # Others, such as a removal, do not wait for what runs.
    assert sorted(engine.loaded.values()) == [b"one", b"two"]
    app.go_on.set()
    await asyncio.gather(running, later)
    await retired(served)
    assert app.texts == [b"one", b"two"]
    assert list(engine.loaded.values()) == [b"two"]


async def test_an_old_version_that_stays_is_no_failure_of_the_new_one(
    served: VllmAdapters, engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The new one is served, and only memory is lost."""
    await served.load("sql", folder_of(tmp_path / "own", b"one"))

    async def fails(number: int) -> None:
        raise RuntimeError("a rank does not answer")

    engine.remove_lora = fails  # type: ignore[method-assign]
    await served.load("sql", folder_of(tmp_path / "own", b"two"))
    await retired(served)
    assert engine.lora_requests["sql"].lora_int_id == 2
    assert "An old version of an adapter stays in the engine" in caplog.text
    with pytest.raises(AdapterError, match="vLLM does not let go of it"):
        await served.unload("sql")


async def test_an_adapter_goes_when_its_requests_have_ended(
    served: VllmAdapters, engine: Engine, tmp_path: Path
) -> None:
    """A request whose client has left counts until vLLM has forgotten it too. One for another model does not count."""
    app = Server(engine)
    counted = served.counted(app)
    await served.load("sql", folder_of(tmp_path / "own", b"one"))
    app.go_on.clear()
    others = [asyncio.create_task(asked(counted, name)) for name in ("base", None, 7)]
    running = asyncio.create_task(asked(counted, "sql"))
    await asyncio.sleep(0.01)
    left = SimpleNamespace(lora_request=engine.lora_requests["sql"])
    engine.output_processor.request_states["left"] = left
    leaving = asyncio.create_task(served.unload("sql"))
    await asyncio.sleep(0.01)
    assert "sql" not in engine.lora_requests
    app.go_on.set()
    await asyncio.gather(running, *others)
    await asyncio.sleep(0.1)
    assert not leaving.done()
    assert engine.removed == []
    async with asyncio.timeout(5):  # One that comes and goes meanwhile waits for nobody.
        await served.load("sql", folder_of(tmp_path / "own", b"two"))
        await served.unload("sql")
    assert engine.removed == [2]
    assert not leaving.done()
    del engine.output_processor.request_states["left"]
    await leaving
    assert engine.removed == [2, 1]
    assert app.texts.count(b"one") == 1
    assert served._running == {}
    await served.unload("sql")  # There is none any more.


async def test_a_broken_adapter_leaves_the_old_one(served: VllmAdapters, engine: Engine, tmp_path: Path) -> None:
    """The reason names the adapter and no folder of ours, and nothing is left of it on disk."""
    await served.load("sql", folder_of(tmp_path / "own", b"one"))
    engine.refuses = True
    with pytest.raises(AdapterError, match="vLLM does not take it: While loading sql, something is wrong"):
        await served.load("sql", folder_of(tmp_path / "own", b"two"))
    assert engine.lora_requests["sql"].lora_int_id == 1
    with pytest.raises(AdapterError, match=r"adapter_config\.json cannot be copied: No such file or directory"):
        await served.load("other", tmp_path / "nowhere")
    assert len(list(served._copies.folder.glob("*/"))) == 1


async def test_adapters_wait_for_an_engine_that_is_parked(served: VllmAdapters, engine: Engine, tmp_path: Path) -> None:
    """Their buffers are away then. The last of several versions counts."""
    parking = VllmParking(engine, lambda: None, served)
    await served.load("old", folder_of(tmp_path / "old", b"old"))
    await served.load("sql", folder_of(tmp_path / "sql", b"one"))
    await parking.park()
    await served.load("sql", folder_of(tmp_path / "sql", b"two"))
    await served.load("sql", folder_of(tmp_path / "sql", b"three"))
    await served.load("gone", folder_of(tmp_path / "gone", b"gone"))
    await served.unload("gone")
    await served.unload("old")
    assert sorted(engine.loaded.values()) == [b"old", b"one"]
    await parking.wake()
    async with asyncio.timeout(5):
        await asyncio.gather(*served._retiring)
    assert list(engine.loaded.values()) == [b"three"]
    assert set(engine.lora_requests) == {"sql"}
    assert len(list(served._copies.folder.glob("*/"))) == 1


async def test_a_wake_does_not_wait_for_requests_of_an_old_version(
    served: VllmAdapters, engine: Engine, tmp_path: Path
) -> None:
    """They stood still and go on for as long as they like, while all others wait for the wake."""
    parking = VllmParking(engine, lambda: None, served)
    await served.load("sql", folder_of(tmp_path / "sql", b"one"))
    runs = object()
    engine.output_processor.request_states[runs] = SimpleNamespace(lora_request=engine.lora_requests["sql"])
    await parking.park()
    await served.load("sql", folder_of(tmp_path / "sql", b"two"))
    async with asyncio.timeout(5):
        await parking.wake()
        assert sorted(engine.loaded.values()) == [b"one", b"two"]
        del engine.output_processor.request_states[runs]
        await asyncio.gather(*served._retiring)
    assert list(engine.loaded.values()) == [b"two"]


async def test_what_a_woken_engine_does_not_take_is_lost(served: VllmAdapters, engine: Engine, tmp_path: Path) -> None:
    """Whoever brought it was told that it is there, and is told now that it is not, and whether an older version is."""
    parking, lost = VllmParking(engine, lambda: None, served), list[tuple[str, str, bool]]()
    served.lost = lambda *told: lost.append(told)
    await served.load("sql", folder_of(tmp_path / "sql", b"one"))
    await parking.park()
    await served.load("sql", folder_of(tmp_path / "sql", b"two"))
    await served.load("law", folder_of(tmp_path / "law", b"law"))
    engine.refuses = True
    await parking.wake()
    reasons = {name: f"vLLM does not take it: While loading {name}, something is wrong" for name in ("sql", "law")}
    assert lost == [("sql", reasons["sql"], True), ("law", reasons["law"], False)]
    assert engine.lora_requests.keys() == {"sql"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_numbers_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    """The message names the user's file and the tensor. What is no safetensors file is refused too."""
    file = tmp_path / "adapter_model.safetensors"
    save_file({"some.lora_A.weight": torch.tensor([[1.0, value]])}, file)
    if value == 1.0:
        adapters._require_finite(file, Path("/own/file"))
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(AdapterError, match="/own/file cannot be read"):
            adapters._require_finite(file, Path("/own/file"))
        return
    with pytest.raises(AdapterError, match=r"/own/file: some\.lora_A\.weight has numbers that are not finite"):
        adapters._require_finite(file, Path("/own/file"))


async def test_a_model_without_room_takes_no_adapter() -> None:
    """And has none to remove."""
    engine = VllmEngine(model_config(infer_backend="vllm"), "demo")
    with pytest.raises(AdapterError, match="no room for adapters"):
        await engine.load_adapter("sql", Path("/nowhere"))
    await engine.unload_adapter("sql")


def test_the_room_reaches_vllm() -> None:
    """By default it keeps all adapters that the config names in the host's memory, and one more."""
    plain = engine_arguments(model_config(infer_backend="vllm"), "n")
    assert not [name for name in plain if "lora" in name]
    named = {f"a{number}": "some/adapter" for number in range(9)}
    config = model_config(infer_backend="vllm", adapters=named, max_loras=8, max_lora_rank=16)
    arguments = engine_arguments(config, "n")
    assert {name: value for name, value in arguments.items() if "lora" in name} == {
        "enable-lora": True, "max-loras": 8, "max-lora-rank": 16, "max-cpu-loras": 10,
    }  # fmt: skip
    own = model_config(
        infer_backend="vllm", max_loras=2, max_lora_rank=8, max_cpu_loras=5, lora_target_modules=["q_proj"]
    )
    arguments = engine_arguments(own, "n")
    assert (arguments["max-cpu-loras"], arguments["lora-target-modules"]) == (5, ["q_proj"])


async def test_clients_can_load_nothing_by_vllms_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says, the variables are gone before vLLM is imported."""
    for name in NEVER_SET:
        monkeypatch.setenv(name, "1")

    def stop(*_: object) -> None:
        raise RuntimeError("as far as this")

    monkeypatch.setattr("serve_app.engines.vllm.engine.can_park", stop)
    monkeypatch.setattr("serve_app.engines.vllm.engine.environment", lambda _: {})
    engine = VllmEngine(model_config(infer_backend="vllm"), "demo")
    with pytest.raises(RuntimeError, match="as far as this"):
        await engine.start()
    assert [name for name in NEVER_SET if name in os.environ] == []


def test_clients_see_the_name_that_they_write() -> None:
    """vLLM's own name for a version is none that a client could ask for."""
    assert vllm_internals.public_name("_sql.v1:12") == "sql.v1"
    assert ADAPTER_NAME.fullmatch("_sql") is None
