"""The tiny models, quantised while they load from a folder as the engine loads them."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from serve_app.engines.measure import tensor_bytes
from serve_app.engines.pt.load.quantization import quantization_options, settle, weight_tensors
from tests.builders import model_config
from tests.engines.pt.tiny_models import tiny_model


def quantized_model(name: str, method: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model of `CONFIGS`, quantised by one of pt's methods."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(name).save_pretrained(folder)
        return load_quantized(Path(folder), method, dtype)


def load_quantized(folder: Path, method: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, quantised on the CPU by the engine's own options."""
    config = model_config(model=str(folder), device="cpu", quantization=method)
    options = quantization_options(config, AutoConfig.from_pretrained(folder), dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": "cpu"}, **options
    )
    settle(model)
    return model.eval()


def storage_bytes(module: torch.nn.Module) -> int:
    """The bytes of all storages of a module's weights, each once."""
    return sum(tensor_bytes(weight_tensors(module)).values())
