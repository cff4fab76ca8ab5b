"""vLLM's stages in a plan: every figure counted again, limits, places, order, choices and what is refused."""

from dataclasses import replace
from time import process_time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.cli.plan import explain
from serve_app.cli.plan.chart import chart_of
from serve_app.config import ModelConfig
from serve_app.facts.calibration import Calibration, setting_key
from serve_app.facts.engine_facts import EngineFacts, RankFacts, VllmFacts
from serve_app.facts.inventory import Device, Inventory, parse_gpus
from serve_app.planning import fit_stages, memory, terms
from serve_app.planning.calibration_setting import calibration_setting
from serve_app.planning.fixes import with_fixes
from serve_app.planning.kv_groups import bytes_per_block, cache_groups, kv_bytes_per_request
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import ModelPlan, Plan
from serve_app.planning.planner import STAGED_PLACEMENTS, make_plan
from serve_app.planning.resolve import pinned, resolve, vllm_memory
from serve_app.planning.vllm_blocks import kv_blocks
from tests.planning.model_requests import request

GIB = 2**30
SHAPES = ("qwen2-7b", "llama-3.1-8b", "gemma3", "qwen3-30b-a3b", "deepseek-v2-lite", "qwen3-next")


def staged(shape: str = "qwen2-7b", **config: Any) -> ModelRequest:
    """A model for vLLM."""
    return request(shape, **{"infer_backend": "vllm", "max_model_len": 4096, **config})


def planned(asked: ModelRequest, gpus: str, by_index: bool | None = None) -> Plan:
    """The plan of one model, with its fixes."""
    inventory = replace(parse_gpus(gpus), calibrations={})
    devices = tuple(replace(device, by_index=by_index) for device in inventory.devices)
    inventory = replace(inventory, devices=devices)
    return with_fixes(make_plan([asked], inventory), [asked], inventory)


def only(asked: ModelRequest, gpus: str, by_index: bool | None = None) -> ModelPlan:
    """The plan of one replica that fits."""
    plan = planned(asked, gpus, by_index)
    assert plan.fits, plan.problems
    return plan.models[0]


