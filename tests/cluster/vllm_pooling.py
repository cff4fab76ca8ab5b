"""Asks vLLM's own endpoints of an embedding model or a cross-encoder, behind the guard and the replica's reader.

    python -m tests.cluster.vllm_pooling FOLDER BODIES.json

BODIES.json is a list of [path, body]. Prints a JSON list of [status, answer]. It starts an engine on the CPU in this
process.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx

from serve_app.engines.vllm.engine import VllmEngine
from serve_app.replica.whole_body import WholeBody
from tests.builders import model_config


async def ask(folder: str, bodies: list[tuple[str, Any]]) -> list[tuple[int, Any]]:
    """What vLLM answers."""
    config = model_config(
        model=folder, infer_backend="vllm", device="cpu", dtype="float32", kv_cache_memory_bytes="64MiB"
    )
    engine = VllmEngine(config, "tiny")
    app = WholeBody(await engine.start(), config)
    found = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://vllm", timeout=120) as client:
        for path, body in bodies:
            answer = await client.post(path, json=body)
            found.append((answer.status_code, answer.json()))
    await engine.stop()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(ask(sys.argv[1], json.loads(Path(sys.argv[2]).read_text())))))
