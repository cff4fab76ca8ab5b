"""What others wrote is checked as it is read: a broken file is refused with its name, the field and what was found."""

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import ConfigError
from serve_app.facts.architecture import read_architecture
from serve_app.facts.checkpoint import model_path, read_checkpoint
from serve_app.facts.config_fields import MOST_LAYERS, SHAPE
from serve_app.facts.weights import local_tensors
from tests.facts.broken_checkpoints import BASES, CONFIGS, INDEX, SINGLE
from tests.facts.fuzz_checkpoints import Result, judge

QWEN: dict[str, Any] = json.loads((CONFIGS / "qwen2-7b" / "config.json").read_text())
TENSOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def config_folder(folder: Path, content: bytes) -> Path:
    """A folder with such a config.json and the weights of one tensor."""
    (folder / "config.json").write_bytes(content)
    safetensors(folder / SINGLE, {"a": TENSOR})
    return folder


def safetensors(file: Path, header: object, data: int = 24, raw: bytes | None = None) -> Path:
    """A safetensors file with such a header and so many bytes of data."""
    text = json.dumps(header).encode() if raw is None else raw
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return file


def refusal(folder: Path) -> str:
    """The words with which a checkpoint is refused."""
    with pytest.raises(ConfigError) as caught:
        read_checkpoint(str(folder))
    return str(caught.value)


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_a_broken_checkpoint_is_refused_by_name_or_planned(start: int) -> None:
    """Never with a traceback, and each within a second of CPU time. `python -m tests.facts.fuzz_checkpoints` tries
    thousands."""
    results = [judge(seed) for seed in range(start, start + 100)]
    assert not [result for result in results if result.fault]
    assert {bool(result.message) for result in results} == {True, False}, "some are refused and some are planned"


