"""vLLM's own code says what its buffers for LoRA adapters take, without a GPU and without weights."""

from typing import Any

import pytest

from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from serve_app.facts.engine_facts import BesideLayers, RankAdapters, VllmAdapterFacts, facts_from_json
from serve_app.planning.adapter_bytes import rank_adapters_by_formula
from tests.planning.model_requests import CONFIGS, shape_of
from tests.warm_vllm import WarmVllm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Models of plain layers, for which the guess is compared with vLLM's word.
PLAIN = ("qwen2-7b", "llama-3.1-8b")
# Experts, fused and not, compressed keys, states, encoders, and quantised weights.
OTHERS = ("qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite", "qwen3-next", "qwen2.5-vl-7b", "llama-3.1-8b-fp8",
          "mamba2-1.3b", "bge-m3")  # fmt: skip
SIZES = (1, 2)
# Guesses may be above by this share, before their margin. vLLM makes no buffers for the embedding and the head of some
# models.
MOST_ABOVE = 0.2


def job_of(folder: str, **fields: Any) -> dict[str, Any]:
    """The question for one model."""
    return {"folder": folder, "tensor_parallel_sizes": SIZES, "dtype": "bfloat16", "wants": "adapters", **fields}


@pytest.fixture(scope="module")
def told(warm_vllm: WarmVllm) -> dict[str, dict[str, Any]]:
    """What vLLM's code says of each model."""
    jobs = {name: job_of(str(CONFIGS / name)) for name in (*PLAIN, *OTHERS)}
    jobs["demo"] = job_of(model_path(DEMO_MODEL))
    jobs["only o"] = job_of(model_path(DEMO_MODEL), lora_target_modules=["o_proj"])
    found = warm_vllm.call("cuda", "tests.planning.vllm_facts:answers", list(jobs.values()), timeout_s=250)
    return dict(zip(jobs, found, strict=True))


def facts_of(answer: dict[str, Any]) -> VllmAdapterFacts:
    """The facts of an answer."""
    assert "error" not in answer, answer
    facts = facts_from_json("vllm", answer["facts"])
    assert isinstance(facts, VllmAdapterFacts)
    return facts


def test_a_small_model_is_counted_by_hand(told: dict[str, dict[str, Any]]) -> None:
    """The demo model has 128 channels, as many in its heads and half of that in those of keys and values, and 384 in
    the feed-forward part. Of each projection one factor is split, and three projections and two are each one layer."""
    whole = 2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 384)
    split = (128 + 64) + 2 * (128 + 32) + (64 + 128) + 2 * (128 + 192) + (192 + 128)
    assert [facts_of(told["demo"]).ranks[tp].layers for tp in SIZES] == [(2 * whole,) * 4, (2 * split,) * 4]


@pytest.mark.parametrize("name", PLAIN)
def test_the_guess_is_near_vllms_word(told: dict[str, dict[str, Any]], name: str) -> None:
    """At each size, for a rank with all layers."""
    architecture, tensors = shape_of(name)
    for tp in SIZES:
        exact = facts_of(told[name]).ranks[tp]
        guess = rank_adapters_by_formula(tensors, architecture, tp, 2, None)
        assert guess.layers == exact.layers
        assert exact.total <= guess.total <= (1 + MOST_ABOVE) * exact.total


@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_model_has_an_answer(told: dict[str, dict[str, Any]], name: str) -> None:
    """Its bytes, or vLLM's reason, and no fault of ours."""
    facts = facts_of(told[name])
    assert facts.ranks.keys() | facts.refusals.keys() == set(SIZES)
    assert bool(facts.ranks) == (name != "mamba2-1.3b")
    for rank in facts.ranks.values():
        assert min(rank.layers) > 0


def test_experts_have_buffers_of_their_own(told: dict[str, dict[str, Any]]) -> None:
    """Qwen3 30B A3B has 128 of them in each layer, of three projections of 2048 to 768 channels or back, and a
    router."""
    attention = 2 * (2048 + 4096) + 2 * (2048 + 512)
    experts = 128 * 3 * (2048 + 768)
    assert facts_of(told["qwen3-30b-a3b"]).ranks[1].layers == (2 * (attention + experts + 2048 + 128),) * 48


def test_named_modules_alone_have_buffers(told: dict[str, dict[str, Any]]) -> None:
    """The projection of the heads has 128 inputs and 128 outputs, in bfloat16."""
    assert facts_of(told["only o"]).ranks[1] == RankAdapters((512,) * 4, 0, BesideLayers(0, 0, 0))
