"""A draft model of pt is a part of the plan: its weights and its KV cache, on the card where it lies."""

import json
from dataclasses import replace
from typing import Any

import pytest

from serve_app.cli.plan.explain import lines
from serve_app.facts.architecture import read_architecture
from serve_app.facts.inventory import parse_gpus
from serve_app.facts.weights import tensors_without_weights
from serve_app.planning.fixes import with_fixes
from serve_app.planning.layer_map import BlockGroup
from serve_app.planning.memory import RESERVE_SHARE
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import ModelPlan, Plan
from serve_app.planning.planner import make_plan
from serve_app.planning.pt_kv_buffers import cells
from serve_app.planning.resolve import pinned
from tests.planning.model_requests import CONFIGS, request

GIB, GB = 2**30, 10**9
SMALL = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
SMALL |= {"num_key_value_heads": 2, "tie_word_embeddings": True}


def drafting(draft: dict[str, Any] | None = None, **config: Any) -> ModelRequest:
    """A Qwen2 7B with a draft of the shape of a Qwen2 0.5B, with changed fields of its config.json."""
    own = json.loads((CONFIGS / "qwen2-7b" / "config.json").read_text()) | SMALL | (draft or {})
    speculative = {"model": "small", **config.pop("speculative", {})}
    target = request(infer_backend=config.pop("infer_backend", "pt"), speculative=speculative, **config)
    shape = read_architecture(own, "small")
    assert target.config.draft is not None
    tensors = tuple(tensors_without_weights(own, "small"))
    return replace(target, draft=ModelRequest("draft", target.config.draft, shape, tensors))


def plan_of(asked: ModelRequest, gpus: str) -> Plan:
    """With its fixes."""
    inventory = parse_gpus(gpus)
    return with_fixes(make_plan([asked], inventory), [asked], inventory)


def one(asked: ModelRequest, gpus: str) -> ModelPlan:
    """The only replica, which fits."""
    plan = plan_of(asked, gpus)
    assert plan.fits, [found.message for found in plan.problems]
    return plan.models[0]


def test_both_models_are_counted_on_a_card() -> None:
    """To the byte, with terms that add up. Each token has a place in both caches, and the copy of a layer that is moved
    is that of the larger one."""
    asked = drafting(max_model_len=4096)
    alone, both = one(request(infer_backend="pt", max_model_len=4096), "40GiB"), one(asked, "40GiB")
    (rank,) = both.ranks
    assert rank.has_draft
    assert asked.draft is not None
    draft = BlockGroup(tuple(asked.draft.blocks(False)))
    assert draft.weights == pytest.approx(0.494e9 * 2, rel=0.01)
    assert rank.weights.bytes == alone.ranks[0].weights.bytes + draft.weights
    per_token = 28 * 2 * 4 * 128 * 2 + 24 * 2 * 2 * 64 * 2
    assert rank.kv_cache.bytes == both.kv_tokens * (per_token + 2 * 4 * 128 * 2)
    assert both.kv_bytes_per_request == cells(1, 4096) * (per_token + 2 * 4 * 128 * 2)
    for figure in (rank.weights, rank.kv_cache):
        assert sum(term.bytes for term in figure.terms) == figure.bytes
    assert rank.share.bytes <= 40 * GIB
    text = "\n".join(lines(both))
    for part in ("the draft model (speculative.model)", "weights of the draft model\n", "KV cache of the draft model"):
        assert part in text
    assert both.ranks[0].to_json()["has_draft"] is True
    assert "has_draft" not in alone.ranks[0].to_json()


@pytest.mark.parametrize(("name", "gpus"), [("int8", "40GiB"), ("fp8", "8GiB,13GiB")])
def test_the_drafts_cache_keeps_its_own_type_beside_one_in_8_bits(name: str, gpus: str) -> None:
    """The target's cache has a byte for each element and its scales, the draft's has two, and the one layer that is in
    the model's type while it is read is the larger one of both models."""
    asked = drafting(max_model_len=2048, max_num_seqs=4, kv_cache_dtype=name, num_gpus=len(gpus.split(",")))
    both = one(asked, gpus)
    layers = 28 * 2 * 4 * (128 + 2) + 24 * 2 * 2 * 64 * 2
    read = 2 * 4 * 128 * 2
    assert sum(rank.kv_cache.bytes for rank in both.ranks) == both.kv_tokens * (layers + len(both.ranks) * read)
    (rank,) = (rank for rank in both.ranks if rank.has_draft)
    for figure in (rank.weights, rank.kv_cache):
        assert sum(term.bytes for term in figure.terms) == figure.bytes
    text = "\n".join(lines(both))
    for part in ("keys and values in 8 bits", "their scales", "KV cache of the draft model for as many tokens"):
        assert part in text