def test_the_fuzz_notices_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of another kind, a refusal that names neither file nor field, and a slow plan are faults."""

    changed = next(seed for seed in range(100) if judge(seed).case.fields)

    def outcome(error: Exception | None, spent: float = 0.0) -> Result:
        def plan_of(folder: Path, seed: int) -> None:
            begin = time.process_time()
            while time.process_time() - begin < spent:
                pass
            if error is not None:
                raise error

        monkeypatch.setattr("tests.facts.fuzz_checkpoints.plan_of", plan_of)
        return judge(changed)

    assert "ZeroDivisionError" in outcome(ZeroDivisionError("x")).fault
    assert "does not name" in outcome(ConfigError("it is broken")).fault
    case = outcome(None).case
    assert not outcome(None).fault
    assert "names none of" in outcome(ConfigError(f"{case.file} is broken")).fault
    assert not outcome(ConfigError(f"{case.file}: {min(case.fields)} is broken")).fault
    monkeypatch.setattr("tests.facts.fuzz_checkpoints.MOST_SECONDS", 0.02)
    assert "it took" in outcome(None, 0.05).fault


def test_real_configs_are_not_refused() -> None:
    """The checks are wider than what public models have."""
    for base in BASES:
        assert read_architecture(json.loads((base / "config.json").read_text()), base.name).layers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "4096"}, 'config.json: hidden_size is "4096" (text); a whole number of at least 1 is needed'),
        ({"hidden_size": [4096]}, "hidden_size is [4096] (a list)"),
        ({"hidden_size": True}, "hidden_size is true (true or false)"),
        ({"hidden_size": 3584.0}, "hidden_size is 3584.0 (a number)"),
        ({"hidden_size": float("nan")}, "hidden_size is NaN (a number)"),
        ({"hidden_size": 10**18}, "a whole number of at most 16777216 is needed"),
        ({"hidden_size": 3585}, "hidden_size is 3585 (a number), and num_attention_heads is 28 (a number)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0 (a number); a whole number of at least 1 is needed"),
        ({"num_hidden_layers": 10**18}, f"a whole number of at most {MOST_LAYERS} is needed"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3 (a number); the first must be a multiple"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear" (text); an object is needed'),
        ({"rope_scaling": {"factor": "8"}}, 'rope_scaling.factor is "8" (text)'),
        ({"rope_scaling": {"factor": float("inf")}}, "rope_scaling.factor is Infinity"),
        ({"rope_parameters": {"full": {"type": 4}}}, "rope_parameters.full.type is 4"),
        ({"quantization_config": "awq"}, 'quantization_config is "awq" (text)'),
        ({"quantization_config": {"quant_method": 4}}, "quantization_config.quant_method is 4"),
        ({"architectures": "Qwen2ForCausalLM"}, "architectures is"),
        ({"architectures": [4]}, "architectures is [4] (a list); item 0 is 4 (a number), where a printable text"),
        ({"architectures": ["\ud800"]}, "\\ud800"),
        ({"text_config": "x"}, 'text_config is "x" (text); an object is needed'),
        ({"text_config": QWEN | {"vocab_size": "x"}}, 'text_config.vocab_size is "x"'),
        ({"text_config": {"model_type": 4}}, "text_config.model_type is 4"),
        ({"model_type": ["qwen2"]}, 'model_type is ["qwen2"] (a list)'),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 items, and num_hidden_layers is 28"),
        ({"layer_types": ["full_attention"] * 27 + [4]}, "item 27 is 4 (a number)"),
        ({"layer_types": ["linear_attention"] * 28}, "layers of the type 'linear_attention' in a qwen2 model"),
        ({"layer_types": ["sliding_attention"] * 28, "sliding_window": None}, "sliding_window is missing or 0"),
        ({"num_experts": 10**6}, "num_experts is 1000000 (a number); a whole number of at most 65536 is needed"),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false" (text); true or false is needed'),
        ({"torch_dtype": {"a": 1}}, "torch_dtype is an object with 1 field"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"model_type": "qwen3_next", "full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"hidden_size": 1 << 4000}, "hidden_size is 2^4000 or more"),
        ({"vision_config": {"a": 1}, "num_hidden_layers": 10**9}, "none of num_hidden_layers, n_layer, n_layers"),
        ({"text_config": {"model_type": "new", "architectures": "x"}}, 'text_config.architectures is "x" (text)'),
        ({"text_config": {"model_type": "new", "hidden_size": True}}, "none of text_config.hidden_size"),
    ],
)
def test_a_field_is_refused_with_what_was_found(change: dict[str, Any], words: str) -> None:
    """And with what is needed."""
    with pytest.raises(ConfigError) as caught:
        read_architecture(QWEN | change, "model: m")
    assert str(caught.value).startswith("model: m: config.json")
    assert words in str(caught.value)


def test_every_number_of_the_table_has_a_bound() -> None:
    """Whatever a file says, a plan stays small."""
    for name, kind in SHAPE.items():
        for value in (10**18, -1, float("inf"), float("nan"), "1" * 1000, [1] * 10**5, object()):
            assert kind.problem(value), f"{name} takes {value}"


def test_null_is_as_good_as_nothing() -> None:
    """Engines take their default for both."""
    for model_type, name in (
        ("qwen3_next", "full_attention_interval"),
        ("gemma3_text", "sliding_window_pattern"),
        ("gemma3_text", "tie_word_embeddings"),
        ("qwen2", "max_window_layers"),
        ("qwen2", "architectures"),
    ):
        config = {key: value for key, value in QWEN.items() if key != name} | {"model_type": model_type}
        config |= {"sliding_window": 16, "use_sliding_window": True}
        assert read_architecture(config | {name: None}, "m") == read_architecture(config, "m")
    scaled = QWEN | {"rope_scaling": {"type": "linear", "factor": None}}
    assert read_architecture(scaled, "m").rotary_elements == read_architecture(QWEN, "m").rotary_elements


@pytest.mark.parametrize("model_type", ["deepseek_v2", "qwen3_next"])
def test_a_size_that_a_config_leaves_out_is_the_one_that_engines_take(model_type: str) -> None:
    """It was 0 before, which made caches of no size."""
    from transformers import AutoConfig

    found = read_architecture(QWEN | {"model_type": model_type}, "m")
    default = AutoConfig.for_model(model_type)
    if model_type == "deepseek_v2":
        assert (found.latent_size, found.rope_size) == (default.kv_lora_rank, default.qk_rope_head_dim)
        assert found.key_size == default.qk_nope_head_dim + default.qk_rope_head_dim
        assert found.value_size == default.v_head_dim
    else:
        assert found.linear_key_heads == default.linear_num_key_heads
        assert found.linear_value_heads == default.linear_num_value_heads
        assert found.linear_key_size == default.linear_key_head_dim
        assert found.linear_value_size == default.linear_value_head_dim
        assert found.linear_kernel == default.linear_conv_kernel_dim


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not readable JSON: Expecting value: line 1 column 1"),
        (b"\xff\xfe", "is not UTF-8 text: byte 0 is 0xff"),
        (b"[1]", "holds [1] (a list); a JSON object is needed"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"hidden_size": 1, "hidden_size": 2}', 'the key "hidden_size" appears twice with different values'),
        (json.dumps(QWEN).encode().replace(b"3584", b"9" * 5000), "hidden_size is Infinity (a number)"),
        (b" " * (9 * 2**20), "has more than 8388608 bytes"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    """With the place where it breaks."""
    message = refusal(config_folder(tmp_path, content))
    assert message.startswith(f"model: {tmp_path / 'config.json'} ") or "config.json: hidden_size" in message
    assert words in message


def test_a_config_may_have_what_python_writes(tmp_path: Path) -> None:
    """Working models have `Infinity` in fields that do not matter here, and keys that are there twice."""
    text = json.dumps(QWEN)[:-1] + ', "time_step_limit": [0.0, Infinity], "vocab_size": 152064}'
    assert read_checkpoint(str(config_folder(tmp_path, text.encode()))).architecture.vocabulary == 152064


@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX])
@pytest.mark.parametrize(
    ("kind", "words"),
    [("folder", "is a folder"), ("pipe", "is a pipe"), ("device", "is a device"), ("loop", "cannot be read")],
)
def test_only_regular_files_are_opened(tmp_path: Path, name: str, kind: str, words: str) -> None:
    """A pipe would block for ever, and a device has no end."""
    file = config_folder(tmp_path, json.dumps(QWEN).encode()) / name
    file.unlink(missing_ok=True)
    make = {
        "folder": file.mkdir,
        "pipe": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "loop": lambda: file.symlink_to(file),
    }
    make[kind]()
    message = refusal(tmp_path)
    assert str(file) in message
    assert words in message


def test_files_of_the_hubs_cache_are_links(tmp_path: Path) -> None:
    """They lead to a file outside of the folder, so links are followed."""
    folder = config_folder(tmp_path, json.dumps(QWEN).encode())
    (folder / SINGLE).rename(tmp_path.parent / "blob")
    (folder / SINGLE).symlink_to("../blob")
    assert [tensor.name for tensor in local_tensors(folder)] == ["a"]


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": TENSOR | {"shape": "2x3"}}, 'tensor "a": shape is "2x3" (text); a list is needed'),
        ({"a": TENSOR | {"shape": [2, "3"]}}, 'shape is [2, "3"] (a list); item 1 is "3" (text)'),
        ({"a": TENSOR | {"shape": [2, True]}}, "item 1 is true"),
        ({"a": TENSOR | {"shape": [2, -3]}}, "item 1 is -3"),
        ({"a": TENSOR | {"shape": [2**53] * 64}}, "takes more than any file has"),
        ({"a": TENSOR | {"shape": [1] * 65}}, "a list of at most 64 items is needed"),
        (
            {"a": TENSOR | {"shape": [2, 4]}},
            "data_offsets [0, 24] have 24 bytes, and shape [2, 4] (a list) of F32 takes 32",
        ),
        ({"a": TENSOR | {"dtype": "F128"}}, 'dtype is "F128" (text); one of BF16'),
        ({"a": TENSOR | {"data_offsets": [24, 0]}}, "data_offsets [24, 0] have -24 bytes"),
        ({"a": TENSOR | {"data_offsets": [-24, 0]}}, "data_offsets is [-24, 0]"),
        ({"a": TENSOR | {"data_offsets": [0]}}, "two numbers are needed"),
        ({"a": TENSOR | {"data_offsets": [24, 48]}}, "no tensor has the bytes 0 to 24 of its data"),
        ({"a": TENSOR, "b": TENSOR}, 'data_offsets of the tensors "a" and "b" overlap'),
        ({"a": TENSOR, "b": TENSOR | {"data_offsets": [24, 48]}}, "data_offsets end at 48, and the file has 24 bytes"),
        ({"a": [1]}, 'tensor "a" is [1] (a list); an object is needed'),
        ({"a": {"dtype": "F32", "shape": [2, 3]}}, "data_offsets is missing"),
        ({"a": TENSOR | {"shape": [float("nan")]}}, "item 0 is NaN"),
        ({"x" * 1001: TENSOR}, "its name has 1001 characters"),
        ({"__metadata__": {"format": 3}, "a": TENSOR}, "__metadata__ must be an object of texts"),
        ([], "its header is not a JSON object"),
        ({}, "data_offsets end at 0, and the file has 24 bytes of data"),
    ],
)
def test_a_header_follows_the_laws_of_safetensors(tmp_path: Path, header: object, words: str) -> None:
    """A refusal names the tensor and its field."""
    file = safetensors(tmp_path / SINGLE, header)
    with pytest.raises(ConfigError) as caught:
        local_tensors(tmp_path)
    assert str(caught.value).startswith(f"model: {file} is not a safetensors file: ")
    assert words in str(caught.value)


def test_a_tensor_that_a_header_lists_twice_is_named(tmp_path: Path) -> None:
    """The readers of JSON keep the last one without a word."""
    entry = json.dumps(TENSOR)
    other = json.dumps(TENSOR | {"data_offsets": [24, 48]})
    safetensors(tmp_path / SINGLE, None, 48, f'{{"a": {entry}, "a": {other}}}'.encode())
    with pytest.raises(ConfigError, match='tensor "a" is listed twice'):
        local_tensors(tmp_path)


@pytest.mark.parametrize("length", [10**10, 2**64 - 1, 100_000_001])
def test_a_long_header_is_not_read(tmp_path: Path, length: int) -> None:
    """Its length alone is looked at."""
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ConfigError, match=f"its header would have {length} bytes; at most 100000000 are allowed"):
        local_tensors(tmp_path)


def test_a_header_without_tensors_is_no_model(tmp_path: Path) -> None:
    """It must not count as a folder without weights."""
    safetensors(tmp_path / SINGLE, {}, 0)
    with pytest.raises(
        ConfigError, match="model.safetensors is not a safetensors file of a model: it lists no tensors"
    ):
        local_tensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"\x80\x03", "is not UTF-8 text"),
        (b"{}", "weight_map is missing"),
        (b'{"weight_map": []}', "weight_map is [] (a list); an object is needed"),
        (b'{"weight_map": {}}', "weight_map has 0 tensors"),
        (b'{"weight_map": {"a": 3}}', 'weight_map."a" is 3 (a number); a printable text'),
        (b'{"weight_map": {"a": ["x"]}}', 'weight_map."a" is ["x"] (a list)'),
        (b'{"weight_map": {"a": "../../etc/passwd"}}', 'is "../../etc/passwd" (text); the name of a file in the index'),
        (b'{"weight_map": {"a": "/etc/passwd"}}', 'is "/etc/passwd" (text); the name of a file in the index'),
        (b'{"weight_map": {"a": "x/../../y.safetensors"}}', "the name of a file in the index's own folder is needed"),
        (b'{"weight_map": {"a": "config.json"}}', "the name of a .safetensors file is needed"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is listed in the index, but it is missing"),
    ],
)
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, index: bytes, words: str) -> None:
    """What it names outside of it is never opened."""
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(ConfigError) as caught:
        local_tensors(tmp_path)
    assert INDEX in str(caught.value)
    assert words in str(caught.value)


def test_a_long_index_is_read_too(tmp_path: Path) -> None:
    """Those of models with many experts have more than 8 MiB, and are decoded without their other fields."""
    names = {f"{'x' * 900}{number}": "a.safetensors" for number in range(10_000)}
    index = {"metadata": {"total_size": 24}, "weight_map": names}
    safetensors(tmp_path / "a.safetensors", {"a": TENSOR})
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert [tensor.name for tensor in local_tensors(tmp_path)] == ["a"]
    for wrong in (3, ["a.safetensors"]):
        (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": names | {"z": wrong}}))
        with pytest.raises(ConfigError, match=r"index\.json is not an index of safetensors files: .*weight_map"):
            local_tensors(tmp_path)


def test_a_tensor_is_in_one_file(tmp_path: Path) -> None:
    """Otherwise it would be counted twice."""
    for name in ("x", "y"):
        safetensors(tmp_path / f"{name}.safetensors", {"a": TENSOR})
    with pytest.raises(ConfigError, match=r'y.safetensors: tensor "a" is in x.safetensors too. Remove one'):
        local_tensors(tmp_path)


def test_tensors_of_equal_experts_are_counted_as_one(tmp_path: Path) -> None:
    """A plan of 92,000 tensors costs as little as one of some hundreds."""
    names = [f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in range(4)]
    header = {name: TENSOR | {"data_offsets": [24 * place, 24 * place + 24]} for place, name in enumerate(names)}
    safetensors(tmp_path / SINGLE, header, 96)
    (tensor,) = local_tensors(tmp_path)
    assert (tensor.name, tensor.count) == ("model.layers.0.mlp.experts.*.up_proj.weight", 4)
    assert (tensor.elements, tensor.bytes_as(None), tensor.bytes_as(2)) == (24, 96, 48)


def test_a_broken_model_of_the_hubs_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not asked for it again: its own client would take the same file."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("abc")
    config_folder(snapshot, b"{")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"config.json is not readable JSON"):
        read_checkpoint("org/name")


@pytest.mark.parametrize("model", ["a" * 5000, "a\x00b", "~nobody-has-this-name/x", "what is this?", "\ud800"])
def test_a_name_that_is_no_model_is_refused(model: str) -> None:
    """A folder's name may be too long, or have signs that no file can have."""
    with pytest.raises(ConfigError, match="model: "):
        read_checkpoint(model)


def test_a_config_that_is_no_file_is_not_missing(tmp_path: Path) -> None:
    """The folder is taken for a model's, so that reading says what is wrong with it."""
    (tmp_path / "config.json").mkdir()
    assert model_path(str(tmp_path)) == str(tmp_path)
