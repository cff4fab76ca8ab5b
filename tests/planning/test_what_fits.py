"""What fits: each way is one that the plan accepts, and its length is the longest that it accepts."""

from dataclasses import replace

import pytest

from serve_app.facts.inventory import parse_gpus
from serve_app.planning.model_request import AtOnce
from serve_app.planning.planner import make_plan
from serve_app.planning.what_fits import MODEL_LEN_STEP, what_fits
from tests.planning.model_requests import request


@pytest.mark.parametrize("gpus", ["12GiB", "2x16GiB", "4GiB,12GiB", "24GiB,24GiB;80GiB"])
def test_a_way_is_accepted_and_a_step_more_is_not(gpus: str) -> None:
    """With the backend, the number of GPUs and the length of a way, the model fits; 256 tokens more do not."""
    inventory = parse_gpus(gpus)
    ways = what_fits([request()], inventory)
    assert {way.backend for way in ways} == {"vllm", "pt"}
    for way in ways:
        sizes = {"tensor_parallel_size": way.gpus // way.stages, "pipeline_parallel_size": way.stages}
        count = sizes if way.backend == "vllm" else {"num_gpus": way.gpus}

        def fits(tokens: int, way=way, count=count):  # type: ignore[no-untyped-def]
            asked = request(infer_backend=way.backend, max_model_len=tokens, **count)
            return make_plan([asked], inventory)

        if way.max_model_len == 0:
            assert way.problem
            assert not fits(1024).fits
            continue
        plan = fits(way.max_model_len)
        assert plan.fits
        assert plan.models[0].max_full_length_requests == way.requests
        if not way.holds_all:
            assert not fits(way.max_model_len + MODEL_LEN_STEP).fits


def test_models_do_not_stand_in_each_others_way() -> None:
    """Two models that need the one GPU each have their ways there."""
    inventory = parse_gpus("24GiB")
    both = [request(name="a"), request(name="b", replicas=3)]
    ways = what_fits(both, inventory)
    assert [replace(way, model="") for way in ways if way.model == "a"] == [
        replace(way, model="") for way in ways if way.model == "b"
    ]
    assert all(way.holds_all for way in ways)


def test_more_gpus_hold_more_requests_at_once() -> None:
    """vLLM's ways are all shown, since a larger tensor parallel size may be worth it for the cache."""
    sizes = [(way.gpus, way.requests) for way in what_fits([request()], parse_gpus("4x24GiB")) if way.backend == "vllm"]
    assert [gpus for gpus, _ in sizes] == [1, 2, 4]
    assert sizes == sorted(sizes, key=lambda item: item[1])
    assert sizes[0][1] < sizes[-1][1]


def test_requests_that_are_asked_for_are_the_least_length() -> None:
    """A way holds them although it does not hold the model's own length."""
    asked = replace(request("llama-3.1-8b", infer_backend="vllm"), at_once=AtOnce(1, 8192))
    (way,) = what_fits([asked], parse_gpus("20GiB"))
    assert 8192 <= way.max_model_len < 131_072
    (short,) = what_fits([replace(asked, at_once=AtOnce(1, 100_000))], parse_gpus("20GiB"))
    assert short.max_model_len == 0


def test_a_backend_that_is_set_has_all_numbers_of_gpus() -> None:
    """Unless the config names a number."""
    four = parse_gpus("4x24GiB")
    assert [way.gpus for way in what_fits([request(infer_backend="vllm")], four)] == [1, 2, 4]
    assert {way.backend for way in what_fits([request(infer_backend="pt", max_model_len=4096)], four)} == {"pt"}
    fixed = request(infer_backend="vllm", tensor_parallel_size=2)
    assert [way.gpus for way in what_fits([fixed], four)] == [2]
