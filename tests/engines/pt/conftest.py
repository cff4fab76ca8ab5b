"""A started engine with the demo model, in this process."""

from collections.abc import AsyncIterator

import httpx
import pytest

from serve_app.engines.pt.engine import PtEngine
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.builders import model_config


@pytest.fixture
async def engine() -> AsyncIterator[PtEngine]:
    """Running at most four sequences at a time; `application` is what `start` returned."""
    config = model_config(model=model_path(DEMO_MODEL), device="cpu", dtype="float32", max_num_seqs=4)
    engine = PtEngine(config, "demo")
    engine.application = await engine.start()  # type: ignore[attr-defined]
    yield engine
    await engine.stop()


@pytest.fixture
async def client(engine: PtEngine) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the engine."""
    transport = httpx.ASGITransport(app=engine.application)  # type: ignore[attr-defined]
    async with httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=60) as session:
        yield session