def test_the_drafts_layers_may_be_the_largest_that_are_read() -> None:
    """Then the room for one layer grows by the difference, and the terms still add up."""
    wide = {"num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 1024}
    asked = drafting(wide, max_model_len=1024, max_num_seqs=1, kv_cache_dtype="int8")
    both = one(asked, "40GiB")
    (rank,) = both.ranks
    own = 2 * 16 * 64 * 2
    assert rank.kv_cache.bytes == both.kv_tokens * (28 * 2 * 4 * (128 + 2) + 24 * own + own)
    assert sum(term.bytes for term in rank.kv_cache.terms) == rank.kv_cache.bytes


def test_auto_chooses_the_targets_method_beside_the_draft() -> None:
    """What the draft takes decides too: with it, whole weights do not fit on a card where they fit alone."""
    fields = {"quantization": "auto", "max_model_len": 2048, "max_num_seqs": 1}
    assert one(request(infer_backend="pt", **fields), "15.75GiB").config.quantization is None
    both = one(drafting(**fields), "15.75GiB")
    assert both.config.quantization == "bnb-int8"
    assert both.ranks[0].has_draft


def test_the_drafts_weights_are_quantised_only_if_that_is_asked_for() -> None:
    """The method of the model that it drafts for says nothing of it."""

    def draft_weights(**config: Any) -> int:
        (rank,) = one(drafting(max_model_len=1024, **config), "80GiB").ranks
        (term,) = (term for term in rank.weights.terms if "draft" in term.name)
        return term.bytes

    whole = draft_weights()
    assert draft_weights(quantization="bnb-nf4") == whole
    assert draft_weights(speculative={"quantization": "bnb-nf4"}) < 0.55 * whole  # The embedding stays whole.
    assert draft_weights(speculative={"quantization": "bnb-int8"}) < 0.7 * whole


def test_what_does_not_fit_is_refused_with_the_drafts_part() -> None:
    """And the cheapest fix leaves the draft out, where the model alone fits."""
    asked = drafting(max_model_len=8192)
    large = one(asked, "40GiB")
    least = large.ranks[0].share.bytes - large.spare_kv_bytes
    card = f"{(least - 0.5 * GIB) / GIB / (1 - RESERVE_SHARE):.3f}GiB"
    (found,) = plan_of(asked, card).problems
    assert found.code == "over_commit"
    assert "Of these, the draft model takes 942.5 MiB for weights and " in found.message
    assert found.fixes[0].text == "leave out speculative"
    assert "the speed that drafts give" in found.fixes[0].effect
    assert one(request(infer_backend="pt", max_model_len=8192), card).ranks
    assert found.nearest is not None
    nearest = found.nearest()
    assert nearest is not None
    assert nearest.ranks[0].has_draft


@pytest.mark.parametrize(
    ("limits", "layers", "seat"),
    [({0: "6GB", 1: "15GB"}, 24, 0), ({0: "2.2GB", 1: "20GB"}, 48, 1), ({0: "3GB", 1: "20GB"}, 48, 0)],
)
def test_it_lies_on_the_first_card_where_both_models_fit(limits: dict[int, str], layers: int, seat: int) -> None:
    """The embedding takes 1.1 GB, and drafts of 24 and 48 layers 1 GB and 1.7 GB. So the first card may have the draft
    alone."""
    draft = {"num_hidden_layers": layers}
    model = one(drafting(draft, max_memory=limits, max_model_len=1024, max_num_seqs=4), "24GiB,24GiB")
    assert [rank.has_draft for rank in model.ranks] == [seat == 0, seat == 1]
    for rank, limit in zip(model.ranks, limits.values(), strict=True):
        assert rank.share.bytes <= float(limit.removesuffix("GB")) * GB
    held = [number for rank in model.ranks if rank.layers for number in range(rank.layers[0], rank.layers[1] + 1)]
    assert held == list(range(-1, 29))
    assert pinned(model)["infer_backend"] == "pt"


def test_a_draft_beside_layers_on_the_cpu_keeps_its_room() -> None:
    """What the cards leave over is computed on the first one, beside the draft."""
    asked = drafting(max_memory={0: "8GB", "cpu": "20GB"}, max_model_len=1024, max_num_seqs=4)
    model = one(asked, "24GiB")
    assert model.ranks[0].has_draft
    assert model.ranks[0].share.bytes <= 8 * GB
    without = one(replace(asked, config=asked.config.model_copy(update={"speculative": None})), "24GiB")
    assert model.spilled["cpu"] > without.spilled["cpu"] + 0.9 * GB


def test_it_takes_the_settings_of_the_model_that_it_drafts_for() -> None:
    """A changed type holds for both."""
    asked = drafting(max_model_len=1024)
    wide = replace(asked, config=asked.config.model_copy(update={"dtype": "float32"}))
    assert asked.drafter is not None
    assert wide.drafter is not None
    assert wide.drafter.element_bytes == 2 * asked.drafter.element_bytes
    assert replace(asked, config=asked.config.model_copy(update={"infer_backend": "vllm"})).drafter is None


def test_a_draft_that_cannot_draft_is_refused_by_name() -> None:
    """Other tokens, and a cache from which none can be taken back."""
    (found,) = plan_of(drafting({"vocab_size": 151936}), "80GiB").problems
    assert found.message == (
        "speculative.model: small has a vocabulary of 151936 tokens, and the model that it drafts for has one of "
        "152064. The two must be equal. Choose a smaller model of the same family."
    )
    asked = drafting()
    shape, tensors = request("qwen3-next").architecture, request("qwen3-next").tensors
    assert asked.draft is not None
    hybrid = replace(asked.draft, architecture=replace(shape, vocabulary=152064), tensors=tensors)
    (found,) = plan_of(replace(asked, draft=hybrid), "80GiB").problems
    assert "small cannot draft, because its cache has states" in found.message


def test_vllm_gets_the_field_but_has_no_plan() -> None:
    """As with any speculation, the plan says so instead of leaving the draft out."""
    (found,) = plan_of(drafting(infer_backend="vllm", max_model_len=1024), "80GiB").problems
    assert found.message == "speculative: the plan does not know how much memory vLLM takes for it."
    assert one(drafting(infer_backend="auto", max_model_len=1024), "80GiB").backend == "pt"
