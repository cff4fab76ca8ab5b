"""Which fixes are offered for what does not fit, in which order, and that each of them works and is minimal."""

import time
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.facts.inventory import Inventory, parse_gpus
from serve_app.planning.fixes import apply, price, with_fixes
from serve_app.planning.fixes.card_ladders import shares
from serve_app.planning.fixes.ladder import changed
from serve_app.planning.fixes.trial import Budget, Trial
from serve_app.planning.fixes.wording import costs_for_others
from serve_app.planning.model_request import AtOnce, ModelRequest
from serve_app.planning.plan import Change, Plan, Problem
from serve_app.planning.planner import make_plan
from serve_app.planning.sizes import gib
from tests.planning.fix_survey import by_force, faults
from tests.planning.model_requests import request
from tests.planning.over_commits import U, over_commits

GIB = 2**30


def solved(requests: list[ModelRequest], gpus: str | Inventory) -> Plan:
    """The plan with its fixes."""
    inventory = parse_gpus(gpus) if isinstance(gpus, str) else gpus
    return with_fixes(make_plan(requests, inventory), requests, inventory)


def only(requests: list[ModelRequest], gpus: str | Inventory) -> Problem:
    """The only problem."""
    (found,) = solved(requests, gpus).problems
    return found


def texts(problem: Problem) -> list[str]:
    """The lines of a problem's fixes."""
    return [fix.text for fix in problem.fixes]


def test_an_idle_card_comes_before_a_shorter_context() -> None:
    """Llama-3.1-8B keeps its 131,072 tokens on both cards, and the shorter length is offered after that."""
    found = only([request("llama-3.1-8b", infer_backend="vllm")], "2x24GiB")
    first = found.fixes[0]
    assert (first.text, first.loses) == ("tensor_parallel_size: 2", "")
    assert first.gains.endswith("and uses n1:1, which is idle")
    assert first.effect.startswith("loses nothing; gains: m fits on n1:0 and n1:1 with ")
    (after,) = solved([request("llama-3.1-8b", infer_backend="vllm", tensor_parallel_size=2)], "2x24GiB").models
    assert after.max_model_len == 131_072
    assert [fix.price for fix in found.fixes] == sorted(fix.price for fix in found.fixes)


def test_a_7b_on_4_and_12_gib_has_fixes() -> None:
    """Both cards together are too small for its 16-bit weights, so vLLM has 8 bits of them on the larger one."""
    (fix, *_) = only([request(max_model_len=4096, infer_backend="vllm")], "4GiB,12GiB").fixes
    assert Change("quantization", "fp8") in fix.changes
    assert "precision of the weights (8 bits, which saves 5.47 GiB)" in fix.loses


@pytest.mark.parametrize(
    ("gpus", "second", "length", "method", "loses", "cpu"),
    [
        ("4GiB,12GiB", "10GB", 24576, "bnb-int8", "8 bits, which saves 6.07 GiB", "7.5GB"),
        ("4GiB,8GiB", "7GB", 8192, "bnb-nf4", "4 bits, which saves 9.02 GiB", "9.5GB"),
    ],
)
def test_a_7b_on_two_small_cards_is_quantised(
    gpus: str, second: str, length: int, method: str, loses: str, cpu: str
) -> None:
    """With pt, by as many bits as the KV cache of one request leaves room for, and it fits then."""
    config: dict[str, Any] = {"infer_backend": "pt", "max_memory": {0: "3GB", 1: second}, "max_model_len": length}
    found = only([request(**config)], gpus)
    assert texts(found) == [f"quantization: {method}", f"max_memory: {{0: 3GB, 1: {second}, cpu: {cpu}}}"]
    assert loses in found.fixes[0].loses
    (model,) = solved([request(quantization=method, **config)], gpus).models
    first, last = model.ranks
    for rank in (first, last):
        assert rank.weights.certainty == "exact"
        assert sum(term.bytes for term in rank.weights.terms) == rank.weights.bytes
    assert first.layers is not None
    assert last.layers == (first.layers[1] + 1, 28)


def test_a_quantised_checkpoint_is_not_quantised_again() -> None:
    """The plan says so before anything starts."""
    shape = replace(request().architecture, quantization="awq")
    found = only([replace(request(infer_backend="pt", quantization="bnb-nf4"), architecture=shape)], "24GiB")
    assert found.code == "not_planned"
    assert "quantization: bnb-nf4, but this checkpoint is quantised already (by awq)" in found.message


