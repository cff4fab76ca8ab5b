"""The thread that computes: one input's error is its own, and nothing waits for ever."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from serve_app.engines.pt.pooling.inputs import Input
from serve_app.errors import EngineError
from tests.engines.pt.pooling.conftest import Serve, serving
from tests.engines.pt.pooling.test_equality import cosines, vectors
from tests.engines.pt.pooling.tiny_poolers import save_embedder, texts

BAD = 4  # No word has this id.


class Failing:
    """Stands before a runner. A pass with the token id `BAD` fails, and so does one of more than `most` inputs."""

    def __init__(self, runner: Any, error: Exception, most: int = 1000):
        self.head, self._runner, self._error, self._most = runner.head, runner, error, most
        self.passes: list[int] = []

    def run(self, inputs: Sequence[Input]) -> torch.Tensor:
        """Runs one pass."""
        self.passes.append(len(inputs))
        if len(inputs) > self._most or any(BAD in item.ids for item in inputs):
            raise self._error
        return self._runner.run(inputs)


def replace_runner(client: httpx.AsyncClient, error: Exception, most: int = 1000) -> Failing:
    """Puts a failing runner into a started engine."""
    loop = client.engine.pooler._loop  # type: ignore[attr-defined]
    loop._runner = Failing(loop._runner, error, most)
    return loop._runner


async def test_the_input_that_fails_fails_alone(tmp_path: Path, serve: Serve) -> None:
    """Requests that share its pass are answered."""
    async with serve(save_embedder(tmp_path, "bert mean")) as client:
        replace_runner(client, ValueError("a wrong input"))
        bodies = [[2, 20, 3], [2, BAD, 3], [2, 30, 3]]
        answers = await asyncio.gather(*(client.post("/v1/embeddings", json={"input": ids}) for ids in bodies))
        assert [answer.status_code for answer in answers] == [200, 500, 200]
        assert "ValueError: a wrong input" in answers[1].json()["error"]["message"]
        together = await client.post("/v1/embeddings", json={"input": bodies})
        assert together.status_code == 500


async def test_a_pass_without_memory_is_tried_in_halves(tmp_path: Path, serve: Serve) -> None:
    """All are answered, and an input that has no room alone is told so."""
    asked = texts(20)
    async with serve(save_embedder(tmp_path, "bert mean")) as client:
        expected = await vectors(client, asked)
        failing = replace_runner(client, torch.OutOfMemoryError("out of memory"), most=2)
        assert cosines(await vectors(client, asked), expected).min() > 0.9999
        assert max(failing.passes) > 2
        refused = await client.post("/v1/embeddings", json={"input": [BAD]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (500, "out_of_memory")


async def test_the_end_ends_what_waits(tmp_path: Path) -> None:
    """With an EngineError, which clients see as 503, and later requests get it too."""
    async with serving(save_embedder(tmp_path, "bert mean")) as client:
        pooler = client.engine.pooler  # type: ignore[attr-defined]
        loop = pooler._loop
        loop._runner = Failing(loop._runner, torch.AcceleratorError("the device is lost"))
        answer = await client.post("/v1/embeddings", json={"input": [BAD]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
        assert (await client.get("/health")).status_code == 503
        with pytest.raises(EngineError):
            await client.engine.check_health()  # type: ignore[attr-defined]
        pooler.require_alive = lambda: None


async def test_a_thread_that_hangs_is_told(tmp_path: Path) -> None:
    """After `step_timeout_s`, what waits ends and the health is bad."""
    import threading

    freed = threading.Event()
    async with serving(save_embedder(tmp_path, "bert mean"), step_timeout_s=0.2) as client:
        pooler = client.engine.pooler  # type: ignore[attr-defined]
        runner = pooler._loop._runner
        real = runner.run
        runner.run = lambda inputs: (freed.wait(20), real(inputs))[1]
        answer = await client.post("/v1/embeddings", json={"input": "w1"})
        freed.set()
        assert answer.status_code == 503
        assert "has ended no step for 0.2 s (step_timeout_s)" in answer.json()["error"]["message"]
        with pytest.raises(EngineError, match="step_timeout_s"):
            await client.engine.check_health()  # type: ignore[attr-defined]
        pooler.require_alive = lambda: None


@pytest.mark.parametrize("name", ["bert dense", "qwen3"])
async def test_a_parked_engine_holds_requests_and_answers_the_same(name: str, tmp_path: Path, serve: Serve) -> None:
    """Its weights leave and come back, those behind the pooling too."""
    async with serve(save_embedder(tmp_path, name)) as client:
        engine = client.engine  # type: ignore[attr-defined]
        expected = await vectors(client, "w1 w2")
        assert engine.parking() is engine
        await engine.park()
        assert engine.copy_bytes() > 0
        assert [rank.weights for rank in await engine.memory()] == [0]
        held = asyncio.create_task(vectors(client, "w1 w2"))
        await asyncio.sleep(0.05)
        assert not held.done()
        await engine.wake()
        np.testing.assert_array_equal(await held, expected)
        await engine.forget_copy()


async def test_the_engine_reports_what_it_holds(tmp_path: Path, serve: Serve) -> None:
    """Its weights, no KV cache, and its load by the inputs of a step."""
    async with serve(save_embedder(tmp_path, "bert dense")) as client:
        engine = client.engine  # type: ignore[attr-defined]
        (rank,) = await engine.memory()
        assert (rank.device, rank.kv_cache) == ("cpu", 0)
        assert rank.weights > 4 * 95 * 32
        assert (engine.load(), engine.cache_blocks(), engine.draft_counts()) == (0, None, None)
