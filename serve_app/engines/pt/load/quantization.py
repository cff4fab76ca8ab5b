"""Quantises a model's weights while they load, through transformers' own quantizers, and says what a checkpoint that is
quantised already lacks here.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from serve_app.config import ModelConfig
from serve_app.engines.pt.bitsandbytes_internals import keep_stored_order, separate_outliers, silence_casts
from serve_app.engines.pt.transformers_internals import convertible_linears
from serve_app.errors import ConfigError, EngineError
from serve_app.planning.quantization import quantized

# These packages quantise, or read what was quantised, by method. Checkpoints of other methods are left to
# transformers.
PACKAGES = {
    "awq": "gptqmodel", "bitsandbytes": "bitsandbytes", "bnb-int8": "bitsandbytes", "bnb-nf4": "bitsandbytes",
    "compressed-tensors": "compressed_tensors", "gptq": "gptqmodel", "torchao": "torchao",
}  # fmt: skip


def quantization_options(config: ModelConfig, hf_config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the options of `from_pretrained` that quantise a model of this config in `dtype`, which are none for a
    model that stays as it is stored.

    Raises ConfigError for a checkpoint that is quantised already, and EngineError if a package is missing.
    """
    stored = stored_method(hf_config)
    if config.quantization is None:
        if stored is not None:
            _require_package(stored, f"model: {config.model} is quantised by {stored}, which needs")
        return {}
    if stored is not None:
        raise ConfigError(
            f"quantization: {config.quantization}, but {config.model} is quantised already (by {stored}). Leave "
            "quantization out, or use the checkpoint with whole weights."
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


def storage_bytes(module: nn.Module) -> int:
    """Returns the bytes of all storages of a module's parameters and saved buffers, with the scales and tables of
    quantised weights. Each storage counts once."""
    found: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.device.type != "meta":
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            for name in ("quant_state", "SCB"):
                add(getattr(value, name, None))
        elif hasattr(value, "absmax"):  # It is bitsandbytes' state of a weight, which may hold that of its scales.
            for name in ("absmax", "code", "offset", "state2"):
                add(getattr(value, name, None))
        elif hasattr(value, "threshold") and hasattr(value, "CB"):  # After a pass, 8 bits have their scales here.
            add(value.SCB)

    saved = module.state_dict().keys()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in saved or isinstance(tensor, nn.Parameter):
            add(tensor)
    for part in module.modules():
        add(getattr(part, "state", None))
    return sum(found.values())


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
    package = PACKAGES.get(method)
    if package is not None and find_spec(package) is None:
        name = package.replace("_", "-")
        raise EngineError(f"{what} the package {name}, which is not installed here. Install it (pip install {name}).")
