"""What a replica is told, and what is refused before it starts."""

from dataclasses import replace
from typing import Any

import pytest

from serve_app.errors import PlacementError
from serve_app.facts.inventory import Device, Inventory, parse_gpus
from serve_app.planning.plan import ModelPlan
from serve_app.planning.planner import make_plan
from serve_app.planning.resolve import pinned, resolve, vllm_memory
from serve_app.planning.vllm_blocks import kv_blocks
from tests.planning.model_requests import request

GIB = 2**30


def test_auto_becomes_a_backend() -> None:
    """With the fields that the engine needs."""
    config = resolve(request(max_model_len=4096), parse_gpus("2x12GiB")).config
    assert (config.infer_backend, config.tensor_parallel_size) == ("vllm", 2)
    config = resolve(request(max_model_len=4096), parse_gpus("8GiB,12GiB")).config
    assert (config.infer_backend, config.ranks, config.stages) == ("vllm", 2, 2)


def test_auto_within_limits_asks_ray_for_them() -> None:
    """By index for the bytes of each card, and otherwise for whole cards or the share of one."""
    asked = request(max_model_len=4096, max_memory={0: "12GB", 1: "12GB"})
    by_index = resolve(asked, as_counted("2x16GiB", by_index=True))
    assert (by_index.config.infer_backend, by_index.config.stages) == ("vllm", 2)
    assert by_index.demand.vram_gib == {0: 12e9 / GIB, 1: 12e9 / GIB}
    assert resolve(asked, as_counted("2x16GiB", by_index=False)).demand.gpus == 2
    one = resolve(request(max_model_len=4096, max_memory={0: "20GB"}), as_counted("24GiB", by_index=False))
    assert one.config.infer_backend == "vllm"
    assert 20e9 / (24 * GIB) <= one.demand.gpus < 20e9 / (24 * GIB) + 0.001


def as_counted(gpus: str, by_index: bool) -> Inventory:
    """GPUs that Ray counts in one way."""
    inventory = parse_gpus(gpus)
    return replace(inventory, devices=tuple(replace(device, by_index=by_index) for device in inventory.devices))


def test_what_can_never_fit_is_refused_with_the_cure() -> None:
    """In the plan's words."""
    with pytest.raises(PlacementError, match=r"(?s)7\.34 GiB too much\..*\nFix: one more 10 GiB card"):
        resolve(request(max_model_len=4096), parse_gpus("8GiB"))


def test_memory_that_is_used_now_may_be_the_old_replicas() -> None:
    """So a start is judged by empty devices; a plan by what is free."""
    used = Inventory((Device("n1", 0, "A10", 24 * GIB, 1 * GIB),))
    assert resolve(request(infer_backend="vllm", max_model_len=4096), used).config.infer_backend == "vllm"
    assert not make_plan([request(infer_backend="vllm", max_model_len=4096)], used).fits


def test_vllms_utilisation_is_what_weights_and_cache_take() -> None:
    """vLLM looks for it when the CUDA context is there, which may be larger than planned."""
    (model,) = make_plan([request(infer_backend="vllm", max_model_len=4096)], parse_gpus("24GiB")).models
    fields = pinned(model)
    share = fields["engine_args"]["gpu_memory_utilization"]
    rank = model.ranks[0]
    held = (rank.weights.bytes + rank.kv_cache.bytes) / (24 * GIB)
    assert held - 0.001 <= share <= held
    assert share < 0.9
    assert fields["kv_cache_memory_bytes"].endswith("MiB")


def test_no_more_requests_than_blocks_run_where_layers_keep_states() -> None:
    """vLLM refuses to capture CUDA graphs for more. A number that the user has written is lowered in the open."""
    inventory = parse_gpus("24GiB")

    def planned(**fields: Any) -> ModelPlan:
        asked = request("qwen3-next", infer_backend="vllm", max_model_len=1024, **fields)
        (model,) = make_plan([asked], inventory).models
        return model

    small = planned(kv_cache_memory_bytes="256MiB")
    blocks = kv_blocks(small)
    assert blocks is not None
    assert 50 < blocks < 256
    assert vllm_memory(small)["max_num_seqs"] == pinned(small)["max_num_seqs"] == blocks
    assert not any("max_num_seqs" in reason for reason in small.reasons)
    written = planned(kv_cache_memory_bytes="256MiB", max_num_seqs=200)
    assert vllm_memory(written)["max_num_seqs"] == blocks
    assert f"max_num_seqs is {blocks}, because vLLM runs no more" in written.reasons[-1]
    for enough in (
        planned(),
        planned(kv_cache_memory_bytes="256MiB", max_num_seqs=blocks),
        planned(kv_cache_memory_bytes="256MiB", engine_args={"enforce_eager": True}),
    ):
        assert "max_num_seqs" not in vllm_memory(enough)
    (no_states,) = make_plan(
        [request(infer_backend="vllm", max_model_len=1024, kv_cache_memory_bytes="128MiB")], inventory
    ).models
    assert (kv_blocks(no_states) or 0) < 256
    assert "max_num_seqs" not in vllm_memory(no_states)
