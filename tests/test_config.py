"""What users write, what is made of it, and what is refused with which cure."""

import re
from pathlib import Path

import pytest

from serve_app.byte_sizes import parse_bytes, parse_max_memory
from serve_app.config import ModelConfig, RouterConfig
from serve_app.errors import ConfigError
from serve_app.facts.serve_file import read_applications
from tests.builders import model_config


@pytest.mark.parametrize(
    ("text", "size"),
    [("3GB", 3 * 10**9), ("3GiB", 3 * 2**30), ("0.5 MiB", 2**19), ("200KB", 200_000), ("0GB", 0), ("1TB", 10**12)],
)
def test_sizes_have_decimal_and_binary_units(text: str, size: int) -> None:
    """GB is 10⁹ bytes and GiB is 2³⁰, as in accelerate."""
    assert parse_bytes(text, "x") == size


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("3gb", "Write 3GB"),  # accelerate reads gb as gigabits
        ("3gib", "Write 3GiB"),
        ("3g", "Write 3GB"),
        ("10", "10GB"),
        (10, "10GB"),
        ("-1GB", "negative"),
        ("3XB", "Known units: KB, MB, GB"),
        ("lots", "is not a size"),
        (True, "is not a size"),
        (None, "is not a size"),
    ],
)
def test_a_wrong_size_is_refused_with_the_right_spelling(text: object, cure: str) -> None:
    """Nothing that could be misread is guessed."""
    with pytest.raises(ConfigError, match=f"max_memory.*{cure}"):
        parse_bytes(text, "max_memory[0]")


@pytest.mark.parametrize(
    "written",
    [
        {0: "3GB", 1: "10GB"},
        {"0": "3GB", "1": "10GB"},
        {"cuda:0": "3GB", "cuda:1": "10GB"},
        '{0: "3GB", 1: "10GB"}',
        '{"0":"3GB","1":"10GB"}',
        "{0: 3GB, 1: 10GB}",
        "{'cuda:0': '3GB', 'cuda:1': '10GB'}",
    ],
)
def test_max_memory_is_read_as_people_write_it(written: object) -> None:
    """A mapping or a string of one; keys as numbers, strings or torch's device names."""
    assert parse_max_memory(written) == {0: 3 * 10**9, 1: 10**10}


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("foo", "expected a mapping"),
        ({}, "is empty"),
        ({"tpu": "1GB"}, "unknown device 'tpu'"),
        ({-1: "1GB"}, "unknown device '-1'"),
        ({True: "1GB"}, "unknown device 'True'"),
        ({0: "1GB", "cuda:0": "2GB"}, "named twice"),
        ({1: "3gb"}, r"max_memory\[1\].*Write 3GB"),
    ],
)
def test_a_max_memory_that_cannot_be_meant_is_refused(written: object, complaint: str) -> None:
    """The message names the field and the device."""
    with pytest.raises(ConfigError, match=complaint):
        parse_max_memory(written)


def test_tiers_are_opened_by_naming_them() -> None:
    """`cpu` and `disk` stand beside the GPUs in max_memory."""
    config = model_config(max_memory={1: "2GB", 0: "1GB", "cpu": "20GB"})
    assert config.gpu_indices == (0, 1)
    assert config.spill_tiers == {"cpu"}


