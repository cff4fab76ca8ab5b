"""Shapes and tensors are read from config.json and headers alone."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from serve_app.engines.pt.model_facts import answer
from serve_app.errors import ConfigError
from serve_app.facts.architecture import read_architecture
from serve_app.facts.checkpoint import DEMO_MODEL, read_checkpoint
from serve_app.facts.engine_facts import TensorFacts
from serve_app.facts.known_facts import answer_from_json
from serve_app.facts.weights import local_tensors, tensors_without_weights

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 10,
    "max_position_embeddings": 64,
}


def test_the_demo_model_is_read_without_loading_it() -> None:
    """Its tensors are as large as its file, less the header."""
    checkpoint = read_checkpoint(DEMO_MODEL)
    assert checkpoint.architecture.model_type == "llama"
    from serve_app.demo import MODEL_DIR

    (file,) = MODEL_DIR.glob("*.safetensors")
    header = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
    assert sum(tensor.bytes_as(None) for tensor in checkpoint.tensors) == file.stat().st_size - header


def test_an_index_decides_which_files_count(tmp_path: Path) -> None:
    """A stray file beside them is not loaded, so it is not counted."""
    for name in ("a", "b", "stray"):
        save_file({f"{name}.weight": torch.zeros(2, 3)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a.weight": "a.safetensors", "b.weight": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [tensor.name for tensor in local_tensors(tmp_path)] == ["a.weight", "b.weight"]
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match="listed in the index, but it is missing"):
        local_tensors(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, struct.pack("<Q", 5) + b"{bad}"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    """Instead of a traceback."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a safetensors file"):
        local_tensors(tmp_path)


def test_without_weights_the_config_makes_the_tensors(tmp_path: Path) -> None:
    """On the meta device, in the process that a plan asks. Reading the folder imports no torch for it."""
    config = QWEN | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = read_checkpoint(str(tmp_path))
    assert checkpoint.tensors == ()
    assert checkpoint.lacks_tensors
    found = answer_from_json("pt", answer({"folder": str(tmp_path), "wants": "tensors"})).facts
    assert isinstance(found, TensorFacts)
    assert {tensor.shape for tensor in found.tensors if "embed" in tensor.name} == {(10, 8)}
    assert sorted(found.tensors, key=str) == sorted(tensors_without_weights(config, "x"), key=str)


@pytest.mark.parametrize(
    ("change", "lacks"),
    [({}, True), ({"model_type": "new"}, False), ({"quantization_config": {"quant_method": "awq"}}, False)],
)
def test_only_known_types_of_whole_weights_get_tensors_from_a_config(
    tmp_path: Path, change: dict[str, object], lacks: bool
) -> None:
    """Of other types the engines say the sizes, and the tensors of a quantised one would be whole."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN | change))
    assert read_checkpoint(str(tmp_path)).lacks_tensors == lacks


def test_what_transformers_does_not_build_is_its_refusal(tmp_path: Path) -> None:
    """So that the answer is kept, and the reason names no folder."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN | {"hidden_size": -8}))
    found = answer_from_json("pt", answer({"folder": str(tmp_path), "wants": "tensors"}))
    assert found.is_refusal
    assert str(tmp_path) not in found.problem


