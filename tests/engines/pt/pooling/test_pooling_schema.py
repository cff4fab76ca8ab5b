"""Requests made from the OpenAPI documents, right and wrong ones: no answer is a server error."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from serve_app.engines.pt.pooling.openapi import openapi_document
from tests.cluster.contract import bounded, run_cases
from tests.engines.pt.pooling.conftest import Serve
from tests.engines.pt.pooling.tiny_poolers import save_embedder, save_scorer

CASES = 25


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("task", "save", "name"), [("embed", save_embedder, "bert mean"), ("classify", save_scorer, "bert")]
)
async def test_what_the_document_describes_is_answered(
    task: Any, save: Any, name: str, tmp_path: Path, serve: Serve
) -> None:
    """Every operation of the document, over HTTP, with its answers as described."""
    async with serve(save(tmp_path, name)) as model:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        app = model._transport.app  # type: ignore[attr-defined]
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            for is_open in (False, True):
                document = bounded(openapi_document(task), ["tiny"], is_open)
                seen = await asyncio.to_thread(run_cases, url, document, CASES)
                assert seen[200] > 10
                assert seen[400] > 10
                assert max(seen) < 500, seen
        finally:
            server.should_exit = True
            await serving
            listener.close()
