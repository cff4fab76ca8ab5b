"""The engines on a GPU. `make test` skips this where there is none; run it with `.venv/bin/pytest tests/gpu`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import torch

from serve_app.engines.pt.engine import PtEngine
from serve_app.engines.vllm.engine import VllmEngine
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.facts.gpus import local_gpus, visible_gpus
from serve_app.facts.inventory import Device
from serve_app.planning.pool import residue
from serve_app.replica.replica_plan import plan_alone, plan_replica
from serve_app.replica.whole_body import WholeBody
from tests.builders import model_config
from tests.demo_answers import ANSWERS, QUESTIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@asynccontextmanager
async def serving(engine: PtEngine | VllmEngine) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an engine that runs. What an engine loaded can be looked at only before it stops."""
    transport = httpx.ASGITransport(app=await engine.start())  # type: ignore[arg-type]
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://gpu", timeout=60) as session:
            yield session
    finally:
        await engine.stop()


async def answers(session: httpx.AsyncClient) -> list[str]:
    """The greedy answers to the demo questions."""
    texts = []
    for question in QUESTIONS:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
        reply = (await session.post("/v1/chat/completions", json=body)).json()
        texts.append(reply["choices"][0]["message"]["content"])
    return texts


def engine_within(gpus: int, **beyond: str) -> PtEngine:
    """The demo on so many cards, of which the first has room for half of the weights and the second for all. `beyond`
    are limits of other devices."""
    seen, fields = visible_gpus(local_gpus()), {"model": model_path(DEMO_MODEL), "dtype": "float32"}
    whole = plan_replica(model_config(**fields), seen[:1])
    assert whole is not None
    (rank,), request = whole.ranks, whole.kv_bytes_per_request
    beside = rank.context.bytes + rank.activation.bytes
    rooms = [beside + rank.weights.bytes // 2 + request, beside + 3 * (rank.weights.bytes + request)]
    limits = {index: f"{-(-rooms[index] // 1000)}KB" for index in range(gpus)}
    config = model_config(**fields, max_memory=limits | beyond)
    return PtEngine(config, "demo", plan_replica(config, seen[:gpus]))


async def test_pt_answers_on_a_gpu() -> None:
    """The same words as on the CPU."""
    engine = PtEngine(model_config(model=model_path(DEMO_MODEL), dtype="float32"), "demo")
    async with serving(engine) as session:
        assert await answers(session) == list(ANSWERS.values())
        assert engine.generator.loaded.input_device.type == "cuda"


async def test_pt_spills_to_the_cpu_only_when_told() -> None:
    """With a limit below the model, the rest runs on the CPU, and the answers stay."""
    engine = engine_within(1, cpu="1GB")
    async with serving(engine) as session:
        assert await answers(session) == list(ANSWERS.values())
        assert set(engine.generator.loaded.device_map.values()) == {0, "cpu"}


async def test_pt_spreads_over_two_unequal_limits() -> None:
    """Layers on both GPUs, and the cache beside its layers."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    engine = engine_within(2)
    async with serving(engine) as session:
        assert await answers(session) == list(ANSWERS.values())
        assert set(engine.generator.loaded.device_map.values()) == {0, 1}


@pytest.mark.parametrize("quantization", [None, "bnb-nf4", "bnb-int8"])
async def test_pt_parks_on_a_gpu(quantization: str | None) -> None:
    """Between the tokens of eight texts, whose words stay. Parked, torch holds neither weights nor cache, but for the
    workspaces of cuBLAS, which come from torch's memory too."""
    fields = {"quantization": quantization} if quantization else {}
    engine = PtEngine(model_config(model=model_path(DEMO_MODEL), dtype="float32", **fields), "demo")
    async with serving(engine) as session:
        body = {"prompt": [5] * 300, "max_tokens": 150, "temperature": 0, "ignore_eos": True}

        async def texts() -> list[str]:
            replies = await asyncio.gather(*(session.post("/v1/completions", json=body) for _ in range(8)))
            return [reply.json()["choices"][0]["text"] for reply in replies]

        expected, asked = await texts(), asyncio.create_task(texts())
        parks = 0
        while not asked.done():
            (rank,) = await engine.memory()  # Before what is held, which may grow meanwhile.
            held = torch.cuda.memory_allocated()
            await engine.park()
            assert held - torch.cuda.memory_allocated() >= 0.95 * (rank.weights + rank.kv_cache)
            parks += engine.generator.in_flight > 0
            await engine.wake()
            await asyncio.sleep(0.05)
        assert await asked == expected
    assert parks


async def test_vllm_sleeps_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights and its cache are free while it sleeps, its texts stay, and it keeps no more of the card than the
    plan says. Nothing else may run on the card."""
    config = model_config(
        model=model_path(DEMO_MODEL), infer_backend="vllm", dtype="float32", kv_cache_memory_bytes="2GiB",
        residency={"policy": "swap"},
    )  # fmt: skip
    (gpu, *_) = local_gpus()
    device = Device("here", 0, gpu.name, gpu.total_bytes, gpu.total_bytes)
    planned = plan_alone(config, [device], None)
    (kept,) = residue(planned).values()
    torch.cuda.mem_get_info()  # This process has its own context from here on.
    before_start = _used()
    engine = VllmEngine(config, "demo")
    app = WholeBody(await engine.start(), config)
    parking = engine.parking()
    assert parking is not None
    body = {"prompt": [5] * 300, "max_tokens": 150, "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gpu", timeout=60) as session:

        async def texts() -> list[str]:
            replies = await asyncio.gather(*(session.post("/v1/completions", json=body) for _ in range(8)))
            return [reply.json()["choices"][0]["text"] for reply in replies]

        expected = await texts()
        (rank,) = await engine.memory()
        for _ in range(3):
            asked = asyncio.create_task(texts())
            await asyncio.sleep(0.1)
            awake = _used()
            await parking.park()
            asleep = _used()
            assert awake - asleep >= 0.95 * (rank.weights + rank.kv_cache)
            assert rank.weights <= parking.copy_bytes() <= rank.weights + 64 * 2**20
            with capsys.disabled():
                print(f"asleep it keeps {(asleep - before_start) / 2**20:.0f} MiB, planned {kept.bytes / 2**20:.0f}")
            assert asleep - before_start <= kept.bytes
            await parking.wake()
            assert parking.copy_bytes() == 0
            assert await asked == expected
            assert await texts() == expected
    await engine.stop()


def _used() -> int:
    """Bytes of the first GPU that all processes have together."""
    free, total = torch.cuda.mem_get_info(0)
    return total - free


async def test_vllm_answers_on_a_gpu() -> None:
    """In float32, so that the words are the trained ones."""
    config = model_config(
        model=model_path(DEMO_MODEL),
        infer_backend="vllm",
        dtype="float32",
        engine_args={"gpu_memory_utilization": 0.3, "enforce_eager": True},
    )
    async with serving(VllmEngine(config, "demo")) as session:
        assert await answers(session) == list(ANSWERS.values())


def test_nvml_sees_what_torch_sees() -> None:
    """The same number of GPUs with the same memory, within the driver's reserve."""
    gpus = local_gpus()
    assert len(gpus) >= torch.cuda.device_count()
    assert gpus[0].total_bytes == pytest.approx(torch.cuda.mem_get_info(0)[1], rel=0.03)
