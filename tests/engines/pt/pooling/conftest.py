"""Started engines of tiny embedding models and cross-encoders, in this process."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.engines.engine import create_engine
from serve_app.engines.pt.pooling.engine import PoolingEngine
from tests.builders import model_config

Serve = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@asynccontextmanager
async def serving(folder: Path, **fields: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a started engine, which is its `engine`. Work that is left behind fails the test."""
    engine = create_engine(model_config(model=str(folder), device="cpu", dtype="float32", **fields), "tiny")
    assert isinstance(engine, PoolingEngine)
    app = await engine.start()
    try:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://pt", timeout=60) as session:
            session.engine = engine  # type: ignore[attr-defined]
            yield session
        engine.pooler.require_alive()
        assert engine.pooler.in_flight == 0
    finally:
        await engine.stop()


@pytest.fixture
def serve() -> Serve:
    """Starts an engine for a folder."""
    return serving
