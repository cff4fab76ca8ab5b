"""What a wrong field of a config is called: where it is, what was expected, and what was found."""

from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from serve_app.cli.main import main
from serve_app.config import ModelConfig, RouterConfig
from serve_app.errors import ConfigError
from serve_app.facts.serve_file import read_applications
from serve_app.field_errors import field_errors


def told(args: dict[str, Any], kind: type[ModelConfig | RouterConfig] = ModelConfig) -> str:
    """What is said of these fields."""
    base = {"model": "m", "infer_backend": "pt"} if kind is ModelConfig else {}
    with pytest.raises(ConfigError) as caught:
        kind.from_args(base | args)
    return str(caught.value)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ({"max_num_seqs": "two"}, "max_num_seqs: expected a whole number, got 'two'."),
        ({"max_num_seqs": 1.5}, "max_num_seqs: expected a whole number, got 1.5."),
        ({"max_num_seqs": 0}, "max_num_seqs: expected a number above 0, got 0."),
        ({"num_gpus": 9999}, "num_gpus: expected a number of at most 1024, got 9999."),
        ({"num_cpus": "many"}, "num_cpus: expected a number, got 'many'."),
        ({"trust_remote_code": "perhaps"}, "trust_remote_code: expected true or false, got 'perhaps'."),
        ({"model": ""}, "model: expected a text of 1 or more characters, got ''."),
        ({"model": 7}, "model: expected a text, got 7."),
        ({"infer_backend": "vlm"}, "infer_backend: expected 'pt', 'vllm' or 'auto', got 'vlm'. Did you mean 'vllm'?"),
        ({"dtype": "bf16"}, "'bfloat16' or 'float16', got 'bf16'. Did you mean 'bfloat16'?"),
        ({"engine_args": [1]}, "engine_args: expected a mapping, got [1]."),
        ({"device_map": 7}, "device_map: expected a text or a mapping, got 7."),
        ({"device_map": {"model": 1.5}}, "device_map.model: expected a whole number or a text, got 1.5."),
        ({"gpu_ids": 3}, "gpu_ids: expected a list, got 3."),
        ({"gpu_ids": []}, "gpu_ids: expected a list of 1 or more items, got []."),
        ({"gpu_ids": [0, "x"]}, "gpu_ids.1: expected a whole number, got 'x'."),
        ({"max_num_seqs": True}, "max_num_seqs: expected a whole number, got True."),
        ({"num_cpus": True}, "num_cpus: expected a number, got True."),
        ({"gpu_ids": [True]}, "gpu_ids.0: expected a whole number, got True."),
        ({"device_map": {"model": True}}, "device_map.model: expected a whole number or a text, got True."),
        ({"trust_remote_code": "yes"}, "trust_remote_code: expected true or false, got 'yes'."),
        ({"device": "gpu"}, "expected 'cuda' or 'cpu', got 'gpu'. Did you mean 'cuda'?"),
        ({"dtype": "fp16"}, "got 'fp16'. Did you mean 'float16'?"),
        ({"model": ["x" * 500]}, "xxx …."),
        (
            {"residency": {"policy": "swap", "min_residnt_s": 3}},
            "residency: unknown field 'min_residnt_s'. Did you mean 'min_resident_s'?",
        ),
    ],
)
def test_a_wrong_field_of_a_model(args: dict[str, Any], line: str) -> None:
    """With the nearest name where there is a list of names, and short whatever was found."""
    assert line in told(args)
    assert len(told(args)) < 200
    assert "\n" not in told(args)


def test_an_unknown_field_of_a_part_is_told_with_those_that_the_part_has() -> None:
    """The field that is missing instead has its own line, and a name that is near no other gets the list."""
    assert told({"residency": {"polcy": "swap"}}).splitlines() == [
        "missing field 'residency.policy'.",
        "residency: unknown field 'polcy'. Did you mean 'policy'?",
    ]
    assert told({"residency": {"policy": "swap", "zz": 1}}) == (
        "residency: unknown field 'zz'. Known fields: policy, pool, pool_memory, host_memory, min_resident_s, drain_s, "
        "priority."
    )