@pytest.mark.parametrize(
    ("args", "cure"),
    [
        ({"infer_backend": "vllm", "max_memory": {0: "3GB", "cpu": "9GB"}}, "names cpu, but vLLM.*infer_backend: pt"),
        ({"infer_backend": "vllm", "max_memory": {0: "3GB", "disk": "9GB"}}, "Leave disk out"),
        (
            {"infer_backend": "vllm", "device": "cpu", "max_memory": {"cpu": "9GB"}},
            "device is cpu. Use kv_cache_memory_bytes",
        ),
        ({"infer_backend": "vllm", "max_memory": {0: "3GB"}, "gpu_ids": [0]}, "gpu_ids: max_memory names the GPUs"),
        ({"infer_backend": "vllm", "max_memory": {0: "3GB"}, "num_gpus": 0.5}, "num_gpus: max_memory names the GPUs"),
        (
            {"infer_backend": "vllm", "max_memory": {0: "3GB", 1: "3GB", 2: "3GB"}, "pipeline_layers": [14, 14]},
            "names 3 GPUs, but pipeline_layers has 2 stages. Name 2 GPUs, or leave pipeline_layers out",
        ),
        ({"infer_backend": "vllm", "engine_args": {"gpu_memory_utilization": True}}, "True must be a number above 0"),
        (
            {"infer_backend": "vllm", "max_memory": {0: "3GB", 1: "3GB"}, "pipeline_parallel_size": 3},
            "names 2 GPUs, but pipeline_parallel_size sets 3 stages. Name 3 GPUs, or leave pipeline_parallel_size out",
        ),
        (
            {"infer_backend": "vllm", "max_memory": {0: "3GB", 1: "3GB", 2: "3GB"}, "tensor_parallel_size": 2},
            "max_memory names 3 GPUs, but tensor_parallel_size is 2",
        ),
        ({"infer_backend": "vllm", "device_map": "auto"}, "device_map.*tensor_parallel_size"),
        ({"infer_backend": "vllm", "num_gpus": 1}, "tensor_parallel_size whole GPUs"),
        ({"infer_backend": "pt", "tensor_parallel_size": 2}, "tensor_parallel_size.*max_memory"),
        ({"infer_backend": "pt", "quantization": "awq"}, "quantization.*config.json"),
        ({"infer_backend": "pt", "quantization": "bnb-nf"}, "does not know 'bnb-nf'.*Did you mean 'bnb-nf4'"),
        ({"infer_backend": "pt", "quantization": "fp8"}, "It rounds weights by bnb-nf4, bnb-int8.*infer_backend: vllm"),
        ({"infer_backend": "vllm", "quantization": "bnb-nf4"}, "bnb-nf4 is a method of pt"),
        (
            {"infer_backend": "auto", "quantization": "bnb-nf4", "tensor_parallel_size": 2},
            "quantization works with pt only, and tensor_parallel_size with vllm only",
        ),
        (
            {"infer_backend": "pt", "quantization": "bnb-nf4", "max_memory": {0: "3GB", "cpu": "9GB"}},
            "max_memory names cpu, but layers that are quantised by bnb-nf4 cannot be moved",
        ),
        (
            {"infer_backend": "pt", "quantization": "bnb-int8", "device_map": {"model": 0, "lm_head": "disk"}},
            "device_map names disk",
        ),
        (
            {"infer_backend": "pt", "quantization": "bnb-int8", "device": "cpu", "max_memory": {"disk": "9GB"}},
            "max_memory names disk",
        ),
        ({"infer_backend": "pt", "engine_args": {"a": 1}}, "engine_args"),
        ({"infer_backend": "pt", "device_map": "cpu"}, "device: cpu"),
        ({"infer_backend": "pt", "device_map": "atuo"}, "auto, balanced"),
        ({"infer_backend": "pt", "device": "cpu", "max_memory": {0: "1GB"}}, "names GPUs, but device is cpu"),
        ({"infer_backend": "pt", "device": "cpu", "num_gpus": 1}, "device is cpu"),
        ({"infer_backend": "pt", "max_memory": {"cpu": "1GB"}}, "names no GPU"),
        ({"infer_backend": "pt", "num_gpus": 1.5}, "must be whole"),
        ({"infer_backend": "pt", "num_gpus": 1, "max_memory": {0: "1GB", 1: "1GB"}}, "names 2 GPUs"),
        ({"infer_backend": "pt", "pipeline_parallel_size": 2}, "pipeline_parallel_size.*max_memory"),
        ({"infer_backend": "pt", "pipeline_layers": [1, 3]}, "pipeline_layers.*max_memory"),
        ({"infer_backend": "vllm", "engine_args": {"pipeline-parallel-size": 2}}, "has a field of its own"),
        ({"infer_backend": "vllm", "engine_args": {"dtype": "auto"}}, "engine_args.dtype has a field of its own"),
        ({"infer_backend": "vllm", "engine_args": {"max-model-len": 5}}, "engine_args.max_model_len"),
        ({"infer_backend": "vllm", "engine_args": {"served_model_name": "x"}}, "application's name"),
    ],
)
def test_a_field_that_the_backend_would_ignore_is_refused(args: dict[str, object], cure: str) -> None:
    """The message gives the reason and the field to use instead."""
    with pytest.raises(ConfigError, match=cure):
        ModelConfig.from_args({"model": "m", **args})


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("tensor_paralel_size", "Did you mean 'tensor_parallel_size'"),
        ("torch_dtype", "Did you mean 'dtype'"),
        ("max_length", "Did you mean 'max_model_len'"),
        ("pp", "Did you mean 'pipeline_parallel_size'"),
        ("zzz", "Known fields: model, infer_backend"),
        ("served_model_name", "application's 'name'"),
        ("autoscaling_config", "deployments"),
        ("gpu_memory_utilization", "engine_args"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_known_one(field: str, hint: str) -> None:
    """Names from swift and vLLM lead to ours."""
    with pytest.raises(ConfigError, match=f"unknown field '{field}'.*{hint}"):
        model_config(**{field: 1})


@pytest.mark.parametrize(
    ("args", "stages", "ranks"),
    [
        ({}, 1, 1),
        ({"tensor_parallel_size": 2}, 1, 2),
        ({"pipeline_parallel_size": 3}, 3, 3),
        ({"pipeline_layers": [1, 3]}, 2, 2),
        ({"pipeline_layers": [4]}, 1, 1),
        ({"pipeline_layers": [1, 3], "pipeline_parallel_size": 2, "tensor_parallel_size": 2}, 2, 4),
    ],
)
def test_the_ranks_are_those_of_all_stages(args: dict[str, object], stages: int, ranks: int) -> None:
    """The number of stages follows from their layers; on the CPU and on GPUs."""
    for device in ("cpu", "cuda"):
        config = model_config(infer_backend="vllm", device=device, **args)
        assert (config.stages, config.ranks) == (stages, ranks)


def test_every_mistake_is_one_line() -> None:
    """Two wrong values and a missing field give one line each."""
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_args({"infer_backend": "tgi", "dtype": "fp8"})
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].rstrip(".") for line in lines] == ["missing field 'model'", "infer_backend", "dtype"]


