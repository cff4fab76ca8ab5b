"""Has every private part of bitsandbytes that this project uses. `tests/contracts/test_bitsandbytes.py` has a test of
each. bitsandbytes itself is imported by transformers, and only for a model that needs it.
"""

import logging

import torch
from torch import nn

# The logger of `bitsandbytes.autograd._functions` writes a line for each layer and pass whose inputs are not float16.
CAST_LOGGER = "bitsandbytes.autograd._functions"
# A weight in 8 bits is its scale times its value divided by this.
INT8_MOST = 127


def is_quantized(module: nn.Module) -> bool:
    """Returns whether a module has a quantised weight, which is no plain parameter.

    Uses that the weights of bitsandbytes are of types of their own; seen in bitsandbytes 0.50.
    """
    weight = module._parameters.get("weight")
    return weight is not None and type(weight) is not nn.Parameter


def scales_of(module: nn.Module) -> list[torch.Tensor]:
    """Returns the scales of a quantised weight and their tables. Several weights may share a table.

    Uses `quant_state` of a weight in 4 bits, with `absmax`, `code`, `offset` and `state2`, and `SCB` of a weight in 8
    bits, which is in the `state` of its module after the first pass; seen in bitsandbytes 0.50.
    """
    weight = module._parameters["weight"]
    outer = getattr(weight, "quant_state", None)
    found = [
        getattr(state, name, None)
        for state in (outer, getattr(outer, "state2", None))
        for name in ("absmax", "code", "offset")
    ]
    found += [getattr(state, "SCB", None) for state in (weight, getattr(module, "state", None))]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


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


def separate_outliers(model: nn.Module) -> None:
    """Has layers of 8 bits compute each row of a batch as if it were alone.

    Inputs of such a size that 8 bits would lose the others (`threshold`, 6 by default) are multiplied in the model's
    type. bitsandbytes does so with whole columns of a batch, of which one row has such an input, so an answer would
    depend on the other requests. Here only these inputs themselves are taken out. Inputs may also have any number of
    dimensions: DeepSeek's attention has four, and bitsandbytes flattens only three.

    Uses the name of the class `Linear8bitLt`, and `threshold`, `CB` and `SCB` of its `state`; seen in bitsandbytes
    0.50.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.outlier_size, module.state.threshold = module.state.threshold, 0.0
            module.register_forward_pre_hook(_take_outliers_out)
            module.register_forward_hook(_add_outliers)


def _take_outliers_out(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    rows = inputs[0].flatten(0, -2)
    is_outlier = rows.abs() >= module.outlier_size
    columns = is_outlier.any(0).nonzero().flatten()
    module.outliers = inputs[0].shape[:-1], columns, rows[:, columns] * is_outlier[:, columns]
    return (rows.masked_fill(is_outlier, 0), *inputs[1:])


def _add_outliers(module: nn.Module, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    shape, columns, outliers = module.__dict__.pop("outliers")
    if columns.numel():
        state = module.state
        weight = state.CB[:, columns].to(output.dtype) * (state.SCB / INT8_MOST).to(output.dtype).unsqueeze(1)
        output = output + outliers.to(output.dtype) @ weight.T
    return output.unflatten(0, shape)


def silence_casts() -> None:
    """Keeps bitsandbytes from writing that it casts inputs to float16, which it does at every layer of every pass.

    Uses the logger `CAST_LOGGER`; seen in bitsandbytes 0.50.
    """
    logging.getLogger(CAST_LOGGER).setLevel(logging.ERROR)
