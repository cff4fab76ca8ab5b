"""What the plan says of pt with a KV cache in 8 bits, for both backends' names of the field."""

import pytest

from serve_app.cli.plan.explain import explained
from serve_app.config import ModelConfig
from serve_app.engines.vllm.engine import engine_arguments
from serve_app.errors import ConfigError
from serve_app.facts.inventory import parse_gpus
from serve_app.planning.fixes import with_fixes
from serve_app.planning.plan import ModelPlan
from serve_app.planning.planner import make_plan
from tests.planning.model_requests import request


def planned(shape: str, gpus: str, **fields: object) -> ModelPlan:
    """A model in pt on these cards, where it fits."""
    asked = request(shape, infer_backend="pt", **fields)
    plan = make_plan([asked], parse_gpus(gpus))
    assert plan.fits, plan.problems
    return plan.models[0]


@pytest.mark.parametrize(
    ("shape", "kept", "whole"),
    [
        # Keys and values of 4 heads of 128 elements in each of 28 layers, and a scale of 2 bytes for each.
        ("qwen2-7b", 28 * 2 * 4 * (128 + 2), 28 * 2 * 4 * 128 * 2),
        # 512 compressed elements and 64 of the rotary key in each of 27 layers.
        ("deepseek-v2-lite", 27 * (512 + 64 + 2 * 2), 27 * (512 + 64) * 2),
    ],
)
def test_a_token_takes_a_byte_for_each_element_and_its_scales(shape: str, kept: int, whole: int) -> None:
    """One layer is in the model's type beside them while it is read, which is twice what the layer takes."""
    fields = {"max_model_len": 4096, "max_num_seqs": 1}
    small = planned(shape, "80GiB", kv_cache_dtype="int8", **fields)
    large = planned(shape, "80GiB", **fields)
    layers = len(small.architecture.layers)
    assert large.ranks[0].kv_cache.bytes == large.kv_tokens * (whole + whole // layers)
    assert small.ranks[0].kv_cache.bytes == small.kv_tokens * (kept + whole // layers)


@pytest.mark.parametrize(("shape", "gpus"), [("qwen2-7b", "8GiB,12GiB"), ("qwen3-next-80b", "4x80GiB")])
def test_the_terms_of_the_cache_add_up(shape: str, gpus: str) -> None:
    """On each card: the values, the scales, what is read, and the states of a hybrid."""
    asked = request(shape, infer_backend="pt", max_model_len=4096, max_num_seqs=4, kv_cache_dtype="fp8", num_gpus=2)
    plan = make_plan([asked], parse_gpus(gpus))
    assert plan.fits
    for rank in plan.models[0].ranks:
        assert sum(term.bytes for term in rank.kv_cache.terms) == rank.kv_cache.bytes
    (found,) = explained(plan, "m")
    assert any("keys and values in 8 bits" in line for line in found.lines())


def test_a_cache_in_8_bits_is_a_fix_of_pt() -> None:
    """It loses little, so it comes before shorter requests, and the plan with it fits."""
    asked = request(infer_backend="pt", max_num_seqs=1, num_gpus=1)
    inventory = parse_gpus("17GiB")
    plan = with_fixes(make_plan([asked], inventory), [asked], inventory)
    fix = plan.problems[0].fixes[0]
    assert fix.text == "kv_cache_dtype: fp8"
    assert fix.loses == "a little precision of the KV cache (8 bits)"
    again = request(infer_backend="pt", max_num_seqs=1, num_gpus=1, kv_cache_dtype="fp8")
    assert make_plan([again], inventory).fits


def test_vllm_takes_the_field_as_its_argument() -> None:
    """With the figures of the argument under `engine_args`."""
    by_field = request(infer_backend="vllm", max_model_len=4096, kv_cache_dtype="fp8")
    by_argument = request(infer_backend="vllm", max_model_len=4096, engine_args={"kv_cache_dtype": "fp8"})
    plans = [make_plan([asked], parse_gpus("24GiB")).models[0] for asked in (by_field, by_argument)]
    assert plans[0].ranks == plans[1].ranks
    assert engine_arguments(by_field.config, "m")["kv-cache-dtype"] == "fp8"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"infer_backend": "pt", "kv_cache_dtype": "nvfp4"}, "kv_cache_dtype: pt does not have 'nvfp4'"),
        ({"infer_backend": "pt", "kv_cache_dtype": "int"}, "Did you mean 'int8'"),
        ({"infer_backend": "vllm", "kv_cache_dtype": "int8"}, "int8 is a type of pt's"),
        (
            {"infer_backend": "vllm", "kv_cache_dtype": "fp8", "engine_args": {"kv_cache_dtype": "fp8"}},
            "engine_args.kv_cache_dtype says the same",
        ),
        (
            {"infer_backend": "auto", "kv_cache_dtype": "int8", "tensor_parallel_size": 2},
            "kv_cache_dtype works with pt only, and tensor_parallel_size with vllm only",
        ),
    ],
)
def test_a_type_that_the_backend_lacks_is_refused(fields: dict[str, object], words: str) -> None:
    """By its name, with the backend that has it."""
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_args({"model": "x", **fields})


@pytest.mark.parametrize(
    ("name", "backend"), [("int8", "pt"), ("fp8", "vllm"), ("int8_per_token_head", "vllm"), ("auto", "vllm")]
)
def test_auto_takes_a_backend_that_has_the_type(name: str, backend: str) -> None:
    """`fp8` is a type of both, so the plan decides."""
    asked = request(max_model_len=4096, kv_cache_dtype=name)
    config = asked.config
    assert (config.only_pt, config.only_vllm) == (
        ["kv_cache_dtype"] if name == "int8" else [],
        ["kv_cache_dtype"] if name == "int8_per_token_head" else [],
    )
    if name != "int8_per_token_head":  # The plan has to ask vLLM about this one.
        assert make_plan([asked], parse_gpus("24GiB")).models[0].backend == backend
