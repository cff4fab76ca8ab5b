"""What this project uses of vLLM to plan: its models without storage, on a GPU that is pretended."""

from typing import Any

import pytest

from serve_app.engines import torch_internals
from serve_app.engines.vllm import vllm_meta_model as meta
from tests.contracts.contract import contract, untested
from tests.warm_vllm import WarmVllm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def told(warm_vllm: WarmVllm) -> dict[str, Any]:
    """What a process that pretends to have a GPU finds. `prepare` has been called there."""
    found: dict[str, Any] = warm_vllm.call("cuda", "tests.contracts.vllm_meta_calls:calls", timeout_s=180)
    return found


def test_each_part_has_a_test() -> None:
    """So that an upgrade shows what breaks."""
    assert untested(meta) == []


@contract(
    "vllm", "how a platform is put in the place of the detected one", meta.prepare, meta.pretend_card,
    torch_internals.pretend_operations, torch_internals.pretend_gpu,
)  # fmt: skip
def test_the_platform_is_a_hopper(told: dict[str, Any]) -> None:
    """Without a GPU, on a build for the CPU too."""
    assert told["pretend_card"] == {"is_cuda": True, "capability": [9, 0]}


@contract(
    "vllm", "how it builds a model", meta.process_group, meta.engine_config, meta.model_without_storage,
    torch_internals.without_storage,
)  # fmt: skip
def test_a_model_has_no_storage(told: dict[str, Any]) -> None:
    """Half of Llama 3 70B's weights, and the norms that both ranks have."""
    built = told["model_without_storage llama-3-70b"]
    assert built["devices"] == ["meta"]
    assert 141_107_000_000 < 2 * built["bytes"] < 141_112_000_000


@contract("vllm", "how it splits a model into stages", meta.stage_of_pipeline)
def test_a_stage_has_the_layers_that_it_is_given(told: dict[str, Any]) -> None:
    """And a model that is built afterwards has all of them."""
    assert told["stage_of_pipeline"] == [30, 40, 10, 80]


@contract("vllm", "the specifications of its cache", meta.cache_specs, meta.kind_of, meta.page_of, meta.cached_modules)
def test_each_layer_says_what_its_cache_is(told: dict[str, Any]) -> None:
    """A page of 16 tokens, four heads and 128 channels of keys and values; a window; a state."""
    page = {"block_tokens": 16, "page_bytes": 16 * 4 * 2 * 128 * 2, "window": 0, "alignment": 1}
    assert told["page_of llama-3-70b"] == page
    assert told["cache_specs llama-3-70b"] == 80
    assert told["page_of gpt-oss-20b"]["window"] == 128
    assert told["kind_of gpt-oss-20b"] == ["full", "sliding"]
    assert told["kind_of qwen3-next"] == ["full", "state"]
    assert told["cached_modules qwen3-next"] is True


@contract(
    "vllm", "the groups of its cache", meta.cache_groups, meta.bytes_per_request, meta.packs_blocks, meta.forms_of
)
def test_layers_are_put_into_groups(told: dict[str, Any]) -> None:
    """Twelve windows and twelve full layers share blocks; a request of 1600 tokens has 100 of each full layer."""
    assert told["cache_groups llama-3-70b"] == [80]
    assert told["cache_groups gpt-oss-20b"] == [12, 12]
    assert told["forms_of gpt-oss-20b"] == 2
    assert told["packs_blocks gpt-oss-20b"] is False
    assert told["bytes_per_request llama-3-70b"] == 100 * 80 * told["page_of llama-3-70b"]["page_bytes"]


@contract("vllm", "the pages of a state", meta.state_pages)
def test_a_state_has_two_pages(told: dict[str, Any]) -> None:
    """Prefix caching keeps one more."""
    assert told["state_pages qwen3-next"] == [2]


@contract(
    "vllm", "what its configuration says", meta.steps_in_flight, meta.batched_tokens, meta.longest, meta.is_multimodal
)
def test_the_configuration_is_read(told: dict[str, Any]) -> None:
    """Two steps are on their way, and one of these models reads images."""
    assert told["steps_in_flight llama-3-70b"] == 2
    assert told["batched_tokens llama-3-70b"] is True
    assert told["longest llama-3-70b"] == 8192
    assert told["is_multimodal llama-3-70b"] is False
    assert told["is_multimodal qwen2.5-vl-7b"] is True


@contract("vllm", "how it makes buffers for LoRA adapters", meta.adapter_buffers)
def test_buffers_for_adapters_have_no_storage(told: dict[str, Any]) -> None:
    """Of one of two ranks of Llama 3 70B, for two adapters of rank 8. Inputs of q, k, v, gate and up are whole, and so
    are outputs of o and down."""
    layer = 8192 * 3 + (8192 + 1024 * 2) // 2 + (8192 // 2 + 8192) + 2 * (8192 + 28672 // 2) + (28672 // 2 + 8192)
    buffers = told["adapter_buffers llama-3-70b"]
    assert buffers["devices"] == ["meta"]
    assert buffers["layer"] == 2 * 8 * layer * 2


@contract("vllm", "ParallelLMHead", meta.is_head)
def test_the_head_is_known(told: dict[str, Any]) -> None:
    """One in each of these models."""
    assert told["is_head llama-3-70b"] == 1
    assert told["is_head qwen2.5-vl-7b"] == 1
