"""What adapters take in the plan of both engines, and what is offered where they do not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.cli.plan.explain import lines, to_json
from serve_app.cli.plan.svg import plan_svg
from serve_app.cli.plan.text import ASCII, page
from serve_app.facts.adapter import AdapterFacts, AdapterModule
from serve_app.facts.engine_facts import (
    BesideLayers,
    EngineFacts,
    RankAdapters,
    VllmAdapterFacts,
    facts_from_json,
    facts_to_json,
)
from serve_app.facts.inventory import Device, Inventory
from serve_app.facts.weights import Tensor
from serve_app.planning.adapters import target_problem
from serve_app.planning.fixes import with_fixes
from serve_app.planning.memory import GIB
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.planner import make_plan
from tests.planning.model_requests import request as shaped

LAYER, WHOLE = 1000, 300
UNITS = {
    tp: RankAdapters((LAYER // tp,) * 28, WHOLE, BesideLayers(200, 0, 100)) for tp in (1, 2, 4, 8)
}  # fmt: skip
TOLD = EngineFacts(vllm_adapters=VllmAdapterFacts(UNITS), vllm_version="0.32.0")


def asked(**fields: Any) -> ModelRequest:
    """Qwen2 7B with 28 layers, of whose buffers vLLM has told."""
    room = {"max_loras": 4, "max_lora_rank": 16}
    return replace(shaped("qwen2-7b", **{"infer_backend": "vllm", **room, **fields}), engine_facts=TOLD)


def cards(*sizes: float) -> Inventory:
    """Idle cards of so many GiB."""
    return Inventory(
        tuple(Device("n1", number, "card", int(size * GIB), int(size * GIB)) for number, size in enumerate(sizes))
    )


def test_vllms_buffers_are_a_term_of_each_rank() -> None:
    """They are exact where vLLM has told of them, and all that they take is missing from the KV cache, with a second
    set of CUDA graphs."""
    for tp in (1, 2):
        plan = make_plan([asked(tensor_parallel_size=tp)], cards(*[40] * tp)).models[0]
        without = make_plan([shaped("qwen2-7b", infer_backend="vllm", tensor_parallel_size=tp)], cards(*[40] * tp))
        size = 4 * 16 * (28 * (LAYER // tp) + WHOLE)
        for rank, plain in zip(plan.ranks, without.models[0].ranks, strict=True):
            assert (rank.adapters.bytes, rank.adapters.certainty) == (size, "exact")
            assert rank.weights == plain.weights
            assert rank.graph.bytes == 2 * plain.graph.bytes  # vLLM captures them without and with adapters.
            assert plain.kv_cache.bytes - rank.kv_cache.bytes == size + plain.graph.bytes
            assert rank.share.bytes == plain.share.bytes
        # Each rank keeps five whole adapters: as many as a batch may have, and none is named.
        assert plan.host_adapters.bytes == tp * 4 * 16 * (28 * LAYER + WHOLE)


def test_stages_have_the_buffers_of_their_layers() -> None:
    """The first one those of the embedding, and the last one those of the head."""
    request = asked(pipeline_layers=[10, 18])
    (plan,) = make_plan([request], cards(40, 40)).models
    plain = replace(shaped("qwen2-7b", infer_backend="vllm", pipeline_layers=[10, 18]))
    (without,) = make_plan([plain], cards(40, 40)).models
    assert [rank.adapters.bytes for rank in plan.ranks] == [64 * (10 * LAYER + 200), 64 * (18 * LAYER + 100)]
    assert [rank.weights.bytes for rank in plan.ranks] == [rank.weights.bytes for rank in without.ranks]
    assert max(rank.share.bytes for rank in plan.ranks) <= 40 * GIB


def test_without_vllms_word_it_is_a_guess() -> None:
    """Near what vLLM says: two factors for each projection, of rank 16, for four adapters, in bfloat16."""
    guess = make_plan([replace(asked(), engine_facts=EngineFacts())], cards(40)).models[0].ranks[0].adapters
    hidden, ffn, kv = 3584, 18944, 512
    layer = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + ffn)
    exact = 4 * 16 * 2 * (28 * layer + 2 * (152064 + hidden))
    assert guess.certainty == "guessed"
    assert exact < guess.bytes < 1.12 * exact


def test_vllms_refusal_is_told() -> None:
    """With its reason."""
    told = VllmAdapterFacts({}, {1: "X does not support LoRA yet."})
    plan = make_plan([replace(asked(), engine_facts=EngineFacts(vllm_adapters=told))], cards(40))
    assert "adapters: vLLM takes none for this model: X does not support LoRA yet." in plan.problems[0].message


def test_the_cpu_has_the_kept_adapters_too() -> None:
    """They are in the same memory as the buffers."""
    host = Inventory((Device("n1", None, "memory", 64 * GIB, 60 * GIB),))
    (rank,) = make_plan([asked(device="cpu", max_cpu_loras=9, max_model_len=4096)], host).models[0].ranks
    assert [term.name for term in rank.adapters.terms] == ["buffers for adapters", "adapters in the host's memory"]
    assert rank.adapters.bytes == (4 + 9) * 16 * (28 * LAYER + WHOLE)


def adapter(rank: int = 8, **modules: AdapterModule) -> AdapterFacts:
    """A plain adapter with these modules."""
    return AdapterFacts(
        Path("/some/adapter"), "LORA", rank, 16, False, False, False, "none", False, (), (), (), "", modules
    )  # fmt: skip


def test_the_plan_refuses_buffers_of_a_size_that_it_does_not_know() -> None:
    """Of packed weights of which nothing tells the shape of their module. It counts those that an adapter tells."""
    name = "model.layers.0.self_attn.q_proj"
    request = asked(infer_backend="pt", lora_target_modules=["q_proj"], max_model_len=4096)
    tensors = tuple(tensor for tensor in request.tensors if not tensor.name.endswith("q_proj.weight"))
    request = replace(request, tensors=(*tensors, Tensor(f"{name}.weight", "U8", (3584, 1792))))
    (problem,) = make_plan([request], cards(24)).problems
    assert f"pt's buffers for {name}" in problem.message
    told = replace(request, adapters=(adapter(**{name: AdapterModule(8, 3584, 3584)}),))
    (plan,) = make_plan([told], cards(24)).models
    assert plan.ranks[0].adapters.bytes == 4 * 16 * 2 * 3584 * 2


def test_pts_buffers_are_where_their_layers_are() -> None:
    """For the modules that the known adapters change, in the layers of each device."""
    changed = {f"model.layers.{layer}.self_attn.q_proj": AdapterModule(8, 3584, 3584) for layer in range(28)}
    request = replace(asked(infer_backend="pt", max_memory={0: "10GB", 1: "12GB"}), adapters=(adapter(**changed),))
    (plan,) = make_plan([request], cards(24, 24)).models
    each = 4 * 16 * 2 * 3584 * 2
    counts = [min(rank.layers[1], 27) - max(rank.layers[0], 0) + 1 for rank in plan.ranks if rank.layers]
    assert sum(counts) == 28
    assert [rank.adapters.bytes for rank in plan.ranks] == [count * each for count in counts]
    for rank, limit in zip(plan.ranks, (10e9, 12e9), strict=True):
        assert rank.share.bytes <= limit
    # One is named, so as many are kept as a batch may have.
    assert plan.host_adapters.bytes == 28 * each


def test_layers_on_the_cpu_have_their_buffers_where_they_are_computed() -> None:
    """On the first card, whose limit they keep to."""
    changed = {f"model.layers.{layer}.mlp.down_proj": AdapterModule(8, 18944, 3584) for layer in range(28)}
    request = replace(
        asked(infer_backend="pt", max_memory={0: "8GB", "cpu": "20GB"}, max_model_len=2048),
        adapters=(adapter(**changed),),
    )
    host = Device("n1", None, "memory", 64 * GIB, 60 * GIB)
    inventory = Inventory((*cards(24).devices, host))
    (plan,) = make_plan([request], inventory).models
    assert plan.spilled
    assert plan.ranks[0].adapters.bytes == 28 * 4 * 16 * (18944 + 3584) * 2
    assert plan.ranks[0].share.bytes <= 8e9


def test_fewer_adapters_and_smaller_ones_are_offered() -> None:
    """As few less as will do, and no rank below that of a known adapter."""
    large = {tp: RankAdapters((40 * 2**20,) * 28, 0, None) for tp in (1, 2, 4, 8)}
    told = EngineFacts(vllm_adapters=VllmAdapterFacts(large), vllm_version="0.32.0")
    request = replace(asked(max_model_len=4096), engine_facts=told, adapters=(adapter(rank=8),))
    inventory = cards(40)
    plan = with_fixes(make_plan([request], inventory), [request], inventory)
    assert not plan.fits
    offered = {fix.text: fix for problem in plan.problems for fix in problem.fixes}
    assert "max_lora_rank: 8" not in offered, "half of it is 35 GiB, which is too much beside the weights"
    assert "max_loras: 1" in offered
    assert "3 of 4 different adapters at once" in offered["max_loras: 1"].effect


def test_pages_show_adapters_only_where_there_are_some() -> None:
    """In the table, the picture, the explanation and JSON."""
    inventory = cards(40)
    plan, plain = make_plan([asked()], inventory), make_plan([shaped("qwen2-7b", infer_backend="vllm")], inventory)
    shown, hidden = ("\n".join(line.plain for line in page(each, 120, ASCII)) for each in (plan, plain))
    assert "adapters" in shown
    assert "adapters" not in hidden
    assert "adapters" in plan_svg(plan)
    (model,) = plan.models
    text = "\n".join(lines(model))
    assert "buffers for adapters = max_loras (4) × max_lora_rank (16) × bytes of a rank (28,300)" in text
    assert "Up to 4 adapters are kept, which take up to 1.7 MiB of the host's memory." in text
    assert "adapters" not in "\n".join(lines(plain.models[0]))
    told = to_json(model)
    assert told["ranks"][0]["adapters_bytes"] == 64 * 28_300
    assert told["host_adapters_bytes"] == 64 * 28_300


def test_what_vllm_tells_is_kept() -> None:
    """As JSON and back."""
    facts = VllmAdapterFacts({1: UNITS[1], 2: RankAdapters((3,), 4)}, {3: "the heads cannot be split"})
    assert facts_from_json("vllm", facts_to_json(facts)) == facts


@pytest.mark.parametrize(
    ("wanted", "is_fine"), [(None, True), (("q_proj",), True), (("self_attn.q_proj",), True), (("v_proj",), False)]
)
def test_a_module_that_adapters_may_not_change_is_told(wanted: tuple[str, ...] | None, is_fine: bool) -> None:
    """vLLM would leave it out without a word."""
    problem = target_problem(adapter(**{"model.layers.0.self_attn.q_proj": AdapterModule(8, 4, 4)}), wanted)
    assert (problem is None) == is_fine
    assert is_fine or "Add q_proj to it" in str(problem)
