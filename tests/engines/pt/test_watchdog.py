"""An engine whose thread hangs is told from one that works, and ends what waits for it."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from serve_app.engines.pt.core.sequence import SamplingParams
from serve_app.engines.pt.core.step_timeout import SLOW_STEP_TIMEOUT_S, STEP_TIMEOUT_S, step_timeout_s
from serve_app.engines.pt.engine import PtEngine
from serve_app.errors import EngineError
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.builders import model_config
from tests.engines.pt.api_client import chat


@pytest.fixture
async def hanging() -> AsyncIterator[tuple[PtEngine, httpx.AsyncClient, threading.Event]]:
    """An engine that hangs in every forward pass while the event is clear, and counts as dead after a second."""
    config = model_config(model=model_path(DEMO_MODEL), device="cpu", dtype="float32", max_num_seqs=4, step_timeout_s=1)
    engine = PtEngine(config, "demo")
    app = await engine.start()
    goes_on = threading.Event()
    goes_on.set()
    runner = engine._runner
    assert runner is not None
    decode = runner.decode

    def waits(sequences: object) -> object:
        goes_on.wait(60)
        return decode(sequences)  # type: ignore[arg-type]

    runner.decode = waits  # type: ignore[method-assign,assignment]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://pt", timeout=60) as client:
        yield engine, client, goes_on
    goes_on.set()
    await engine.stop()


@pytest.mark.slow
async def test_a_hang_is_noticed_in_its_time(
    hanging: tuple[PtEngine, httpx.AsyncClient, threading.Event],
) -> None:
    """Streams end with an error event, new requests are refused, and the health check fails. Idling is no hang."""
    engine, client, goes_on = hanging
    await client.post("/v1/chat/completions", json=chat())
    await asyncio.sleep(1.5)
    await engine.check_health()
    goes_on.clear()
    start = time.monotonic()
    stream, whole = await asyncio.gather(
        client.post("/v1/chat/completions", json=chat(stream=True)), client.post("/v1/chat/completions", json=chat())
    )
    assert time.monotonic() - start < 30
    assert '"code":"model_unavailable"' in stream.text.splitlines()[-2].replace(" ", "")
    assert whole.status_code == 503
    assert (await client.post("/v1/chat/completions", json=chat())).status_code == 503
    assert (await client.get("/health")).status_code == 503
    with pytest.raises(EngineError, match="step_timeout_s"):
        await engine.check_health()
    assert engine.generator.in_flight == 0
    with pytest.raises(EngineError):
        await anext(engine.generator.generate([1], SamplingParams(1)))
    assert engine.generator.in_flight == 0, "a place that was taken for nothing is given back"


def test_steps_that_read_from_slower_places_may_take_longer() -> None:
    """What the user says goes before both."""
    cpu = model_config(model="x", device="cpu")
    assert step_timeout_s(cpu) == SLOW_STEP_TIMEOUT_S
    assert step_timeout_s(model_config(model="x", max_memory={0: "3GB", "cpu": "9GB"})) == SLOW_STEP_TIMEOUT_S
    assert step_timeout_s(model_config(model="x", max_memory={0: "3GB"})) == STEP_TIMEOUT_S
    assert step_timeout_s(model_config(model="x", device="cpu", step_timeout_s=5)) == 5