class _Item(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = 0


class _Shelf(BaseModel):
    items: list[_Item] = []
    named: dict[str, _Item | None] = {}


def test_a_part_in_a_list_or_a_mapping_is_found_too() -> None:
    """The place has its number or its key. Without the model, the names that it may have are not known."""
    given = {"items": [{"siez": 1}], "named": {"a": {"siez": 1}}}
    with pytest.raises(ValidationError) as caught:
        _Shelf.model_validate(given)
    assert field_errors(caught.value.errors(), given, _Shelf) == [
        "items.0: unknown field 'siez'. Did you mean 'size'?",
        "named.a: unknown field 'siez'. Did you mean 'size'?",
    ]
    assert field_errors(caught.value.errors(), given)[0] == "items.0: unknown field 'siez'."


def test_each_wrong_item_of_a_list_has_a_line_and_the_list_has_none() -> None:
    """pydantic says that the list is too short if it has no right item."""
    assert told({"infer_backend": "vllm", "pipeline_layers": [14.5, 13.5]}).splitlines() == [
        "pipeline_layers.0: expected a whole number, got 14.5.",
        "pipeline_layers.1: expected a whole number, got 13.5.",
    ]


def types_in(annotation: Any) -> set[Any]:
    """The types that a field may have, without what is inside of lists and mappings."""
    if get_origin(annotation) is Annotated:
        return types_in(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {each for part in get_args(annotation) for each in types_in(part)}
    return {annotation}


@pytest.mark.parametrize("kind", [ModelConfig, RouterConfig])
def test_true_is_no_number_and_a_text_is_no_flag(kind: type[ModelConfig | RouterConfig]) -> None:
    """In any field. Numbers in quotes stay numbers."""
    base = {"model": "m", "infer_backend": "vllm"} if kind is ModelConfig else {}
    kinds = {name: types_in(field.annotation) for name, field in kind.model_fields.items()}
    assert sum(bool(found & {int, float, bool}) for found in kinds.values()) > 8
    for name in [name for name, found in kinds.items() if found & {int, float} and bool not in found]:
        wanted = "is not a size" if name in ("kv_cache_memory_bytes", "prompt_cache_memory") else "expected a"
        assert wanted in told(base | {name: True}, kind), name
    for name in [name for name, found in kinds.items() if bool in found]:
        assert "expected true or false" in told(base | {name: "yes"}, kind), name
    assert ModelConfig.from_args({"model": "m", "infer_backend": "vllm", "max_num_seqs": "2"}).max_num_seqs == 2


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ({"aliases": {"int": 5}}, "aliases.int: expected a text, got 5."),
        ({"aliases": {5: "m"}}, "aliases.5: as a name, expected a text, got 5."),
        ({"fallbacks": {"a": "b"}}, "fallbacks.a: expected a list, got 'b'."),
        ({"max_retries": -1}, "max_retries: expected a number of at least 0, got -1."),
        ({"hold_timeout_s": float("nan")}, "hold_timeout_s: expected a number above 0"),
    ],
)
def test_a_wrong_field_of_the_router(args: dict[str, Any], line: str) -> None:
    """A name that a user chose is told as it is, even if it is also the name of a type."""
    assert line in told(args, RouterConfig)


@pytest.mark.parametrize("kind", [ModelConfig, RouterConfig])
def test_no_field_is_told_in_the_words_of_pydantic(kind: type[ModelConfig | RouterConfig]) -> None:
    """For values of every type in every field."""
    for field in kind.model_fields:
        for value in ("§", 1.5, -1, True, None, [], [None], {}, {"a": None}, {1: []}, object(), 10**400, float("inf")):
            base = {"model": "m", "infer_backend": "pt"} if kind is ModelConfig else {}
            try:
                kind.from_args(base | {field: value})
            except ConfigError as error:
                words = str(error)
                assert field in words
                assert "nput should" not in words
                assert "valid" not in words.replace("invalid", ""), words


def test_a_count_of_replicas_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """pydantic has two errors, for the two types of the field, and names the types in the path."""
    file = tmp_path / "x.yaml"
    file.write_text("applications: [{name: m, import_path: serve_app.app:model, deployments: [{num_replicas: two}]}]")
    with pytest.raises(ConfigError) as caught:
        read_applications(file)
    wanted = "deployments.0.num_replicas: expected a whole number or 'auto', got 'two'."
    assert str(caught.value) == f"{file}: applications[0] (m): {wanted}"
    assert main(["check", str(file)]) == 2
    assert wanted in capsys.readouterr().err
    file.write_text(file.read_text().replace("two", "true"))
    with pytest.raises(ConfigError, match="num_replicas: expected a whole number or 'auto', got True"):
        read_applications(file)


def test_what_ray_serve_refuses_is_told_in_the_same_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In options of Serve that only its own schema knows."""
    file = tmp_path / "x.yaml"
    file.write_text(
        "applications:\n- name: m\n  import_path: serve_app.app:model\n  route_prefix: /models/m\n"
        "  args: {model: serve-app/demo, infer_backend: pt, device: cpu}\n"
        "  deployments: [{name: Model, max_ongoing_requests: many}]\n"
    )
    assert main(["check", str(file)]) == 2
    words = capsys.readouterr().err
    assert "max_ongoing_requests: expected a whole number, got 'many'." in words
    assert "Input should" not in words


def test_every_literal_offers_its_names() -> None:
    """So that a field that is added later does."""
    for name, field in ModelConfig.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if get_origin(kind) is Literal and kind is not NoneType:
                known = get_args(kind)[0]
                assert f"Did you mean '{known}'?" in told({name: f"{known}x"})
