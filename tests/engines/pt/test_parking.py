"""An engine that parks and wakes gives the answers of one that does not, and its memory is free meanwhile."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from serve_app.engines.pt.core import page_copy
from serve_app.engines.pt.core.step_times import StepTimes
from serve_app.engines.pt.engine import PtEngine
from serve_app.errors import EngineError
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.facts.process_memory import resident_bytes
from tests.builders import model_config
from tests.engines.pt.api.test_structured_output import PERSON, WEATHER, schema_format
from tests.engines.pt.api_client import chat
from tests.engines.pt.test_speculative_engine import SPECULATIVE, WORDINGS, answers, started

# Two engines compute many answers.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

SLOW = pytest.mark.slow

# An engine is parked for so many seconds, and runs for so many in between.
PARKED_S, AWAKE_S = 0.02, 0.1


@asynccontextmanager
async def parking_now_and_then(engine: PtEngine) -> AsyncIterator[list[int]]:
    """Parks and wakes the engine all the time. Yields a list that grows by the sequences in flight at each park."""
    parks: list[int] = []
    done = asyncio.Event()

    async def run() -> None:
        while not done.is_set():
            await engine.park()
            parks.append(engine.generator.in_flight)
            await asyncio.sleep(PARKED_S)
            await engine.check_health()
            await engine.wake()
            await asyncio.sleep(AWAKE_S)

    task = asyncio.create_task(run())
    try:
        yield parks
    finally:
        done.set()
        await task


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain() -> AsyncIterator[httpx.AsyncClient]:
    """The client of an engine that never parks."""
    async with started() as (_, client):
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def parking() -> AsyncIterator[tuple[PtEngine, httpx.AsyncClient]]:
    """An engine that parks, and its client."""
    async with started() as (engine, client):
        yield engine, client


Parking = tuple[PtEngine, httpx.AsyncClient]


@pytest.mark.parametrize("at_once", [pytest.param(1, marks=SLOW), pytest.param(8, marks=SLOW), 32])
async def test_every_question_has_the_same_answer(plain: httpx.AsyncClient, parking: Parking, at_once: int) -> None:
    """In the middle of prompts and texts."""
    engine, client = parking
    bodies = [chat(wording) for wording in WORDINGS[: 20 if at_once == 1 else None]]
    async with parking_now_and_then(engine) as parks:
        got = await answers(client, bodies, at_once)
    assert got == await answers(plain, bodies, at_once)
    assert max(parks) >= min(at_once, 4)


@SLOW
async def test_whatever_is_asked_for_has_the_same_answer(plain: httpx.AsyncClient, parking: Parking) -> None:
    """Formats, tools, stop strings, log probabilities, penalties, choices and seeds, and prompts of many chunks."""
    engine, client = parking
    fields: list[dict[str, Any]] = [
        {"response_format": schema_format(PERSON)},
        {"response_format": schema_format(PERSON), "temperature": 1, "seed": 3},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"stop": ["demo", "what"]},
        {"stop": ["e"], "stream": True, "stream_options": {"include_usage": True}},
        {"logprobs": True, "top_logprobs": 3},
        {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
        {"n": 3, "temperature": 0.8, "seed": 7},
        {"max_tokens": 90, "ignore_eos": True},
    ]
    bodies = [chat(text, **extra) for extra in fields for text in ("Hello", "repeat " * 60)]
    async with parking_now_and_then(engine) as parks:
        got = await answers(client, bodies, 18)
    for body, one, other in zip(bodies, got, await answers(plain, bodies, 18), strict=True):
        assert is_same(one, other), body
    assert max(parks) > 1


def is_same(one: Any, other: Any) -> bool:
    """Whether two answers are the same. The rounding of log probabilities depends on the rows of a batch."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 2e-3
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


