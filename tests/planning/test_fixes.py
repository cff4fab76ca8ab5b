"""Which fixes are offered for what does not fit, in which order, and that each of them works and is minimal."""

import time
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from serve_app.facts.inventory import Inventory, parse_gpus
from serve_app.planning.fit import ModelRequest
from serve_app.planning.fixes import with_fixes
from serve_app.planning.plan import Change, Plan, Problem
from serve_app.planning.planner import make_plan
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
    assert first.effect.startswith("loses nothing; gains: fits on n1:0 and n1:1 with ")
    (after,) = solved([request("llama-3.1-8b", infer_backend="vllm", tensor_parallel_size=2)], "2x24GiB").models
    assert after.max_model_len == 131_072
    assert [fix.price for fix in found.fixes] == sorted(fix.price for fix in found.fixes)


def test_a_7b_on_4_and_12_gib_has_fixes() -> None:
    """Both cards together are too small for its 16-bit weights, so vLLM has 8 bits of them on the larger one."""
    (fix, *_) = only([request(max_model_len=4096, infer_backend="vllm")], "4GiB,12GiB").fixes
    assert Change("quantization", "fp8") in fix.changes
    assert "precision of the weights (8 bits, which saves 5.47 GiB)" in fix.loses


@pytest.mark.parametrize(
    ("length", "method", "loses", "cpu"),
    [
        (32768, "bnb-nf4", "4 bits, which saves 9.02 GiB", "7.5GB"),
        (4096, "bnb-int8", "8 bits, which saves 6.07", "6.5GB"),
    ],
)
def test_a_7b_on_3_and_10_gb_is_quantised(length: int, method: str, loses: str, cpu: str) -> None:
    """With pt, by as many bits as the KV cache of one request leaves room for, and it fits then."""
    config: dict[str, Any] = {"infer_backend": "pt", "max_memory": {0: "3GB", 1: "10GB"}, "max_model_len": length}
    found = only([request(**config)], "4GiB,12GiB")
    assert texts(found) == [f"quantization: {method}", f"max_memory: {{0: 3GB, 1: 10GB, cpu: {cpu}}}"]
    assert loses in found.fixes[0].loses
    (model,) = solved([request(quantization=method, **config)], "4GiB,12GiB").models
    for rank in model.ranks:
        assert rank.weights.certainty == "exact"
        assert sum(term.bytes for term in rank.weights.terms) == rank.weights.bytes
    assert [model.ranks[0].layers, model.ranks[1].layers] == [
        (-1, model.ranks[1].layers[0] - 1),
        (model.ranks[1].layers[0], 28),
    ]


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
    assert fix.effect.startswith("gains: fits on n1:1 ")
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
