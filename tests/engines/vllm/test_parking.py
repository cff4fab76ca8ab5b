"""How vLLM's engine parks, with a small client in the place of vLLM's own. `tests/cluster/test_vllm_contract.py` asks a
real engine, and `tests/gpu` one on a GPU."""

import logging
from typing import Any

import pytest

from serve_app.engines.vllm import parking, vllm_internals
from serve_app.engines.vllm.engine import VllmEngine, engine_arguments, environment
from serve_app.engines.vllm.parking import VllmParking, can_park
from serve_app.errors import EngineError
from tests.builders import model_config

WEIGHTS = 300
SWAPS = {"policy": "swap", "pool_memory": {0: "9GiB"}}


class Client:
    """An engine of two ranks as vLLM's client shows it. It has pinned buffers of its own, and a copy while it
    sleeps. Like torch, a rank keeps pinned memory after its use until it is told to free it."""

    def __init__(self, room: int = 1000, room_on_gpu: int = 1000):
        self.is_awake, self.room, self.room_on_gpu = True, room, room_on_gpu
        self.buffers, self.copy, self.cached = 7, 0, 0
        self.comes_back_whole = True

    async def sleep(self, level: int, mode: str) -> None:
        """As `AsyncLLM.sleep`."""
        assert (level, mode) == (1, "keep")
        if self.room < 2 * WEIGHTS:
            raise RuntimeError("CUDA error: out of memory")
        self.copy, self.is_awake = WEIGHTS, False

    async def wake_up(self) -> bool:
        """As `AsyncLLM.wake_up`."""
        if self.room_on_gpu < WEIGHTS:
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp")
        self.copy, self.cached, self.is_awake = 0, WEIGHTS, self.comes_back_whole
        return self.is_awake

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """As `AsyncLLM.collective_rpc`, for the methods of `WorkerExtension`."""
        if method == "serve_app_free_host_cache":
            self.cached = 0
            return [None, None]
        assert method == "serve_app_host_bytes"
        return [self.buffers + self.copy + self.cached] * 2


def parked_by(client: Client) -> tuple[VllmParking, list[str]]:
    """How it parks, and a list that is empty while the engine can be used."""
    lost: list[str] = []
    return VllmParking(client, lambda: lost.append("lost")), lost


async def test_it_sleeps_and_wakes_again_and_again() -> None:
    """The copy of both ranks is there only in between, without the buffers that the ranks have anyway."""
    client = Client()
    engine, lost = parked_by(client)
    for _ in range(3):
        assert engine.copy_bytes() == 0
        await engine.park()
        assert not client.is_awake
        assert engine.copy_bytes() == 2 * WEIGHTS
        await engine.wake()
        assert client.is_awake
        assert client.cached == 0
    await engine.forget_copy()
    assert engine.copy_bytes() == 0
    assert lost == []


async def test_what_is_asked_in_the_wrong_state_changes_nothing() -> None:
    """The engine goes on as it was."""
    client = Client()
    engine, lost = parked_by(client)
    with pytest.raises(EngineError, match="not parked"):
        await engine.wake()
    await engine.park()
    with pytest.raises(EngineError, match="parked already"):
        await engine.park()
    with pytest.raises(EngineError, match="its only weights"):
        await engine.forget_copy()
    await engine.wake()
    assert client.is_awake
    assert lost == []


async def test_an_engine_that_cannot_sleep_is_given_up() -> None:
    """A part of its weights may be gone, so nobody may ask it."""
    engine, lost = parked_by(Client(room=WEIGHTS))
    with pytest.raises(EngineError, match=r"could not sleep: RuntimeError: CUDA error: out of memory"):
        await engine.park()
    assert lost == ["lost"]


async def test_an_engine_that_cannot_wake_is_given_up() -> None:
    """Where the GPU has no room any more, or only a part comes back."""
    full, half = Client(room_on_gpu=0), Client()
    half.comes_back_whole = False
    for client, reason in ((full, "out of memory"), (half, "a part of its memory is still away")):
        engine, lost = parked_by(client)
        await engine.park()
        with pytest.raises(EngineError, match=f"could not wake: .*{reason}"):
            await engine.wake()
        assert lost == ["lost"]


async def test_a_lost_engine_is_dead_for_the_health_check() -> None:
    """So that Serve replaces the replica."""
    engine = VllmEngine(model_config(infer_backend="vllm", residency=SWAPS), "m")
    engine._client = Client(room=0)
    engine._sleeps = VllmParking(engine._client, engine._lost)
    sleeps = engine.parking()
    assert sleeps is not None
    with pytest.raises(EngineError, match="could not sleep"):
        await sleeps.park()
    with pytest.raises(EngineError, match="engine has died"):
        await engine.check_health()


@pytest.mark.parametrize(
    ("fields", "has_cumem", "expected", "reason"),
    [
        ({"residency": SWAPS}, True, True, ""),
        ({}, True, False, ""),
        ({"residency": {"policy": "pinned"}}, True, False, ""),
        ({"device": "cpu", "residency": {"policy": "swap", "pool_memory": {"cpu": "9GiB"}}}, True, False, ""),
        ({"residency": SWAPS}, False, False, "no allocator (cumem)"),
        ({"residency": SWAPS, "engine_args": {"enable_sleep_mode": False}}, True, False, "enable_sleep_mode: false"),
        ({"residency": SWAPS, "engine_args": {"enable-sleep-mode": False}}, True, False, "enable_sleep_mode: false"),
        ({"residency": SWAPS, "engine_args": {"enable_sleep_mode": True}}, True, True, ""),
    ],
)
def test_only_a_model_that_swaps_on_gpus_can_sleep(
    fields: dict[str, Any], has_cumem: bool, expected: bool, reason: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The argument is set for no other one. Where a model on GPUs cannot, the log says why."""
    monkeypatch.setattr(vllm_internals, "can_sleep", lambda: has_cumem)
    monkeypatch.setattr(parking.logger, "propagate", True)
    config = model_config(infer_backend="vllm", **fields)
    with caplog.at_level(logging.WARNING, logger=parking.logger.name):
        assert can_park(config) is expected
    assert reason in caplog.text
    assert bool(caplog.text) == bool(reason)
    named = bool(config.engine_args)
    assert named or engine_arguments(config, "m", can_park(config)).get("enable-sleep-mode", False) is expected


def test_the_copy_takes_no_more_than_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch rounds pinned memory up to a power of two unless it is told otherwise. A user's own setting is kept."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    config = model_config(infer_backend="vllm", residency=SWAPS)
    assert environment(config)["PYTORCH_ALLOC_CONF"] == "pinned_max_cached_size_mb:16"
    assert "PYTORCH_ALLOC_CONF" not in environment(model_config(infer_backend="vllm"))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert "PYTORCH_ALLOC_CONF" not in environment(config)