def test_a_config_cannot_be_changed() -> None:
    """Configs are values."""
    with pytest.raises(ValueError, match="frozen"):
        model_config().dtype = "float32"  # type: ignore[misc]


def test_the_router_has_defaults_and_refuses_unknown_fields() -> None:
    """The router's application needs no args."""
    assert RouterConfig.from_args(None).max_body_bytes == 32 * 2**20
    with pytest.raises(ConfigError, match="Did you mean 'max_body_bytes'"):
        RouterConfig.from_args({"max_body_byte": 1})


def test_a_serve_config_file_is_read(tmp_path: Path) -> None:
    """Models are told from other applications by their import path."""
    file = tmp_path / "serve.yaml"
    file.write_text(
        "applications:\n"
        "- {name: router, import_path: 'serve_app.app:router', route_prefix: /}\n"
        "- {name: a, import_path: 'serve_app.app:model', args: {model: m, infer_backend: pt, dtypo: x}}\n"
    )
    router, model = read_applications(file)
    assert (router.is_model, model.is_model) == (False, True)
    with pytest.raises(ConfigError, match="^a: unknown field 'dtypo'. Did you mean 'dtype'"):
        model.model_settings()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [", "not valid YAML"),
        ("import_path: x", "no list of 'applications'"),
        ("applications: [{name: a}]", "import_path"),
    ],
)
def test_a_file_that_is_no_serve_config_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    """The message names the file."""
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"serve.yaml.*{complaint}"):
        read_applications(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """No traceback for a typo in a path."""
    with pytest.raises(ConfigError, match="nowhere.yaml: No such file"):
        read_applications(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"infer_backend": "auto", "engine_args": {"data_parallel_size": 4}}, "changes the GPUs or processes"),
        ({"infer_backend": "auto", "engine_args": {"pipeline_parallel_size": 4}}, "has a field of its own"),
        ({"infer_backend": "auto", "pipeline_layers": [1, 3], "max_queued_requests": 5}, "name only one backend's"),
        ({"infer_backend": "vllm", "pipeline_layers": [1, 3], "pipeline_parallel_size": 3}, "has 2 stages, but"),
        ({"infer_backend": "vllm", "pipeline_layers": [4, 0]}, "pipeline_layers.1: expected a number above 0"),
        ({"infer_backend": "vllm", "pipeline_layers": []}, "pipeline_layers: expected a list of 1 or more items"),
        ({"infer_backend": "vllm", "pipeline_layers": [1, 3], "num_gpus": 0.5}, "Below 1, num_gpus is a share"),
        (
            {"infer_backend": "vllm", "pipeline_layers": [1, 3], "tensor_parallel_size": 2, "gpu_ids": [0, 1]},
            "gpu_ids names 2 GPUs, but tensor_parallel_size times pipeline_parallel_size is 4",
        ),
        ({"infer_backend": "auto", "quantization": "fp8", "max_queued_requests": 5}, "name only one backend's"),
        ({"infer_backend": "vllm", "engine_args": {"gpu-memory-utilization": "90%"}}, "must be a number above 0"),
        ({"infer_backend": "vllm", "engine_args": {"max_num_batched_tokens": -5}}, "whole number above 0"),
        ({"infer_backend": "vllm", "gpu_ids": [0, 1]}, "The two must be equal"),
        ({"infer_backend": "pt", "gpu_ids": [0]}, "max_memory names the GPUs"),
        ({"infer_backend": "vllm", "num_gpus": 2}, "Below 1, num_gpus is a share"),
        ({"infer_backend": "pt", "kv_cache_memory_bytes": "0GiB"}, "more than zero"),
    ],
)
def test_what_a_backend_cannot_mean_is_refused(fields: dict[str, object], part: str) -> None:
    """With `auto` too, by the backend that the fields decide for."""
    with pytest.raises(ConfigError, match=re.escape(part)):
        ModelConfig.from_args({"model": "m", **fields})


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "just text", "a: [", "applications: null", "applications: [a]",
        "applications: [{name: m, import_path: serve_app.app:model, deployments: hello}]",
        "applications: [{name: m, import_path: x, deployments: [{num_replicas: two}]}]",
        "applications: [{name: m, import_path: x, deployments: [{autoscaling_config: 3}]}]",
        "applications: [{name: m, import_path: x, deployments: [{autoscaling_config: {min_replicas: null}}]}]",
        "applications: [{name: m, import_path: x}, {name: m, import_path: x}]",
    ],
)  # fmt: skip
def test_a_broken_file_is_told_in_words(text: str, tmp_path: Path) -> None:
    """Never a traceback."""
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        read_applications(file)