@pytest.mark.parametrize(
    "fields",
    [
        {"speculative": SPECULATIVE},
        {"quantization": "bnb-int8"},
        {"max_memory": {"cpu": "2MB", "disk": "1GB"}},
        {"kv_cache_dtype": "int8"},
    ],
    ids=["speculative", "quantised", "disk", "cache in 8 bits"],
)
async def test_other_engines_park_too(plain: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    """One that drafts whenever it can gives the plain answers. One that is quantised gives its own, and so does one
    whose cache is in 8 bits, and one of which a part is on disk, where it stays."""
    bodies = [chat(wording) for wording in WORDINGS[:24]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepTimes, "ratio", lambda *_: 1.0)
        async with started(**fields) as (engine, client):
            expected = await answers(plain if "speculative" in fields else client, bodies, 8)
            async with parking_now_and_then(engine) as parks:
                assert await answers(client, bodies, 8) == expected
            assert parks


async def test_its_reports_tell_the_truth(parking: Parking) -> None:
    """Parked, it holds no weights. Awake, it holds what it held before, and its copy."""
    engine, _ = parking
    before = await engine.memory()
    assert engine.parking() is engine
    await engine.park()
    with pytest.raises(EngineError, match="only one"):
        await engine.forget_copy()
    with pytest.raises(EngineError, match="because it is parked"):
        await engine.park()
    parked = await engine.memory()
    assert [(rank.weights, rank.kv_cache) for rank in parked] == [(0, 0)]
    assert engine.copy_bytes() > 0.5 * before[0].weights
    await engine.wake()
    with pytest.raises(EngineError, match="because it is awake"):
        await engine.wake()
    after = await engine.memory()
    assert after[0].weights == before[0].weights
    await engine.forget_copy()
    assert engine.copy_bytes() == 0


# Keys and values of the larger model in float32: six layers with four heads of 64.
BYTES_PER_TOKEN = 2 * 6 * 4 * 64 * 4


@pytest.fixture
def larger_model(tmp_path: Path) -> str:
    """A model of 110 MB with random weights and the demo's tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8000, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_path(DEMO_MODEL)).save_pretrained(tmp_path)
    return str(tmp_path)


@SLOW
async def test_parking_frees_weights_and_cache(larger_model: str) -> None:
    """95 % of both by the kernel's count, with eight texts of a thousand tokens in the middle, which go on."""
    engine = PtEngine(model_config(model=larger_model, device="cpu", dtype="float32"), "larger")
    transport = httpx.ASGITransport(app=await engine.start())
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=120)
        )
        stack.push_async_callback(engine.stop)
        bodies = [
            {"model": "larger", "prompt": [7 + number] * 900, "max_tokens": 100, "temperature": 0, "ignore_eos": True}
            for number in range(8)
        ]

        async def texts() -> list[str]:
            replies = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return [reply.json()["choices"][0]["text"] for reply in replies]

        expected = await texts()
        asked = asyncio.create_task(texts())
        while len(engine._runner._rows) < 8:  # type: ignore[union-attr]  # noqa: ASYNC110  a thread sets no event
            await asyncio.sleep(0.01)
        held = (await engine.memory())[0]
        before = resident_bytes()
        await engine.park()
        freed = before - resident_bytes()
        # The last columns and rows of the buffers were never touched, so the kernel has no pages for them.
        used = 8 * 900 * BYTES_PER_TOKEN
        assert held.kv_cache >= used
        assert freed >= 0.95 * (held.weights + used)
        await engine.wake()
        assert await asked == expected


async def test_an_engine_whose_memory_does_not_come_back_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its health says so at once, and who waits gets an error and no wrong text."""
    async with started() as (engine, client):
        await engine.park()
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=chat()))
        await asyncio.sleep(0.05)
        await engine.check_health()

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        monkeypatch.setattr(page_copy, "_read", refuse)
        with pytest.raises(EngineError, match="could not be brought back.*Cannot allocate memory"):
            await engine.wake()
        with pytest.raises(EngineError, match="has ended"):
            await engine.check_health()
        assert (await asked).status_code == 503


async def test_a_parked_engine_stops() -> None:
    """What waits gets an error, and the copies are gone."""
    async with started() as (engine, client):
        await engine.park()
        assert engine.copy_bytes() > 0
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=chat()))
        await asyncio.sleep(0.05)
        await engine.stop()
        assert (await asked).status_code == 503
        assert engine.copy_bytes() == 0


@SLOW
async def test_a_stopped_engine_frees_weights_and_cache(larger_model: str) -> None:
    """95 % of both by the kernel's count, in the middle of eight texts and while clients hold its application. A second
    engine of the process gives the same text."""
    config = model_config(model=larger_model, device="cpu", dtype="float32")
    said = []
    async with AsyncExitStack() as stack:
        for _ in range(2):
            engine = PtEngine(config, "larger")
            transport = httpx.ASGITransport(app=await engine.start())
            client = await stack.enter_async_context(
                httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=120)
            )
            body = {"model": "larger", "prompt": [7] * 900, "temperature": 0, "ignore_eos": True}
            said.append((await client.post("/v1/completions", json={**body, "max_tokens": 8})).json()["choices"])
            asked = [
                asyncio.create_task(client.post("/v1/completions", json={**body, "max_tokens": 1000})) for _ in range(8)
            ]
            while len(engine._runner._rows) < 8:  # type: ignore[union-attr]  # noqa: ASYNC110  a thread sets no event
                await asyncio.sleep(0.01)
            held = (await engine.memory())[0]
            before = resident_bytes()
            await engine.stop()
            freed = before - resident_bytes()
            assert freed >= 0.95 * (held.weights + 8 * 900 * BYTES_PER_TOKEN)
            assert [reply.status_code for reply in await asyncio.gather(*asked)] == [503] * 8
            with pytest.raises(EngineError, match="does not run"):
                await engine.check_health()
    assert said[0] == said[1]


@SLOW
async def test_a_conversation_goes_on_after_the_park(larger_model: str) -> None:
    """With a prompt cache, its next turn computes the new tokens only, and its words are those of an engine without."""
    history = [7 + number % 90 for number in range(1500)]
    texts = []
    for budget in (None, "256MiB"):
        config = model_config(model=larger_model, device="cpu", dtype="float32", prompt_cache_memory=budget)
        engine = PtEngine(config, "m")
        transport = httpx.ASGITransport(app=await engine.start())
        async with httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=120) as client:
            turn = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
            await client.post("/v1/completions", json={**turn, "prompt": history})
            await engine.park()
            await engine.wake()
            reply = await client.post("/v1/completions", json={**turn, "prompt": [*history, 3, 4, 5]})
            texts.append(reply.json()["choices"][0]["text"])
        counts = engine.prompt_cache_counts()
        await engine.stop()
    assert texts[0] == texts[1]
    assert counts is not None
    assert (counts.hits, counts.hit_tokens) == (1, 1500)