def test_a_limit_is_raised_before_it_is_left_out_and_the_weights_come_last() -> None:
    """Where the cards have more than `max_memory` says."""
    found = only([request(infer_backend="pt", max_memory={0: "3GB", 1: "10GB"}, max_model_len=4096)], "8GiB,24GiB")
    assert texts(found) == [
        "max_memory: {0: 3GB, 1: 14.5GB}",
        "leave out max_memory",
        "quantization: bnb-int8",
    ]


def test_two_fields_are_changed_where_no_single_one_helps() -> None:
    """Stages over two cards, which have no room for the activations of 256 requests."""
    found = only([request("qwen2-7b", infer_backend="vllm", max_model_len=4096, quantization=None)], "10GiB,8GiB")
    assert "pipeline_parallel_size: 2, max_num_seqs: 64" in texts(found)


def test_stages_are_offered_where_cards_differ() -> None:
    """A model in 16 bits that no card holds, on cards that tensor parallelism cannot take together."""
    asked = [request("llama-3.1-8b", infer_backend="vllm", max_model_len=131072)]
    assert texts(only(asked, "24GiB,16GiB"))[0] == "pipeline_parallel_size: 2"
    size = [request("llama-3.1-8b", infer_backend="vllm", max_model_len=131072, tensor_parallel_size=2)]
    assert texts(only(size, "24GiB,16GiB"))[0] == "pipeline_parallel_size: 2, without tensor_parallel_size"
    four = [request("llama-3-70b", infer_backend="vllm", max_model_len=4096, tensor_parallel_size=2)]
    assert texts(only(four, "2x48GiB,2x40GiB"))[0] == "pipeline_parallel_size: 2"


def test_two_models_share_a_card_if_both_take_a_part() -> None:
    """Each has a whole card until both say their share, so only a change of both helps."""
    models = [request(name=name, infer_backend="vllm") for name in "mn"]
    plan = solved(models, "A100-80GB")
    assert [(fix.model, fix.text) for fix in plan.joint_fixes] == [("m", "num_gpus: 0.5"), ("n", "num_gpus: 0.5")]
    assert texts(plan.problems[0]) == ["one more 20 GiB card on n1"]


def test_the_smallest_card_is_offered_where_no_change_helps() -> None:
    """A larger card in the place of one, or one more, whichever is smaller."""
    big = request("llama-3-70b", infer_backend="vllm", quantization="fp8", max_model_len=1024, max_num_seqs=1)
    (fix,) = only([big], "48GiB").fixes
    assert fix.text == "one more 95 GiB card on n1"
    assert fix.effect.startswith("gains: m fits on n1:1 ")
    named = replace(big, config=big.config.model_copy(update={"gpu_ids": (0,)}))
    assert texts(only([named], "48GiB")) == ["a 95 GiB card instead of n1:0"]


def test_a_limit_on_fewer_gpus_than_num_gpus_leaves_the_others_empty() -> None:
    """Ray gives whole GPUs, and the limit names only the first."""
    inventory = replace(parse_gpus("24GiB,24GiB"))
    whole = replace(inventory, devices=tuple(replace(gpu, by_index=False) for gpu in inventory.devices))
    (model,) = make_plan(
        [request(infer_backend="pt", max_memory={0: "20GB"}, num_gpus=2, max_model_len=1024)], whole
    ).models
    assert [rank.device.id for rank in model.ranks] == ["n1:0"]


def test_json_names_the_first_fix_and_all_of_them() -> None:
    """`fix` is there for scripts that know only one."""
    plan = solved([request("llama-3.1-8b", infer_backend="vllm")], "2x24GiB").to_json()
    (found,) = plan["problems"]
    assert found["fix"] == found["fixes"][0]
    assert (found["fix"]["field"], found["fix"]["value"], found["fix"]["loses"]) == ("tensor_parallel_size", 2, "")
    assert found["fix"]["changes"] == [{"field": "tensor_parallel_size", "value": 2}]
    assert plan["joint_fixes"] == []


