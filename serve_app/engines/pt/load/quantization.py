"""Quantises a model's weights while they load, through transformers' own quantizers, and says what a checkpoint that is
quantised already lacks here.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from serve_app.config import ModelConfig
from serve_app.engines.pt.bitsandbytes_internals import (
    is_quantized,
    keep_stored_order,
    scales_of,
    separate_outliers,
    silence_casts,
)
from serve_app.engines.pt.transformers_internals import convertible_linears
from serve_app.errors import ConfigError, EngineError
from serve_app.model_fields import AUTO_QUANTIZATION
from serve_app.planning.quantization import PACKAGES, quantized


def quantization_options(config: ModelConfig, hf_config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the options of `from_pretrained` that quantise a model of this config in `dtype`, which are none for a
    model that stays as it is stored.

    Raises ConfigError for a checkpoint that is quantised already, and EngineError if a package is missing.
    """
    stored = stored_method(hf_config)
    if config.quantization is None:
        if stored is not None:  # Checkpoints of methods that need no package are left to transformers.
            _require_package(stored, f"model: {config.model} is quantised by {stored}, which needs")
        return {}
    if stored is not None:
        raise ConfigError(
            f"quantization: {config.quantization}, but {config.model} is quantised already (by {stored}). Leave "
            "quantization out, or use the checkpoint with whole weights."
        )
    if config.quantization == AUTO_QUANTIZATION:
        raise EngineError(
            "quantization: auto is chosen by the memory plan before a model is loaded, and there was none. Name the "
            "method, or leave quantization out."
        )
    _require_package(config.quantization, f"quantization: {config.quantization} needs")
    return {"quantization_config": _quantizer(config.quantization, dtype)}


def stored_method(hf_config: Any) -> str | None:
    """Returns the method by which a checkpoint is quantised, by the name in its config.json, or None."""
    found = getattr(hf_config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if method is None:  # Older checkpoints of bitsandbytes say only this.
        return "bitsandbytes"
    return str(getattr(method, "value", method))


def settle(model: PreTrainedModel) -> None:
    """Has quantised layers keep what was planned for them and compute each row as if it were alone, and keeps their
    library from writing a line for each layer of each pass."""
    keep_stored_order(model)
    separate_outliers(model)
    silence_casts()


def quantized_sizes(model: PreTrainedModel, method: str) -> dict[str, int]:
    """Returns the bytes of each weight of a model on the meta device that `method` quantises, by its name."""
    return {f"{name}.weight": quantized(method, *shape).bytes for name, shape in convertible_linears(model).items()}


def weight_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Returns a module's parameters and saved buffers, with the scales and tables of quantised weights."""
    saved = module.state_dict().keys()
    named = (*module.named_parameters(), *module.named_buffers())
    found = [tensor for name, tensor in named if name in saved or isinstance(tensor, nn.Parameter)]
    return found + [tensor for part in module.modules() if is_quantized(part) for tensor in scales_of(part)]


def _quantizer(method: str, dtype: torch.dtype) -> Any:
    if method == "bnb-nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True)


def _require_package(method: str, what: str) -> None:
    for package in PACKAGES.get(method, ()):
        if find_spec(package) is None:
            name = package.replace("_", "-")
            raise EngineError(
                f"{what} the package {name}, which is not installed here. Install it (pip install {name})."
            )