@pytest.mark.parametrize(
    ("args", "stages", "ranks", "named"),
    [
        ({"max_memory": {1: "10GB", 0: "3GB"}}, 2, 2, (1, 0)),
        ({"max_memory": {0: "3GB"}}, 1, 1, (0,)),
        ({"max_memory": dict.fromkeys(range(4), "3GB"), "tensor_parallel_size": 2}, 2, 4, (0, 1, 2, 3)),
        ({"max_memory": dict.fromkeys(range(2), "3GB"), "tensor_parallel_size": 2}, 1, 2, (0, 1)),
        ({"gpu_ids": [2, 0], "pipeline_parallel_size": 2}, 2, 2, (2, 0)),
        ({"infer_backend": "pt", "max_memory": {0: "3GB", 1: "10GB"}}, 1, 1, (0, 1)),
        (
            {"infer_backend": "auto", "max_memory": {0: "3GB", 1: "10GB"}, "gpu_ids": None, "quantization": "awq"},
            2,
            2,
            (0, 1),
        ),
    ],
)
def test_limits_of_vllm_make_stages(args: dict[str, object], stages: int, ranks: int, named: tuple[int, ...]) -> None:
    """Each named GPU is a stage, or with tensor parallelism so many of them are, in the order in which they are
    written."""
    config = ModelConfig.from_args({"model": "m", "infer_backend": "vllm", **args})
    assert (config.stages, config.ranks, config.named_gpus) == (stages, ranks, named)