def test_a_search_that_reached_its_bound_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is dropped in silence."""
    monkeypatch.setattr("serve_app.planning.fixes.MOST_PLACEMENTS", 12)
    plan = solved([request(infer_backend="vllm")], "4GiB,12GiB")
    assert plan.is_search_cut
    assert any("reached its bound" in note for note in plan.notes)


@pytest.mark.slow
def test_the_search_for_fixes_is_bounded() -> None:
    """For 200 models on 1,000 GPUs it takes as long as a few plans."""
    first = request(max_model_len=4096)
    models = [replace(first, name=f"m{number:03}") for number in range(199)]
    models.append(request("llama-3-70b", "big", infer_backend="vllm"))
    gpus = parse_gpus(";".join(["8xA10G"] * 60 + ["4x16GiB,4x24GiB"] * 65))
    start = time.process_time()
    plan = make_plan(models, gpus)
    planned = time.process_time() - start
    start = time.process_time()
    assert with_fixes(plan, models, gpus).problems[0].fixes
    assert time.process_time() - start < 1 + 3 * planned


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_fix_of_random_over_commits_works_and_is_minimal() -> None:
    """One and several models, equal and unequal cards, by index and whole: `python -m tests.planning.fix_survey` tries
    500."""
    assert [fault for case in islice(over_commits(5), 20) for fault in faults(case)] == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_brute_force_finds_no_fix_that_loses_less() -> None:
    """Over every value of a coarse grid for one and for two fields. `python -m tests.planning.fix_survey` tries more,
    of which one in twenty may have no fix."""
    compared = [found for case in islice(over_commits(7, most_models=2), 12) for found in by_force(case)]
    assert [found.dearer for found in compared if found.dearer] == []
    assert len(compared) > 4
    assert not any(found.is_missed for found in compared)


def test_vllms_arguments_stay_as_they_are_beside_a_new_one() -> None:
    """The line of a fix is the whole mapping."""
    model = request(infer_backend="vllm", max_model_len=32768, engine_args={"seed": 1, U: 0.92})
    fixes = only([model], "18GiB").fixes
    assert {"seed": 1, U: 0.92, "kv_cache_dtype": "fp8"} in [change.value for fix in fixes for change in fix.changes]


def priced(requests: list[ModelRequest], gpus: str) -> tuple[Problem, list[int]]:
    """The only problem, and the prices of its fixes."""
    found = only(requests, gpus)
    return found, [fix.price for fix in found.fixes]


def test_a_fix_keeps_length_and_number_of_requests_beside_a_shorter_context() -> None:
    """Neither 8-bit weights nor an 8-bit cache alone is enough, and both together are."""
    found, prices = priced([request("llama-3.1-8b", infer_backend="vllm")], "24GiB")
    assert texts(found) == ["quantization: fp8, engine_args: {kv_cache_dtype: fp8}", "max_model_len: 48896"]
    assert prices == sorted(prices)
    # Where a single change keeps both, no pair is added.
    assert all("," not in text for text in texts(only([request("llama-3.1-8b", infer_backend="vllm")], "2x24GiB")))


def test_a_share_of_a_card_names_vllm_for_auto_and_says_what_others_get() -> None:
    """With `auto`, num_gpus alone would mean pt."""
    models = [request(infer_backend="vllm"), request(name="n", infer_backend="auto", max_model_len=8192)]
    plan = solved(models, "A100-80GB")
    joint = {fix.model: fix for fix in plan.joint_fixes}
    assert joint["n"].text == "infer_backend: vllm, num_gpus: 0.5"
    assert joint["n"].loses == "50% of a card, which other models may take"
    after = make_plan([changed(model, joint[model.name].changes) or model for model in models], parse_gpus("A100-80GB"))
    assert {model.name: model.backend for model in after.models} == {"m": "vllm", "n": "vllm"}


def test_num_gpus_alone_costs_auto_its_backend() -> None:
    """So it is priced as the other backend, and says so."""
    trial_requests = (request(), request(name="n"))
    ladders = [
        ladder
        for ladder in shares(trial_requests[0], "auto", "no_device", trial_of(trial_requests, "24GiB"))
        if ladder.fields == {"num_gpus"}
    ]
    assert [ladder.price for ladder in ladders] == [price.OTHER_BACKEND]
    assert ladders[0].loses(ladders[0].rungs[0]) == "vLLM's speed, and 10% of a card, which other models may take"
    alone = trial_of(trial_requests[:1], "24GiB")
    assert list(shares(trial_requests[0], "auto", "no_device", alone)) == []


def trial_of(requests: tuple[ModelRequest, ...], gpus: str) -> Trial:
    """What a search for fixes starts from."""
    inventory = parse_gpus(gpus)
    return Trial(make_plan(requests, inventory), requests, inventory, Budget(1000))


def test_a_fix_that_decides_auto_says_so() -> None:
    """`quantization` is a field of vLLM's, and `auto` had been free to take pt."""
    found = only([request("llama-3.1-8b", infer_backend="auto")], "24GiB")
    assert found.fixes[0].loses.endswith("infer_backend: auto, which means vllm with kv_cache_dtype and quantization")


def test_a_card_says_which_model_gets_it_and_which_moves() -> None:
    """The new card is for the smaller model, which makes room for the larger one."""
    models = [
        request("llama-3.1-8b", infer_backend="vllm"),
        request("llama-3.1-8b", "b", infer_backend="auto", max_model_len=8192),
    ]
    (fix,) = solved(models, "A100-80GB").problems[0].fixes
    assert fix.text == "one more 20 GiB card on n1"
    assert fix.gains.startswith("m fits on n1:0 with ")
    assert fix.gains.endswith("; b moves to n1:1")


