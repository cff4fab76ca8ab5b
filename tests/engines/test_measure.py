"""What an engine says that it holds."""

import asyncio
import os
from dataclasses import replace

import pytest
import torch

from serve_app.engines.measure import free_pinned_cache, pinned_bytes, rank_memory, tensor_bytes, tensor_peak
from serve_app.engines.pt.core.sequence import SamplingParams
from serve_app.engines.pt.engine import PtEngine, weight_bytes
from serve_app.engines.rank_memory import RankMemory
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.facts.process_memory import resident_bytes
from serve_app.replica.replica_plan import plan_replica
from tests.builders import model_config

CPU = torch.device("cpu")


def test_shared_storages_count_once_and_data_that_is_not_there_does_not() -> None:
    """Tied weights, views, and modules that accelerate has put on disk."""
    whole = torch.zeros(10, 10)
    sizes = tensor_bytes(
        [whole, whole[2:], whole.T, torch.zeros(3, dtype=torch.bfloat16), torch.zeros(5, device="meta")]
    )
    assert sizes == {CPU: 406}


def test_on_the_cpu_the_libraries_are_not_the_models() -> None:
    """Only what came after them."""
    before = resident_bytes()
    kept = torch.ones(50_000_000)
    seen = rank_memory(CPU, 0, 0, before)
    assert (seen.device, seen.pid, seen.context) == ("cpu", os.getpid(), 0)
    assert seen.held is not None
    assert 0.9 * kept.nbytes < seen.held < 1.5 * kept.nbytes


def test_pinned_memory_is_counted_by_the_name_that_torch_has() -> None:
    """Without CUDA there is none, and nothing to give back."""
    assert "allocated_bytes.{current," in (torch.cuda.host_memory_stats.__doc__ or "")
    if not torch.cuda.is_available():
        assert pinned_bytes() == 0
        free_pinned_cache()
        return
    own = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    assert pinned_bytes() >= own.nbytes
    held = pinned_bytes()
    del own
    free_pinned_cache()
    assert pinned_bytes() <= held - 2**26


def test_the_rest_is_what_is_no_weight_cache_or_context() -> None:
    """Unknown where the driver does not tell, and never negative."""
    known = RankMemory("GPU-a", 1, weights=40, kv_cache=5, most_kv_cache=30, held=70, peak=100, context=10)
    assert known.rest == 20
    assert replace(known, held=None, peak=None, context=None).rest is None
    assert replace(known, peak=50).rest == 0


def test_what_the_allocator_keeps_is_no_activation_where_tensors_are_known() -> None:
    """Old buffers of a cache that grew would raise every later plan. The figures that are shown stay as they are."""
    seen = RankMemory(
        "GPU-a", 1, weights=40, kv_cache=5, most_kv_cache=30, held=700, peak=1000, context=10, tensor_peak=85
    )
    assert (seen.rest, seen.peak, seen.activations) == (15, 1000, 645)
    assert replace(seen, held=None, peak=None, context=None).rest == 15
    assert replace(seen, tensor_peak=0).rest == 0


def test_the_peak_of_tensors_is_one_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is parked tells none, because its weights are not there any more."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert tensor_peak(CPU) is None
    assert (tensor_peak(torch.device("cuda", 0)), tensor_peak(torch.device("cuda", 0), True)) == (7, 0)


async def test_pt_tells_its_weights_to_the_byte_and_its_cache_while_requests_run() -> None:
    """Also where they are in oneDNN's order, as they are on the CPU."""
    config = model_config(model=model_path(DEMO_MODEL), device="cpu", dtype="float32", max_model_len=256)
    planned = plan_replica(config, [])
    assert planned is not None
    engine = PtEngine(config, "m")
    await engine.start()
    (idle,) = await engine.memory()
    assert idle.weights == planned.ranks[0].weights.bytes
    assert idle.kv_cache == 0
    pieces = engine.generator.generate([1, 2, 3], SamplingParams(50, temperature=0, ignore_eos=True))
    await anext(pieces)
    (busy,) = await engine.memory()
    await pieces.aclose()
    for _ in range(1000):
        if not engine.generator.in_flight:
            break
        await asyncio.sleep(0.01)
    (after,) = await engine.memory()
    assert after.most_kv_cache >= busy.kv_cache  # Its buffers may be gone; they were there.
    assert busy.kv_cache > 0
    assert busy.weights == idle.weights == weight_bytes(engine.generator.loaded.model)[CPU]
    await engine.stop()