def recount(asked: ModelRequest, model: ModelPlan) -> None:
    """Counts each rank's bytes again from the facts of each layer, and the blocks that all ranks can have."""
    config, tp, stages = asked.config, model.tensor_parallel_size, len(model.pipeline_layers)
    facts = asked.rank_facts(tp)
    groups = cache_groups(facts.cache, facts.packs_blocks)
    in_flight = replace(facts, steps=facts.steps - 1 + stages)
    cards = [rank.device for rank in model.ranks]
    batched, rows = (
        min(pair) for pair in zip(*(memory.vllm_defaults(c.total_bytes, c.name) for c in cards), strict=True)
    )
    rows = config.max_num_seqs or rows
    per_request = kv_bytes_per_request(in_flight, asked.max_model_len, batched) // bytes_per_block(
        groups, facts.packs_blocks
    )
    assert sum(model.pipeline_layers) == len(facts.layers)
    assert len(model.ranks) == tp * stages
    shape, start, made, widest = asked.architecture, 0, set(), 0
    for number, count in enumerate(model.pipeline_layers):
        is_first, is_last = number == 0, number == stages - 1
        mine = range(start, start + count)
        start += count
        block = max(
            sum(-(-each.page_bytes // each.alignment) * each.alignment for each in group if each.layer in mine)
            for group in groups
        )
        widest = max(widest, block)
        beside = facts.before + facts.after if facts.beside is None else facts.beside.at(is_first, is_last)
        size = (shape.hidden_size, shape.intermediate_size, shape.vocabulary if is_last else 0)
        activation = terms.total(terms.vllm_activation(*size, tp, 2, rows, batched))
        activation += 0 if is_first else 2 * batched * shape.hidden_size * 2
        graphs = (256 + 10 * count) * 2**20
        for rank in model.ranks[number * tp : (number + 1) * tp]:
            assert rank.layers == (mine[0] - is_first, mine[-1] + is_last)
            assert rank.weights.bytes == sum(facts.layers[layer] for layer in mine) + beside
            assert rank.kv_cache.bytes % block == 0
            assert rank.activation.bytes == pytest.approx(1.1 * activation + facts.buffers, abs=4)
            assert rank.graph.bytes == pytest.approx(1.1 * graphs, abs=4)
            assert rank.context.bytes == memory.context("cuda", tp * stages).bytes
            made.add(rank.kv_cache.bytes // block)
    (blocks,) = made
    assert per_request + 1 <= blocks <= per_request * rows + 1
    assert model.kv_tokens == (blocks - 1) * asked.max_model_len // per_request
    assert model.max_full_length_requests == (blocks - 1) // per_request
    assert model.kv_bytes_per_request == per_request * widest
    assert kv_blocks(model) == (blocks if model.knows_blocks else None)


CARD = st.sampled_from(["6GiB", "8GiB", "12GiB", "16GiB", "24GiB", "48GiB", "A10", "RTX3090", "L4"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    shape=st.sampled_from(SHAPES),
    cards=st.lists(CARD, min_size=2, max_size=4),
    doubled=st.booleans(),
    by_index=st.booleans(),
    caps=st.lists(st.integers(4, 30), min_size=4, max_size=4) | st.none(),
    rows=st.sampled_from([None, 8, 64]),
)
def test_every_planned_figure_is_counted_again(
    shape: str, cards: list[str], doubled: bool, by_index: bool, caps: list[int] | None, rows: int | None
) -> None:
    """By index and whole, with limits and without, with tensor parallelism and without: and no card gives more than it
    has or than its limit."""
    tp = 2 if doubled else 1
    gpus = ",".join(card for card in cards for _ in range(tp))
    count = len(cards) * tp
    config: dict[str, Any] = {"tensor_parallel_size": tp} if doubled else {}
    config |= {"max_num_seqs": rows} if rows else {}
    if caps is None:
        config |= {"pipeline_parallel_size": len(cards)}
        limits = [2**60] * count
    else:
        limits = [caps[place // tp] * 10**9 for place in range(count)]
        config |= {"max_memory": {place: f"{limit // 10**9}GB" for place, limit in enumerate(limits)}}
    asked = staged(shape, **config)
    plan = planned(asked, gpus, by_index)
    for device in plan.devices:
        assert plan.planned(device) <= device.free_bytes - memory.reserve(device.total_bytes)
    for model in plan.models:
        recount(asked, model)
        assert len({rank.device.id for rank in model.ranks}) == count
        for stage in range(len(cards)):
            assert len({(r.device.name, r.device.total_bytes) for r in model.ranks[stage * tp : (stage + 1) * tp]}) == 1
        assert all(rank.share.bytes <= limits[rank.device.index or 0] for rank in model.ranks)
        told = vllm_memory(model)
        assert told["kv_cache_memory_bytes"] == max(rank.kv_cache.bytes for rank in model.ranks)
        gate = told["engine_args"]["gpu_memory_utilization"]
        assert all(gate * rank.device.total_bytes <= rank.share.bytes for rank in model.ranks)


def test_the_founding_command_is_refused_with_figures_or_served() -> None:
    """7B in 16 bits is more than 3 and 10 GB; in 8 bits and without CUDA graphs it fits into them."""
    limits = {0: "3GB", 1: "10GB"}
    (found,) = planned(staged(max_memory=limits), "4GiB,24GiB").problems
    assert found.code == "over_commit"
    start = "vllm with pipeline_parallel_size 2: for one request of 4096 tokens, stage 1 of 2 on n1:0 (layers 0 to "
    assert found.message.startswith(start)
    bounds = "max_memory allows 2.79 GiB of n1:0 and 9.31 GiB of n1:1, context and activations included."
    assert found.message.endswith(bounds)
    # With 3 GB, a stage has room for the embedding or the head and for no layer.
    assert found.fixes[0].text == "max_memory: {0: 3.5GB, 1: 16GB}"
    assert only(staged(max_memory={0: "3.5GB", 1: "16GB"}), "4GiB,24GiB").pipeline_layers == (27, 1)
    in_8_bits = staged(max_memory=limits, quantization="fp8", engine_args={"enforce_eager": True})
    small = only(in_8_bits, "4GiB,24GiB")
    assert (small.pipeline_layers, small.max_full_length_requests) == ((27, 1), 3)
    assert all(rank.share.bytes <= (3e9, 10e9)[rank.device.index or 0] for rank in small.ranks)
    assert {rank.weights.certainty for rank in small.ranks} == {"guessed"}


def test_mixed_cards_make_stages_of_equal_ones() -> None:
    """24 + 24 + 16 + 16 with tensor_parallel_size 2 are two stages of two, wherever the cards are on the node."""
    model = only(staged(tensor_parallel_size=2, pipeline_parallel_size=2), "24GiB,16GiB,24GiB,16GiB")
    pairs = [sorted(rank.device.index or 0 for rank in model.ranks[place : place + 2]) for place in (0, 2)]
    assert sorted(pairs) == [[0, 2], [1, 3]]
    (found,) = planned(staged(tensor_parallel_size=2, pipeline_parallel_size=2), "24GiB,24GiB,16GiB,12GiB").problems
    assert "no node has 2 times 2 equal GPUs" in found.message
    limits = dict.fromkeys(range(4), "11GB")
    (found,) = planned(staged(tensor_parallel_size=2, max_memory=limits), "24GiB,24GiB,16GiB,12GiB").problems
    assert "must be equal" in found.message
    assert "pipeline_parallel_size: 4" in found.message


def test_a_pipeline_is_on_one_node() -> None:
    """More than one node for a replica is refused with that."""
    (found,) = planned(staged(pipeline_parallel_size=2), "12GiB;12GiB").problems
    assert "Set nnodes to have stages on several nodes." in found.message


@pytest.mark.parametrize(
    ("layers", "words"),
    [([20, 9], "28 together"), ([10, 10], "28 together"), ([14, 14], None), ([27, 1], None)],
)
def test_explicit_layers_are_kept_or_refused(layers: list[int], words: str | None) -> None:
    """With their order of cards if they have names, and otherwise on the cards in the order that holds most."""
    plan = planned(staged(pipeline_layers=layers), "24GiB,24GiB")
    if words is not None:
        assert words in plan.problems[0].message
        return
    assert plan.models[0].pipeline_layers == tuple(layers)
    recount(staged(pipeline_layers=layers), plan.models[0])


def test_the_order_of_named_cards_is_that_of_the_stages() -> None:
    """And cards without names are put where their layers fit."""
    named = only(staged(pipeline_layers=[22, 6], gpu_ids=[1, 0]), "8GiB,24GiB", by_index=True)
    assert [rank.device.index for rank in named.ranks] == [1, 0]
    limited = only(staged(pipeline_layers=[22, 6], max_memory={1: "20GB", 0: "8GB"}), "10GiB,24GiB", by_index=True)
    assert [rank.device.index for rank in limited.ranks] == [1, 0]
    assert not planned(staged(pipeline_layers=[22, 6], gpu_ids=[0, 1]), "8GiB,24GiB", by_index=True).fits
    free = only(staged(pipeline_layers=[22, 6]), "8GiB,24GiB")
    assert [rank.device.index for rank in free.ranks] == [1, 0]


def test_auto_takes_one_card_then_equal_ones_then_stages_then_pt() -> None:
    """Each only where the one before does not do, and the reasons say so."""
    found = []
    for gpus, more in (("24GiB,16GiB", {}), ("2x12GiB,8GiB", {}), ("12GiB,8GiB", {}), ("10GiB,8GiB", {})):
        model = only(request(infer_backend="auto", max_model_len=4096, **more), gpus)
        found.append((model.backend, model.tensor_parallel_size, model.pipeline_parallel_size))
    assert found == [("vllm", 1, 1), ("vllm", 2, 1), ("vllm", 1, 2), ("pt", 1, 1)]
    staged_model = only(request(infer_backend="auto", max_model_len=4096), "12GiB,8GiB")
    assert "2 stages on one GPU each" in "; ".join(staged_model.reasons)
    assert "holds more KV cache" in "; ".join(staged_model.reasons)
    pt = only(request(infer_backend="auto", max_model_len=4096), "10GiB,8GiB")
    assert "vLLM's stages cannot" in "; ".join(pt.reasons)


def test_auto_keeps_vllm_within_limits_where_it_fits_and_says_why_not_elsewhere() -> None:
    """`max_memory` alone does not decide: vLLM has a stage on each GPU that it names, or a part of the one GPU."""

    def chosen(gpus: str, limits: dict[int | str, str], **more: Any) -> ModelPlan:
        return only(request(infer_backend="auto", max_model_len=4096, max_memory=limits, **more), gpus, by_index=True)

    two = chosen("2x16GiB", {0: "12GB", 1: "12GB"})
    assert (two.backend, two.pipeline_layers) == ("vllm", (14, 14))
    assert "2 stages on the GPUs that max_memory names keep to its limits" in "; ".join(two.reasons)
    assert all(rank.share.bytes <= 12 * 10**9 for rank in two.ranks)
    one = chosen("24GiB", {0: "20GB"})
    assert (one.backend, one.ranks[0].share.bytes <= 20 * 10**9) == ("vllm", True)
    tight = chosen("8GiB,12GiB", {0: "7.5GB", 1: "10GB"})
    assert tight.backend == "pt"
    assert "vLLM cannot hold the model within its limits; vLLM lacks at least " in "; ".join(tight.reasons)
    spilled = chosen("12GiB", {0: "8GB", "cpu": "20GB"})
    assert (spilled.backend, spilled.reasons) == ("pt", ("max_memory names cpu, where only pt keeps layers",))
    assert chosen("24GiB", {0: "20GB"}, step_timeout_s=9).backend == "pt"


def test_auto_within_limits_takes_vllm_beside_another_model_on_the_card() -> None:
    """The limit bounds it, so it does not need the card for itself."""
    models = [request(name=name, max_model_len=1024, max_memory={0: "19GB"}) for name in "mn"]
    made = make_plan(models, parse_gpus("48GiB"))
    assert [model.backend for model in made.models] == ["vllm", "vllm"]


def test_auto_with_a_field_of_vllm_for_a_model_that_the_plan_does_not_know_is_a_problem() -> None:
    """It was a KeyError."""
    (found,) = planned(request("gpt-oss-20b", infer_backend="auto", engine_args={"seed": 1}), "24GiB").problems
    assert found.code == "facts_missing"


def test_what_a_start_is_given_makes_the_same_plan() -> None:
    """By index the cards are named in the order of the stages, with their layers and bytes, and a new plan of that
    config is the same."""
    asked = staged(pipeline_parallel_size=3)
    model = only(asked, "8GiB,24GiB,12GiB", by_index=True)
    fields = pinned(model)
    assert fields["gpu_ids"] == [rank.device.index for rank in model.ranks]
    assert fields["pipeline_layers"] == list(model.pipeline_layers)
    again = only(replace(asked, config=ModelConfig.from_args({"model": "x", **fields})), "8GiB,24GiB,12GiB", True)
    assert [(r.device.id, r.weights.bytes, r.kv_cache.bytes) for r in again.ranks] == [
        (r.device.id, r.weights.bytes, r.kv_cache.bytes) for r in model.ranks
    ]
    limited = staged(max_memory={0: "7GB", 1: "20GB"})
    of_limits = only(limited, "8GiB,24GiB", by_index=True)
    with_limits = ModelConfig.from_args(
        {"model": "x", **limited.config.model_dump(include={"infer_backend"}), **pinned(of_limits)}
    )
    assert list(with_limits.named_gpus) == [rank.device.index for rank in of_limits.ranks]
    assert only(replace(limited, config=with_limits), "8GiB,24GiB", True).pipeline_layers == of_limits.pipeline_layers


def test_a_replica_asks_for_all_its_cards() -> None:
    """Whole GPUs as many as ranks; by index each share, or the limits as they are."""
    whole = resolve(staged(pipeline_parallel_size=2, tensor_parallel_size=2), parse_gpus("2x24GiB,2x16GiB"))
    assert (whole.demand.gpus, whole.config.pipeline_layers) == (4.0, None)
    devices = parse_gpus("24GiB,8GiB").devices
    by_index = Inventory(tuple(replace(device, by_index=True) for device in devices))
    shares = resolve(staged(pipeline_parallel_size=2), by_index)
    assert set(shares.demand.vram_gib) == {0, 1}
    assert sum(shares.config.pipeline_layers or ()) == 28
    limits = resolve(staged(max_memory={0: "20GB", 1: "7GB"}), by_index)
    assert limits.demand.vram_gib == {0: 20e9 / GIB, 1: 7e9 / GIB}
    whole_gpus = Inventory(tuple(replace(device, by_index=False) for device in parse_gpus("80GiB").devices))
    one = resolve(staged("gemma3", max_memory={0: "15GB"}), whole_gpus)
    assert 0.17 < one.demand.gpus < 0.18


def test_vllm_is_told_the_batch_where_cards_differ_in_their_defaults() -> None:
    """It would take the defaults of its first rank's card, whose activations the others have no room for."""
    told = vllm_memory(only(staged(pipeline_parallel_size=2), "24GiB,80GiB"))
    assert (told["max_num_seqs"], told["engine_args"]["max_num_batched_tokens"]) == (256, 2048)
    assert "max_num_seqs" not in vllm_memory(only(staged(pipeline_parallel_size=2), "24GiB,16GiB"))


def test_bytes_of_kv_cache_that_are_set_hold_for_every_rank() -> None:
    """vLLM gives each rank those bytes, so the widest stage decides how many blocks there are."""
    model = only(staged(pipeline_parallel_size=2, kv_cache_memory_bytes="1GiB"), "8GiB,24GiB")
    widest = max(rank.kv_cache.bytes for rank in model.ranks)
    assert GIB - model.kv_block_bytes < widest <= GIB
    assert kv_blocks(model) == GIB // model.kv_block_bytes
    (small,) = planned(staged(pipeline_parallel_size=2, kv_cache_memory_bytes="64MiB"), "8GiB,24GiB").problems
    assert small.code == "small_cache"
    (large,) = planned(staged(pipeline_parallel_size=2, kv_cache_memory_bytes="20GiB"), "8GiB,24GiB").problems
    assert large.code == "over_commit"


def test_what_vllm_does_not_split_is_refused_with_its_reason() -> None:
    """An architecture without pipeline support, and more stages than layers."""
    layers = tuple([GIB] * 4)
    facts = RankFacts(layers, GIB, GIB, 0, (), no_stages="NotImplementedError: no pipeline")
    asked = staged("gemma-3-27b-it", pipeline_parallel_size=2)
    asked = replace(asked, engine_facts=EngineFacts(vllm=VllmFacts({1: facts})))
    (found,) = planned(asked, "2x24GiB").problems
    assert (found.code, found.fixes[0].text) == ("no_stages", "leave out pipeline_parallel_size")
    assert "NotImplementedError: no pipeline" in found.message
    (many,) = planned(staged(pipeline_parallel_size=29), "29x24GiB").problems
    assert "29 stages need a layer each, and the model has 28" in many.message


def test_several_ranks_on_the_cpu_share_its_memory() -> None:
    """Each has its part of the layers and its own KV cache."""
    host = Inventory((Device("n1", None, "memory", 64 * GIB, 64 * GIB),))
    asked = staged(device="cpu", pipeline_layers=[10, 18])
    (model,) = make_plan([asked], host).models
    assert [rank.layers for rank in model.ranks] == [(-1, 9), (10, 28)]
    assert max(rank.kv_cache.bytes for rank in model.ranks) <= GIB
    both = staged(device="cpu", tensor_parallel_size=2)
    assert len(make_plan([both], host).models[0].ranks) == 2
    tight = Inventory((Device("n1", None, "memory", 16 * GIB, 16 * GIB),))
    assert not make_plan([asked], tight).fits


@pytest.mark.parametrize(
    ("fields", "buffers"),
    [
        ({}, 0),
        ({"tensor_parallel_size": 2}, 2),
        ({"pipeline_layers": [10, 8, 10]}, 3),
        ({"pipeline_layers": [10, 18], "tensor_parallel_size": 2, "num_cpus": 9}, 8),
    ],
)
def test_ranks_on_the_cpu_map_the_buffers_of_their_groups(fields: dict[str, Any], buffers: int) -> None:
    """4 MiB for each thread of each rank of a group, and a rank of both kinds is in two groups of two."""
    host = Inventory((Device("n1", None, "memory", 64 * GIB, 64 * GIB),))

    def context(**asked: Any) -> set[int]:
        (model,) = make_plan([staged(device="cpu", **asked)], host).models
        return {rank.context.bytes for rank in model.ranks}

    (alone,), (found,) = context(), context(**fields)
    assert found - alone == pytest.approx(1.1 * buffers * 4 * 2**20, abs=2)


def test_measured_figures_of_a_stage_count_for_that_stage() -> None:
    """Those of tensor parallelism over as many cards do not."""
    asked, cards = staged(pipeline_parallel_size=2), parse_gpus("24GiB,16GiB")

    def with_measured(stages: int) -> ModelPlan:
        setting = calibration_setting(asked.config, asked.architecture, 4096, "", cards.gpus[0], 1, 2, stages)
        measured = {setting_key(setting): Calibration(setting, 3 * GIB)}
        return make_plan([asked], Inventory(cards.devices, measured)).models[0]

    plain = make_plan([asked], Inventory(cards.devices)).models[0]
    assert with_measured(1) == plain
    on_first = next(rank for rank in with_measured(2).ranks if rank.device.index == 0)
    assert on_first.seat == (0, 2) or on_first.activation.bytes == 3 * GIB


def test_what_is_asked_for_at_once_must_fit() -> None:
    """More than the stages hold is a problem with figures."""
    from serve_app.planning.model_request import AtOnce

    asked = replace(staged(pipeline_parallel_size=2), at_once=AtOnce(8, 4096))
    assert only(asked, "8GiB,24GiB").max_full_length_requests >= 8
    (found,) = planned(replace(asked, at_once=AtOnce(200, 4096)), "8GiB,24GiB").problems
    assert "200 requests of 4096 tokens at once" in found.message
    assert found.missing_bytes > 0


def test_stages_are_shown_as_layers_are() -> None:
    """In the reasons and the JSON, with one line for the cards of a stage, and explained one stage after the other."""
    asked = staged(pipeline_layers=[18, 10], tensor_parallel_size=2, gpu_ids=[0, 1, 2, 3])
    plan = planned(asked, "2x24GiB,2x16GiB", by_index=True)
    (model,), (note,) = plan.models, chart_of(plan).models
    assert note.title.startswith("m: vllm, tensor_parallel_size 2, pipeline_parallel_size 2 on n1:0 to n1:3")
    first, last = model.pipeline_layers
    assert f"n1:0, n1:1: embedding, layers 0 to {first - 1}" in note.lines
    assert f"n1:2, n1:3: layers {first} to {first + last - 1}, norm and head" in note.lines
    plain = model.to_json()
    assert (plain["pipeline_parallel_size"], plain["pipeline_layers"]) == (2, [first, last])
    assert [rank["layers"] for rank in plain["ranks"]] == [[-1, first - 1]] * 2 + [[first, 28]] * 2
    explained = [line for line in explain.lines(model) if line.startswith("n1:")]
    assert [line.partition(": ")[0] for line in explained] == ["n1:0, n1:1", "n1:2, n1:3"]


@pytest.mark.parametrize("gpus", ["A100-40GB,T4", "T4,A100-40GB", "H100-80GB,A100-80GB", "A100-40GB,H100-80GB,T4"])
def test_the_oldest_card_is_the_first_stage(gpus: str) -> None:
    """Its capability is the one by which vLLM chooses for all stages, and the one of the plan's facts."""
    names = gpus.split(",")
    oldest = next(name for name in ("T4", "A100-80GB", "A100-40GB") if name in names)
    model = only(staged(pipeline_parallel_size=len(names)), gpus)
    recount(staged(pipeline_parallel_size=len(names)), model)
    assert model.ranks[0].device.index == names.index(oldest)
    assert any(f"n1:{names.index(oldest)}, first, by which vLLM chooses" in reason for reason in model.reasons)
    layers = [20, *[8 // (len(names) - 1)] * (len(names) - 1)]
    assert only(staged(pipeline_layers=layers), gpus).ranks[0].device.index == names.index(oldest)


def test_cards_of_one_or_no_known_capability_have_any_order() -> None:
    """The larger card is the first stage if that holds more, and no reason speaks of age."""
    for gpus in ("RTX4090,L4", "24GiB,16GiB"):
        model = only(staged(pipeline_parallel_size=2), gpus)
        assert not any("oldest" in reason for reason in model.reasons)


def test_an_order_of_the_config_that_has_a_newer_card_first_is_refused_with_the_reason() -> None:
    """The order of `gpu_ids` with `pipeline_layers` is the user's."""
    fields = {"pipeline_layers": [20, 8]}
    (problem,) = planned(staged(gpu_ids=[0, 1], **fields), "A100-40GB,T4", by_index=True).problems
    assert "the first stage would be on n1:0" in problem.message
    assert "Put n1:1 first" in problem.message
    model = only(staged(gpu_ids=[1, 0], **fields), "A100-40GB,T4", by_index=True)
    assert [rank.device.index for rank in model.ranks] == [1, 0]


@pytest.mark.parametrize("layers", [[29], [28, 1], [14, 15]])
@pytest.mark.parametrize("backend", ["auto", "vllm"])
def test_layers_that_are_not_the_models_are_refused_in_words(layers: list[int], backend: str) -> None:
    """One number is a pipeline of one stage."""
    asked = staged(infer_backend=backend, pipeline_layers=layers)
    (problem,) = planned(asked, "2x24GiB").problems
    assert "29 layers together, and must have the model's 28 together" in problem.message
    assert only(staged(infer_backend=backend, pipeline_layers=[28]), "2x24GiB").pipeline_layers == (28,)


def nodes_of(*sizes: int) -> str:
    """Nodes with a GPU of so many GiB each."""
    return ";".join(f"{size}GiB" for size in sizes)


def test_equal_nodes_have_one_order_and_few_unequal_ones_have_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each order is a pipeline that is solved."""
    solved: list[object] = []
    solve = fit_stages.solve
    monkeypatch.setattr(fit_stages, "solve", lambda *args, **more: (solved.append(args), solve(*args, **more))[1])
    equal = only(staged("llama-3-70b", nnodes=5, pipeline_parallel_size=5), nodes_of(48, 48, 48, 48, 48))
    assert len(solved) == 1
    assert "in this order" not in " ".join(equal.reasons)
    solved.clear()
    mixed = only(staged("llama-3-70b", nnodes=4, pipeline_parallel_size=4), nodes_of(40, 48, 64, 80))
    assert len(solved) == 24
    assert "in this order" not in " ".join(mixed.reasons)
    many = only(staged("llama-3-70b", nnodes=5, pipeline_parallel_size=5), nodes_of(24, 32, 40, 48, 64))
    assert "holds more KV cache on these cards in this order" in " ".join(many.reasons)


def test_the_search_over_unequal_nodes_is_bounded() -> None:
    """The orders of nodes count as placements, so that the budget of the search bounds them."""
    asked = staged("llama-3-70b", nnodes=8, pipeline_parallel_size=8, max_model_len=8192)
    inventory = replace(parse_gpus(nodes_of(6, 8, 9, 10, 11, 12, 14, 16)), calibrations={})
    plan = make_plan([asked], inventory)
    assert plan.problems
    assert plan.placements > 24 * STAGED_PLACEMENTS
    started = process_time()
    with_fixes(plan, [asked], inventory)
    assert process_time() - started < 20


def test_a_model_on_the_cpu_asks_for_the_memory_of_a_host_after_its_layers_are_right() -> None:
    """An inventory of GPUs alone has no host memory."""
    (wrong,) = planned(staged(device="cpu", pipeline_layers=[20, 9]), "24GiB").problems
    assert "must have the model's 28 together" in wrong.message
    (right,) = planned(staged(device="cpu", pipeline_layers=[20, 8]), "24GiB").problems
    assert "Use --inventory with memory: for a node, or leave --gpus out" in right.message


@pytest.mark.parametrize("backend", ["auto", "vllm"])
def test_layers_that_do_not_fit_are_left_out(backend: str) -> None:
    """The plan finds others for as many stages, which loses nothing."""
    for layers in ([14, 14], [20, 9]):
        (problem,) = planned(staged(infer_backend=backend, pipeline_layers=layers), "8GiB,16GiB").problems
        fix = problem.fixes[0]
        assert fix.text == "pipeline_parallel_size: 2, without pipeline_layers"
        solved = only(staged(pipeline_parallel_size=2), "8GiB,16GiB")
        parts = " + ".join(map(str, solved.pipeline_layers))
        assert f"stages of {parts} layers and {solved.max_full_length_requests} requests" in fix.gains
        assert fix.loses == ""
    both = staged(infer_backend=backend, pipeline_layers=[14, 14], pipeline_parallel_size=2)
    assert planned(both, "8GiB,16GiB").problems[0].fixes[0].text == "leave out pipeline_layers"


def test_the_number_of_nodes_is_corrected_by_one() -> None:
    """Where the stages fit on one node less, or need one more."""
    fewer = planned(staged("llama-3-70b", nnodes=3, pipeline_parallel_size=3), "48GiB,48GiB,48GiB;80GiB")
    assert [fix.text for fix in fewer.problems[0].fixes][:1] == ["nnodes: 2"]
    more = planned(staged("llama-3-70b", nnodes=2, pipeline_parallel_size=3), "64GiB;64GiB;64GiB")
    texts = {fix.text: fix.loses for fix in more.problems[0].fixes}
    assert texts["nnodes: 3"] == "time for each token on the network between 3 nodes"
    one = planned(staged(nnodes=2, pipeline_parallel_size=2), "16GiB,16GiB")
    assert "leave out nnodes" in [fix.text for fix in one.problems[0].fixes]


def test_auto_is_offered_more_nodes_with_vllm_named() -> None:
    """`auto` itself tries stages on one node only."""
    (problem,) = planned(staged("llama-3-70b", infer_backend="auto"), "96GiB;96GiB").problems
    texts = {fix.text: fix.loses for fix in problem.fixes}
    lost = texts["infer_backend: vllm, nnodes: 2, pipeline_parallel_size: 2"]
    assert lost == "time for each token on the network between 2 nodes"


def test_a_limit_that_makes_pt_of_auto_says_what_it_costs() -> None:
    """And to leave all limits out comes after a change of one."""
    (problem,) = planned(staged(infer_backend="auto", max_memory={0: "3GB", 1: "10GB"}), "8GiB,16GiB").problems
    assert problem.fixes[0].text == "max_memory: {0: 3GB, 1: 14.5GB}"
    assert problem.fixes[0].loses == "vLLM's speed, since infer_backend: auto means pt then"
    assert [fix.loses for fix in problem.fixes if fix.text == "leave out max_memory"] == ["all limits of max_memory"]


def test_what_is_to_spare_on_stages_agrees_with_the_requests_at_once() -> None:
    """All stages have as many blocks, so each holds as many requests."""
    model = only(staged(max_memory={0: "3.5GB", 1: "16GB"}), "8GiB,16GiB")
    assert model.max_full_length_requests == 2
    assert model.kv_bytes_per_request <= model.spare_kv_bytes < 2 * model.kv_bytes_per_request
    for rank in model.ranks:
        layers = model.pipeline_layers[rank.seat[0]]
        assert model.stage_kv_bytes_per_request(rank) == layers * 8 * 2**20