def test_another_backend_of_another_model_is_a_cost() -> None:
    """With `auto`, a model that moves may run with the slower engine."""
    other = request(infer_backend="auto", max_model_len=4096)
    before, after = make_plan([other], parse_gpus("24GiB")), make_plan([other], parse_gpus("10GiB,8GiB"))
    assert costs_for_others("x", before, after) == "vllm for m, which runs with pt then"
    assert costs_for_others("m", before, after) == costs_for_others("x", before, before) == ""


def test_a_set_of_equal_cards_is_offered_where_one_card_does_not_do() -> None:
    """For a size that the config names, and with the size that it needs where it names none."""
    found = only([request("deepseek-v3", infer_backend="vllm", tensor_parallel_size=8)], "8x80GiB")
    assert texts(found) == ["one more node with 8 cards of 288 GiB"]
    big = request("llama-3-70b", infer_backend="vllm")
    fixes = only([big], "24GiB").fixes
    assert [fix.text for fix in fixes] == [
        "one more 179 GiB card on n1",
        "one more node with 2 cards of 80 GiB, tensor_parallel_size: 2",
    ]
    new, inventory = apply(fixes[1], big, parse_gpus("24GiB"))
    assert make_plan([new], inventory).fits
    smaller = replace(fixes[1], changes=(Change("gpus", {"size": "64GiB", "count": 2}), *fixes[1].changes[1:]))
    new, inventory = apply(smaller, big, parse_gpus("24GiB"))
    assert not make_plan([new], inventory).fits


def test_a_problem_names_its_attempt_and_its_replicas() -> None:
    """A second replica without a place is no model without one."""
    found = only([request("llama-3.1-8b", replicas=3, infer_backend="vllm", max_model_len=8192)], "2x24GiB")
    assert found.message.startswith("2 of 3 replicas have a place, and the next one has none: every GPU is in use")
    assert (found.replicas, found.placed) == (3, 2)
    two = only([request("llama-3-70b", infer_backend="vllm", tensor_parallel_size=2)], "2x48GiB")
    assert two.to_json()["attempt"] == {
        "infer_backend": "vllm",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 1,
    }
    assert two.message.startswith("vllm with tensor_parallel_size 2 needs ")
    assert "on each of 2 ranks" in two.message
    none = only([request("llama-3-70b", replicas=2, infer_backend="pt", num_gpus=2)], "2x48GiB")
    assert none.message.startswith("None of 2 replicas has a place: pt on 2 GPUs needs ")
    assert "on n1:0 and n1:1 together, which is " in none.message


def test_what_is_to_spare_is_beside_the_requests_that_are_asked_for() -> None:
    """For both backends, what `--for` asks for is taken off."""
    for backend in ("vllm", "pt"):
        plain = request(infer_backend=backend, max_model_len=4096)
        asked = replace(plain, at_once=AtOnce(8, 2048))
        (before,) = make_plan([plain], parse_gpus("24GiB")).models
        (after,) = make_plan([asked], parse_gpus("24GiB")).models
        assert after.kv_bytes_needed > before.kv_bytes_needed > 0
        assert after.spare_kv_bytes == sum(rank.kv_cache.bytes for rank in after.ranks) - after.kv_bytes_needed
    small = replace(request("llama-3.1-8b", infer_backend="vllm", max_model_len=32768), at_once=AtOnce(2, 32768))
    fix = next(fix for fix in only([small], "24GiB").fixes if fix.model)
    assert "of KV cache to spare beside 2 requests of 32768 tokens" in fix.gains


@given(st.integers(-(2**60), 2**60))
def test_a_size_that_is_not_zero_is_not_shown_as_zero(size: int) -> None:
    """A shortage of a few bytes is one."""
    assert (float(gib(size).split()[0]) == 0) == (size == 0)


def test_layers_that_cannot_be_split_say_what_each_card_lacks() -> None:
    """Both cards have the bytes together, and the layers do not divide so. With what is named, they do."""
    asked = request(infer_backend="pt", num_gpus=2, max_model_len=1024)
    found = only([asked], "2x8184MiB")
    assert "for which they have room, but not in whole layers: each of them would need 20.9 MiB more" in found.message
    lacking = -(-found.missing_bytes // 2**20)
    assert make_plan([asked], parse_gpus(f"2x{8184 - -lacking * 103 // 100}MiB")).fits  # Of each card 2 % stay free.
    assert not make_plan([asked], parse_gpus(f"2x{8184 + lacking - 1}MiB")).fits
