"""What depends on the compute capability of a card."""

from dataclasses import replace
from typing import Any

import pytest

from serve_app.facts.engine_facts import CacheLayer, CardFacts, EngineFacts, RankFacts, VllmFacts
from serve_app.facts.inventory import parse_gpus
from serve_app.planning.cards import LEAST_IN_VLLM
from serve_app.planning.fixes import with_fixes
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.planner import make_plan
from serve_app.planning.vllm_blocks import kv_blocks
from tests.planning.model_requests import request


def quantised(method: str | None, shape: str = "qwen2-7b", **config: Any) -> ModelRequest:
    """A model whose config.json names a method."""
    whole = request(shape, infer_backend="vllm", **{"max_model_len": 4096, **config})
    return replace(whole, architecture=replace(whole.architecture, quantization=method))


@pytest.mark.parametrize(
    ("method", "card", "least"),
    [("mxfp4", "T4", "8.0"), ("fp8", "V100-32GB", "7.5"), ("awq", "V100-32GB", "7.5"),
     ("gptq", "V100-32GB", ""), ("mxfp4", "A100-80GB", ""), ("mxfp4", "80GiB", "")],
)  # fmt: skip
def test_a_card_that_is_too_old_for_the_weights_is_refused(method: str, card: str, least: str) -> None:
    """By its name and both capabilities. A card without a known name is not."""
    found = make_plan([quantised(method, max_model_len=512)], parse_gpus(card)).problems
    refused = [problem for problem in found if problem.code == "vllm_refuses"]
    assert bool(refused) == bool(least)
    if least:
        assert f"vLLM takes {method} weights from {least} on" in refused[0].message
        assert card.partition("-")[0] in refused[0].message


def test_rounding_to_fp8_needs_the_card_too() -> None:
    """`quantization: fp8` of whole weights."""
    (problem,) = make_plan([quantised(None, quantization="fp8")], parse_gpus("V100-32GB")).problems
    assert problem.code == "vllm_refuses"


def test_a_newer_card_beside_an_old_one_is_taken() -> None:
    """And what the newer one lacks is told before what the old one cannot."""
    both = parse_gpus("V100-32GB,A100-40GB")
    assert make_plan([quantised("fp8")], both).models[0].ranks[0].device.index == 1
    (problem,) = make_plan([quantised("fp8", "llama-3-70b")], both).problems
    assert problem.code == "over_commit"


@pytest.mark.parametrize(
    ("shape", "method", "card", "known"),
    [("qwen2-7b", None, "A100-80GB", True), ("qwen2-7b", "awq", "A100-80GB", False),
     ("qwen2-7b", "awq", "H100-80GB", True), ("qwen2-7b", "awq", "80GiB", True),
     ("deepseek-v2-lite", None, "A100-80GB", False), ("deepseek-v2-lite", None, "H100-80GB", True)],
)  # fmt: skip
def test_blocks_are_planned_only_where_the_kernels_are_known(
    shape: str, method: str | None, card: str, known: bool
) -> None:
    """vLLM chooses its kernels for MLA and for quantised weights by the card, and so the length of a block."""
    (model,) = make_plan([quantised(method, shape)], parse_gpus(card)).models
    assert (kv_blocks(model) is not None) == known


@pytest.mark.parametrize(("card", "offered"), [("A100-40GB", False), ("40GiB", True)])
def test_a_cache_of_mla_in_8_bits_is_offered_only_where_its_kernel_is_known(card: str, offered: bool) -> None:
    """Its blocks are those of Hopper's kernel."""
    asked = request("deepseek-v2-lite", infer_backend="vllm", max_model_len=163_840)
    asked = replace(asked, config=asked.config.model_copy(update={"kv_cache_memory_bytes": 3 * 2**30}))
    inventory = parse_gpus(card)
    plan = with_fixes(make_plan([asked], inventory), [asked], inventory)
    assert plan.problems
    fixes = [fix.text for problem in plan.problems for fix in problem.fixes]
    assert any("kv_cache_dtype: fp8" in text for text in fixes) == offered, fixes


def told(weights: int, page_bytes: int = 32768) -> VllmFacts:
    """What vLLM says of a model of 28 layers."""
    cache = tuple(CacheLayer(number, "full", 16, page_bytes) for number in range(28))
    return VllmFacts({1: RankFacts((weights // 28,) * 28, 0, 0, 0, cache, max_model_len=32768)})


def test_each_card_is_planned_by_what_vllm_says_of_it() -> None:
    """Weights and pages of an A100, blocks that are known there, and a refusal of a V100 in vLLM's words."""
    others = (
        CardFacts((7, 0), VllmFacts({}, {1: "Marlin does not support weight_bits = uint4b8"})),
        CardFacts((8, 0), told(6 * 2**30, 65536)),
    )
    asked = replace(quantised("gptq"), engine_facts=EngineFacts(told(5 * 2**30), others=others))
    h100, a100, t4 = (make_plan([asked], parse_gpus(card)).models[0] for card in ("H100", "A100-80GB", "T4"))
    sizes = [model.ranks[0].weights.bytes // 2**28 for model in (h100, a100, t4)]
    assert [round(size / 4) for size in sizes] == [5, 6, 5]
    assert a100.kv_bytes_per_request == 2 * h100.kv_bytes_per_request
    assert [kv_blocks(model) is not None for model in (h100, a100, t4)] == [True, True, False]
    (problem,) = make_plan([asked], parse_gpus("V100-32GB")).problems
    assert problem.code == "vllm_refuses"
    assert (
        "Marlin does not support weight_bits = uint4b8. This is what vLLM says of n1:0 (V100-32GB)." in problem.message
    )
    assert make_plan([asked], parse_gpus("V100-32GB,A100-80GB")).models[0].ranks[0].device.index == 1
    # Of two cards, the older one decides for both.
    both = replace(asked, config=asked.config.model_copy(update={"pipeline_parallel_size": 2}))
    assert not make_plan([both], parse_gpus("V100-32GB,A100-80GB")).fits


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(LEAST_IN_VLLM))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Importing vLLM brings those of its libraries.
def test_the_least_capability_is_vllms_own(method: str) -> None:
    """So that an upgrade of vLLM shows what has changed."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    least = get_quantization_config(method).get_min_capability()
    assert divmod(least, 10) == LEAST_IN_VLLM[method]
