"""Which arguments of vLLM the plan counts, asks about or refuses."""

import dataclasses
from typing import Any

import pytest

from serve_app.engines.vllm.arguments import ARGUMENTS
from serve_app.planning import vllm_arguments
from serve_app.planning.vllm_arguments import ASKED, HARMLESS, asked_arguments, effective, uncounted_arguments


def test_each_name_is_one_of_vllms_and_in_one_set() -> None:
    """A name that vLLM drops must not stay behind."""
    named = ASKED | HARMLESS | vllm_arguments._FLAGS | vllm_arguments._DEFAULTS.keys()
    assert not named - ARGUMENTS
    assert not ASKED & HARMLESS


@pytest.mark.slow
def test_what_is_asked_is_an_argument_of_the_engine() -> None:
    """The process that is asked has no server."""
    from vllm.engine.arg_utils import EngineArgs

    assert {field.name for field in dataclasses.fields(EngineArgs)} >= ASKED


@pytest.mark.parametrize(
    "name",
    ["speculative_config", "enable_lora", "hf_overrides", "hf_config_path", "performance_mode", "a_new_argument"],
)
def test_what_is_in_no_set_is_refused_by_name(name: str) -> None:
    """An argument of a newer vLLM too."""
    assert uncounted_arguments(effective({name: True, "seed": 1}, is_known_on_gpu=True)) == [name]


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"no_enable_prefix_caching": True}, {"enable_prefix_caching": False}),
        ({"no_enable_prefix_caching": False}, {}),
        ({"enable_prefix_caching": None}, {}),
        ({"enable_lora": False, "load_format": "auto"}, {}),
        ({"limit_mm_per_prompt": {"image": 4}}, {}),
        ({"limit_mm_per_prompt": '{"image": 0}'}, {"limit_mm_per_prompt": {"image": 0}}),
        ({"block_size": 32, "no_enable_log_requests": True}, {"block_size": 32}),
    ],
)
def test_arguments_have_one_form(given: dict[str, Any], asked: dict[str, Any]) -> None:
    """So that the same question has the same key."""
    found = effective(given, is_known_on_gpu=True)
    assert asked_arguments(found) == asked
    assert uncounted_arguments(found) == []


def test_prefix_caching_is_no_default_of_other_types() -> None:
    """vLLM decides by the model."""
    assert effective({"enable_prefix_caching": True}, is_known_on_gpu=False) == {"enable_prefix_caching": True}
