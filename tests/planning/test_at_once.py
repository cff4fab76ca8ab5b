"""`--for 32x8192`: the KV cache holds what is asked for, and one request more than fits is a shortage."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.facts.inventory import parse_gpus
from serve_app.planning.fixes import apply, with_fixes
from serve_app.planning.model_request import AtOnce, ModelRequest
from serve_app.planning.plan import Plan
from serve_app.planning.planner import make_plan
from serve_app.planning.pt_kv_buffers import budget_for, full_length_requests
from tests.planning.model_requests import request


def planned(asked: ModelRequest, gpus: str, at_once: AtOnce | None) -> Plan:
    """The plan of one model that is to hold so much."""
    return make_plan([replace(asked, at_once=at_once)], parse_gpus(gpus))


@pytest.mark.parametrize("backend", ["vllm", "pt"])
@pytest.mark.parametrize("tokens", [1, 1000, 4096])
def test_the_most_that_a_plan_names_is_the_most_that_can_be_asked_for(backend: str, tokens: int) -> None:
    """For requests as long as the longest, the plan's own number of them fits and one more does not."""
    asked = request(infer_backend=backend, max_model_len=tokens, max_num_seqs=1000)
    most = planned(asked, "18GiB", None).models[0].max_full_length_requests
    if most < 1000:
        assert not planned(asked, "18GiB", AtOnce(most + 1, tokens)).fits
    plan = planned(asked, "18GiB", AtOnce(most, tokens))
    assert plan.fits
    assert plan.models[0].max_full_length_requests == most


@given(rows=st.integers(1, 64), tokens=st.integers(1, 5000))
@settings(deadline=None)
def test_the_budget_for_requests_holds_them(rows: int, tokens: int) -> None:
    """And a token less does not. Buffers grow by four rows, so a budget may hold up to three more."""
    budget = budget_for(rows, tokens)
    assert rows <= full_length_requests(budget, tokens) <= rows + 3
    assert full_length_requests(budget - 1, tokens) < rows


@pytest.mark.parametrize(
    ("backend", "at_once", "code"),
    [
        ("vllm", AtOnce(1, 4097), "max_model_len"),
        ("pt", AtOnce(33, 10), "max_num_seqs"),
        ("vllm", AtOnce(257, 10), "max_num_seqs"),
        ("vllm", AtOnce(200, 4096), "over_commit"),
        ("pt", AtOnce(32, 4096), "over_commit"),
    ],
)
def test_what_cannot_be_held_is_named(backend: str, at_once: AtOnce, code: str) -> None:
    """By the field that stands in the way."""
    plan = planned(request(infer_backend=backend, max_model_len=4096), "18GiB", at_once)
    assert [problem.code for problem in plan.problems] == [code]
    assert at_once.text in plan.problems[0].message


@pytest.mark.parametrize("backend", ["vllm", "pt"])
def test_an_explicit_cache_that_is_too_small_is_named(backend: str) -> None:
    """The plan does not make it larger, since the user wrote it."""
    asked = request(infer_backend=backend, max_model_len=4096, kv_cache_memory_bytes="1GiB")
    assert planned(asked, "24GiB", None).fits
    plan = planned(asked, "24GiB", AtOnce(20, 4096))
    assert [problem.code for problem in plan.problems] == ["small_cache"]
    missing = plan.problems[0].missing_bytes + 2**30
    more = request(infer_backend=backend, max_model_len=4096, kv_cache_memory_bytes=f"{missing / 1000:.3f}KB")
    assert planned(more, "24GiB", AtOnce(20, 4096)).fits


@pytest.mark.parametrize(
    ("backend", "at_once", "fix"),
    [
        ("pt", AtOnce(400, 100), "max_num_seqs: 400"),
        ("vllm", AtOnce(4, 9000), "max_model_len: 9000"),
        ("vllm", AtOnce(30, 4096), "tensor_parallel_size: 2"),
    ],
)
def test_a_fix_is_for_what_was_asked(backend: str, at_once: AtOnce, fix: str) -> None:
    """And it holds it."""
    asked = replace(request(infer_backend=backend, max_model_len=4096), at_once=at_once)
    inventory = parse_gpus("20GiB,20GiB" if backend == "vllm" else "80GiB")
    plan = with_fixes(make_plan([asked], inventory), [asked], inventory)
    assert fix in [found.text for found in plan.problems[0].fixes]
    changed, _ = apply(plan.problems[0].fixes[0], asked, inventory)
    assert make_plan([changed], inventory).fits
