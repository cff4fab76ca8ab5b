"""What a replica is told, and what is refused before it starts."""

from dataclasses import replace

import pytest

from serve_app.errors import PlacementError
from serve_app.facts.inventory import Device, Inventory, parse_gpus
from serve_app.planning.planner import make_plan
from serve_app.planning.resolve import pinned, resolve
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


def test_vllms_utilisation_leaves_the_context_out() -> None:
    """vLLM measures its share without the CUDA context."""
    (model,) = make_plan([request(infer_backend="vllm", max_model_len=4096)], parse_gpus("24GiB")).models
    fields = pinned(model)
    share = fields["engine_args"]["gpu_memory_utilization"]
    assert share * 24 * GIB + model.ranks[0].context.bytes <= 24 * GIB
    assert abs(share - 0.92) < 0.002
    assert fields["kv_cache_memory_bytes"].endswith("MiB")
