"""Checkpoints that are quantised already take what the plan says, or are refused with the package that they need."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from serve_app.engines.pt.load.layout import layout_of
from serve_app.engines.pt.load.probe import probe
from serve_app.engines.pt.load.quantization import settle
from serve_app.facts.checkpoint import read_checkpoint
from serve_app.facts.engine_facts import EngineFacts
from serve_app.model_fields import PT_QUANTIZATIONS
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.quantization import unpacked_elements
from serve_app.planning.unplanned import unplanned
from tests.builders import model_config
from tests.engines.pt.core.test_model_runner import assert_greedy, loaded, requests, run_all
from tests.engines.pt.load.test_quantization import assert_equal
from tests.engines.pt.quantized_models import quantized_model, storage_bytes
from tests.engines.pt.tiny_models import generate_one, tiny_model

# Types with formulas and without, with a mixture of experts, and with `Conv1D`.
STORED = ("llama", "qwen2-moe", "gemma3", "gpt2", "bloom")


def planned(folder: Path, dtype: torch.dtype, **fields: object) -> ModelRequest:
    """What is asked of the plan for a folder, with transformers' own facts where there are no formulas."""
    checkpoint = read_checkpoint(str(folder))
    name = str(dtype).removeprefix("torch.")
    config = model_config(model=str(folder), device="cpu", dtype=name, **fields)
    facts = EngineFacts()
    if not checkpoint.architecture.has_formulas:
        facts = EngineFacts(pt=layout_of(AutoConfig.from_pretrained(folder), dtype))
    return ModelRequest("m", config, checkpoint.architecture, checkpoint.tensors, engine_facts=facts)


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder on the CPU, as the engine loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": "cpu"})
    settle(model)
    return model.eval()


def assert_planned(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The plan equals the storages of the loaded model to the byte, before and after a pass."""
    request, model = planned(folder, dtype), load(folder, dtype)
    assert unplanned(request) == ""
    held = sum(block.weights for block in request.blocks(copies_tied=False))
    buffers = 0 if request.pt_facts is None else sum(request.pt_facts.buffers)
    for _ in range(2):
        assert held - buffers == storage_bytes(model)
        with torch.inference_mode():
            assert model(input_ids=torch.arange(1, 9).unsqueeze(0)).logits.isfinite().all()
    return model


@pytest.mark.parametrize("method", PT_QUANTIZATIONS)
@pytest.mark.parametrize("name", STORED)
def test_a_checkpoint_of_bitsandbytes_is_planned_to_the_byte(name: str, method: str, tmp_path: Path) -> None:
    """In both types, and it answers as the model that was saved."""
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        saved = quantized_model(name, method, dtype)
        saved.save_pretrained(folder)
        model = assert_planned(folder, dtype)
        if dtype == torch.float32:
            expected, given = (generate_one(each, (1, 2, 3), 8) for each in (saved, model))
            assert_equal(saved, method, [1, 2, 3], given, expected)


def test_the_largest_weight_of_bitsandbytes_is_made_whole(tmp_path: Path) -> None:
    """While it is computed, the plan has room for it in the model's type: 48 × 32 weights of the tiny model."""
    for method in PT_QUANTIZATIONS:
        quantized_model("llama", method).save_pretrained(tmp_path / method)
        assert unpacked_elements(read_checkpoint(str(tmp_path / method)).tensors) == 48 * 32


def save_in_fp8(model: PreTrainedModel, folder: Path, scheme: str = "dynamic") -> None:
    """Saves a model as a checkpoint in FP8 with one scale for each weight, in DeepSeek's form."""
    model.save_pretrained(folder)
    file, found = folder / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        found[name] = tensor
        if name.endswith("_proj.weight"):
            scale = (tensor.float().abs().max() / 448).reshape(1, 1)
            found[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = scale
    save_file(found, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": scheme,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_fp8_on_the_cpu_is_planned_as_whole_weights(name: str, tmp_path: Path) -> None:
    """transformers makes them whole in the model's type, and drops their scales. They answer joined as alone."""
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        save_in_fp8(tiny_model(name).to(dtype), folder)
        model = assert_planned(folder, dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        if dtype == torch.float32:
            sequences, found = requests(8), probe(loaded(model))
            assert found.reason == ""
            run_all(found.runner, sequences)
            for sequence in sequences:
                assert_greedy(model, sequence)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gptq", "Without gptqmodel and optimum transformers cannot load them at all"),
        ("awq", "Without gptqmodel transformers cannot load them at all"),
        ("compressed-tensors", "Without compressed-tensors transformers cannot load them at all"),
        ("mxfp4", "does not know what mxfp4 weights take here"),
    ],
)
def test_the_plan_names_the_package_of_a_method_that_it_does_not_know(method: str, words: str, tmp_path: Path) -> None:
    """Before anything is loaded."""
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert words in unplanned(planned(tmp_path, torch.float32))
