"""A started engine with the demo model, in this process."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from serve_app.config import ModelConfig
from serve_app.engines.pt.engine import PtEngine
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.builders import model_config

# Seconds in which a test's last requests must have left the engine.
IDLE_TIMEOUT_S = 20.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the shared engine run on the event loop that it was started on."""
    for item in items:
        if "running_engine" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.asyncio(loop_scope="module"), append=False)


def demo_engine() -> ModelConfig:
    """The demo model, of which at most four sequences run at a time."""
    return model_config(model=model_path(DEMO_MODEL), device="cpu", dtype="float32", max_num_seqs=4)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running_engine() -> AsyncIterator[PtEngine]:
    """One engine for all tests of a module: to load and probe a model takes longer than most of them."""
    engine = PtEngine(demo_engine(), "demo")
    engine.application = await engine.start()  # type: ignore[attr-defined]
    yield engine
    await engine.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(running_engine: PtEngine) -> AsyncIterator[PtEngine]:
    """Running at most four sequences at a time; `application` is what `start` returned. A test that leaves work
    behind, or a dead thread, fails."""
    yield running_engine
    running_engine.generator.require_alive()
    async with asyncio.timeout(IDLE_TIMEOUT_S):
        while running_engine.generator.in_flight:  # noqa: ASYNC110  the engine's thread sets no event
            await asyncio.sleep(0.01)


@pytest_asyncio.fixture(loop_scope="module")
async def client(engine: PtEngine) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the engine."""
    transport = httpx.ASGITransport(app=engine.application)  # type: ignore[attr-defined]
    async with httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=60) as session:
        yield session
