"""Has every private part of bitsandbytes that this project uses. `tests/contracts/test_bitsandbytes.py` has a test of
each. bitsandbytes itself is imported by transformers, and only for a model that needs it.
"""

import logging

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


def silence_casts() -> None:
    """Keeps bitsandbytes from writing that it casts inputs to float16, which it does at every layer of every pass.

    Uses the logger `CAST_LOGGER`; seen in bitsandbytes 0.50.
    """
    logging.getLogger(CAST_LOGGER).setLevel(logging.ERROR)
