"""Planned and enforced memory on a GPU. `make test` skips this where there is none.

    .venv/bin/pytest -s tests/gpu/test_memory.py

prints the table of planned against measured. The 7B-sized model takes 15 GB of disk, and 30 GB of the card. Nothing
else may run there meanwhile.
"""

import json
import multiprocessing
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from serve_app.engines.pt.load.attention import folded_sdpa
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.facts.gpus import local_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SHARE = 0.2


def _shared(overreaches: bool, pipe: Any) -> None:
    """One pt engine under its share of the card; it answers, may ask for too much, and answers when it is told to."""
    import asyncio

    from serve_app.engines.pt.core.sequence import SamplingParams
    from serve_app.engines.pt.engine import PtEngine
    from tests.builders import model_config

    async def run() -> None:
        engine = PtEngine(model_config(model=model_path(DEMO_MODEL), dtype="float32", num_gpus=SHARE), "shared")
        await engine.start()

        async def answer() -> int:
            return len([piece async for piece in engine.generator.generate([1, 2], SamplingParams(8, temperature=0))])

        pipe.send(await answer())
        refused = ""
        if overreaches:
            try:
                torch.empty(int(2 * SHARE * torch.cuda.mem_get_info(0)[1]), dtype=torch.uint8, device="cuda")
            except torch.OutOfMemoryError as error:
                refused = str(error)
        pipe.send(refused)
        await asyncio.to_thread(pipe.recv)  # Until the other has tried.
        pipe.send(await answer())
        await engine.stop()

    asyncio.run(run())


def test_two_pt_engines_share_a_gpu_and_the_one_that_overreaches_fails_alone() -> None:
    """torch refuses what is beyond its share, though the card has it; both go on."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pipes = []
        for overreaches in (True, False):
            mine, theirs = context.Pipe()
            child = context.Process(target=_shared, args=(overreaches, theirs))
            child.start()
            theirs.close()  # So that a child that dies is not waited for.
            stack.callback(child.join, 60)
            stack.callback(child.terminate)
            pipes.append(mine)
        assert all(_told(pipe) > 0 for pipe in pipes)
        refused = [_told(pipe) for pipe in pipes]
        for pipe in pipes:
            pipe.send("go on")
        assert all(_told(pipe) > 0 for pipe in pipes)
    assert "out of memory" in refused[0].lower()
    assert refused[1] == ""


def _told(pipe: Any) -> Any:
    """What a child says next. Raises EOFError when it has ended."""
    assert pipe.poll(300), "the child is silent"
    return pipe.recv()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_a_step_of_all_rows_copies_no_keys(dtype: torch.dtype) -> None:
    """32 rows of 2048 tokens of Qwen2-7B's heads, of different lengths: the result is that of repeated keys and values,
    which would take seven times the bytes of both."""
    buffers = torch.randn(2, 32, 4, 2176, 128, dtype=dtype, device="cuda")
    key, value = buffers[:, :, :, 100:2148]
    query = torch.randn(32, 28, 1, 128, dtype=dtype, device="cuda")
    mask = torch.arange(2048, device="cuda")[None] >= torch.arange(32, device="cuda")[:, None] * 60
    mask = mask[:, None, None]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = folded_sdpa(query, key, value, mask)
    assert torch.cuda.max_memory_allocated() - before < key.nbytes + value.nbytes
    repeated = key.repeat_interleave(7, 1), value.repeat_interleave(7, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", ["pt", "vllm"])
def test_a_7b_sized_model_holds_what_was_planned(backend: str) -> None:
    """Within 3 %, by NVML, while as many requests of full length run as the plan says."""
    command = [sys.executable, "-m", "benchmarks.planned_memory", "--device", "cuda", "--shape", "7b"]
    command += ["--kv", "8GiB", "--max-model-len", "4096", "--backend", backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"\n{local_gpus()[0].name} {backend}: {json.dumps(row)}")
    assert row["planned_to_measured"] == pytest.approx(1, abs=0.03)