def test_speculation_has_vllms_names() -> None:
    """Both backends have the field."""
    for backend in ("pt", "vllm", "auto"):
        config = model_config(infer_backend=backend, speculative={"method": "ngram", "num_speculative_tokens": 3})
        assert config.speculative is not None
        assert config.speculative.model_dump(exclude_none=True) == {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (
            {"method": "eagle"},
            r"^speculative: unknown method 'eagle'\. Write method: ngram, or model: .*\. With vllm, all its methods",
        ),
        ({"num_speculative_tokens": 2}, r"^speculative: there is no method\. Write method: ngram, or model: and the"),
        ({"method": "ngram", "num_tokens": 2}, r"^speculative: unknown field 'num_tokens'\."),
        ({"method": "ngram", "models": "x"}, r"Known fields: method, num_speculative_tokens, .* engine_args"),
        (
            {"method": "ngram", "model": "x"},
            r"^speculative: model belongs to method: draft_model, and the method",
        ),
        ({"model": "x", "prompt_lookup_max": 3}, r"^speculative: prompt_lookup_max belongs to method: ngram, and the"),
        ({"method": "draft_model"}, r"^speculative: method: draft_model needs model: and the folder or id of a smal"),
        ({"model": ""}, r"^speculative\.model: "),
        ({"model": "x", "quantization": "fp8"}, r"^speculative\.quantization: pt does not know 'fp8'\."),
        (
            {"method": "ngram", "num_speculative_tokens": 0},
            r"^speculative\.num_speculative_tokens: expected a number of at least 1, got 0",
        ),
        (
            {"method": "ngram", "num_speculative_tokens": 33},
            r"^speculative\.num_speculative_tokens: expected a number of at most 32, got 33",
        ),
        ({"method": "ngram", "prompt_lookup_min": 5}, "prompt_lookup_min is 5, but prompt_lookup_max is 4"),
        ("ngram", r"^speculative: expected a mapping"),
    ],
)
def test_speculation_that_cannot_be_meant_is_refused(fields: object, complaint: str) -> None:
    """The message names the field and what to write."""
    with pytest.raises(ConfigError, match=complaint):
        model_config(speculative=fields)


def test_a_draft_model_is_a_model_of_pt_of_its_own() -> None:
    """With the type, the device and the sequences of the model that it drafts for. No method means `draft_model`, as
    with vLLM."""
    spec = {"model": "draft", "num_speculative_tokens": 3, "quantization": "bnb-nf4"}
    config = model_config(speculative=spec, dtype="bfloat16", device="cpu", max_num_seqs=7, num_cpus=2)
    assert config.speculative is not None
    assert config.speculative.method == "draft_model"
    draft = config.draft
    assert draft is not None
    assert (draft.model, draft.dtype, draft.device, draft.quantization) == ("draft", "bfloat16", "cpu", "bnb-nf4")
    assert (draft.max_num_seqs, draft.num_cpus, draft.speculative, draft.draft) == (7, 2, None, None)
    assert model_config(speculative={"method": "ngram"}).draft is None
    with pytest.raises(ConfigError, match=r"^speculative.quantization: bnb-nf4 is a method of pt"):
        model_config(infer_backend="vllm", speculative=spec)
    vllm = model_config(infer_backend="vllm", speculative={"model": "draft", "quantization": "fp8"})
    assert vllm.speculative is not None
    assert vllm.speculative.for_vllm == {
        "method": "draft_model",
        "model": "draft",
        "num_speculative_tokens": 4,
        "quantization": "fp8",
    }


def test_speculation_is_set_in_one_place() -> None:
    """engine_args would say it once more, and vLLM's own name leads to the field."""
    with pytest.raises(ConfigError, match="says the same as the field speculative"):
        model_config(
            infer_backend="vllm",
            speculative={"method": "ngram"},
            engine_args={"speculative_config": {"method": "ngram"}},
        )
    with pytest.raises(ConfigError, match="unknown field 'speculative_config'. Did you mean 'speculative'"):
        model_config(speculative_config={"method": "ngram"})
