"""Has every private part of bitsandbytes that this project uses. `tests/contracts/test_bitsandbytes.py` has a test of
each. bitsandbytes itself is imported by transformers, and only for a model that needs it.
"""

import logging

import torch
from torch import nn

# The logger of `bitsandbytes.autograd._functions` writes a line for each layer and pass whose inputs are not float16.
CAST_LOGGER = "bitsandbytes.autograd._functions"


def is_quantized(module: nn.Module) -> bool:
    """Returns whether a module is a linear layer of bitsandbytes, or one whose weight is a tensor of torchao.

    Uses that both have weights that are no plain parameters; seen in bitsandbytes 0.50 and torchao 0.18.
    """
    weight = module._parameters.get("weight")
    return weight is not None and type(weight) is not nn.Parameter


def keep_stored_order(model: nn.Module) -> None:
    """Has layers in 4 bits compute with weights as they are stored.

    On CPUs with AVX512-BF16, the first pass of a `Linear4bit` changes them to an order of their own otherwise. It
    refuses layers with outputs that are not a multiple of 32, rounds inputs to bfloat16, and replaces the scales by
    larger ones, so that the layer would take more than is planned. Uses the attribute `support_avx512bf16_for_cpu`;
    seen in bitsandbytes 0.50.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def flatten_inputs(model: nn.Module) -> None:
    """Has layers of 8 bits take inputs of any number of dimensions, as other linear layers do. DeepSeek's attention has
    four, and bitsandbytes flattens only three.

    Uses the name of the class `Linear8bitLt`; seen in bitsandbytes 0.50.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.register_forward_pre_hook(_flatten)
            module.register_forward_hook(_unflatten)


def _flatten(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    if inputs[0].dim() <= 3:
        return None
    module.outer_shape = inputs[0].shape[:-1]
    return (inputs[0].flatten(0, -2), *inputs[1:])


def _unflatten(module: nn.Module, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
    shape = module.__dict__.pop("outer_shape", None)
    return None if shape is None else output.unflatten(0, shape)


def silence_casts() -> None:
    """Keeps bitsandbytes from writing that it casts inputs to float16, which it does at every layer of every pass.

    Uses the logger `CAST_LOGGER`; seen in bitsandbytes 0.50.
    """
    logging.getLogger(CAST_LOGGER).setLevel(logging.ERROR)