def test_a_cached_model_is_read_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config and headers are on the disk; a cluster without a network must not wait for the hub."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(QWEN))
    save_file({"model.embed_tokens.weight": torch.zeros(10, 8)}, snapshot / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    checkpoint = read_checkpoint("org/name")
    assert [tensor.shape for tensor in checkpoint.tensors] == [(10, 8)]
    assert checkpoint.folder == snapshot  # It may have the files of a processor and code, which engines read.


def test_a_hub_that_cannot_be_reached_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client is not asked: it would try for half a minute. With a proxy it is asked, since it finds its way."""
    import huggingface_hub

    calls: list[bool] = []

    def download(*_: object, local_files_only: bool = False, **__: object) -> str:
        calls.append(local_files_only)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection " * 100)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"\(http://127\.0\.0\.1:1\) cannot be reached: .*hf download org/name"):
        read_checkpoint("org/name")
    assert calls == [True]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"connection no …$"):
        read_checkpoint("org/name")
    assert calls == [True, True, False]


def test_quantised_tensors_keep_their_bytes(tmp_path: Path) -> None:
    """Floats are loaded in the model's type; packed integers stay as they are."""
    tensors = {"q.qweight": torch.zeros(4, 4, dtype=torch.int32), "n.weight": torch.zeros(4, dtype=torch.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert sorted(tensor.bytes_as(2) for tensor in local_tensors(tmp_path)) == [8, 64]


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({}, "ff"),
        ({"sliding_window": 16}, "ff"),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, "fs"),
        ({"model_type": "mistral", "sliding_window": 16}, "ss"),
        ({"model_type": "gemma2", "sliding_window": 16}, "sf"),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}, "sf"),
        ({"model_type": "qwen3_next", "full_attention_interval": 2}, "lf"),
        ({"model_type": "deepseek_v2"}, "mm"),
    ],
)
def test_the_kinds_of_layers(change: dict[str, object], kinds: str) -> None:
    """By `layer_types`, or by each family's older fields."""
    assert "".join(kind[0] for kind in read_architecture(QWEN | change, "x").layers) == kinds


def test_of_an_unknown_architecture_an_outline_is_read() -> None:
    """Its sizes, under the names of its family, and no shape from which a formula could make up a number."""
    plain = {"d_model": 64, "n_layer": 3, "vocab_size": 100, "n_positions": 128, "n_head": 4, "model_type": "rwkv"}
    found = read_architecture(plain, "model: x")
    assert (found.has_formulas, found.is_known_to_vllm) == (False, False)
    assert (found.hidden_size, found.intermediate_size, found.vocabulary) == (64, 256, 100)
    assert (found.max_model_len, found.layers) == (128, ("unknown",) * 3)
    with pytest.raises(ConfigError, match="model: x: config.json: none of num_hidden_layers, n_layer"):
        read_architecture({name: plain[name] for name in plain if name != "n_layer"}, "model: x")


def test_of_a_model_with_an_encoder_an_outline_is_read() -> None:
    """The model of text inside it, and the width of the encoder, also where parts lie in parts."""
    vision = {"hidden_size": 10, "intermediate_size": 40}
    found = read_architecture(QWEN | {"vision_config": vision}, "model: x")
    assert (found.has_formulas, found.encoder_width) == (False, 2 * 10 + 3 * 40)
    nested = {"thinker_config": {"text_config": QWEN, "audio_config": {"d_model": 20}}, "architectures": ["Omni"]}
    found = read_architecture(nested, "model: x")
    assert (found.name, found.hidden_size, found.encoder_width) == ("Omni", QWEN["hidden_size"], 2 * 20 + 3 * 80)


def test_a_config_that_contradicts_itself_is_refused() -> None:
    """With the field and what was found."""
    for change, words in (
        ({"layer_types": ["chunked_attention"] * 2}, "layers of the type 'chunked_attention'"),
        ({"torch_dtype": "float8"}, "the dtype 'float8' is unknown"),
        ({"torch_dtype": "float8", "model_type": "rwkv"}, "the dtype 'float8' is unknown"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_architecture(QWEN | change, "model: x")
    with pytest.raises(ConfigError, match="has no 'hidden_size'"):
        read_architecture({"model_type": "llama"}, "model: x")


def test_a_model_around_a_known_text_model_is_an_outline() -> None:
    """It may have an encoder under any name, so no formula is used for it."""
    found = read_architecture({"model_type": "granite_speech", "encoder_config": {}, "text_config": QWEN}, "model: x")
    assert not found.has_formulas
    assert read_architecture({"text_config": QWEN}, "model: x").has_formulas


def test_an_older_checkpoint_of_bitsandbytes_names_no_method() -> None:
    """It says only with how many bits it is to be loaded."""
    for bits in ("load_in_4bit", "load_in_8bit"):
        config = {**QWEN, "quantization_config": {bits: True}}
        assert read_architecture(config, "x").quantization == "bitsandbytes"
