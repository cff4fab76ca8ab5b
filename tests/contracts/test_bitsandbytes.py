"""What this project uses of bitsandbytes."""

import logging

import torch
from torch import nn

from serve_app.engines.pt import bitsandbytes_internals
from serve_app.engines.pt.bitsandbytes_internals import (
    CAST_LOGGER,
    is_quantized,
    keep_stored_order,
    scales_of,
    separate_outliers,
    silence_casts,
)
from tests.contracts.contract import contract, untested


def test_each_part_has_a_test() -> None:
    """So that an upgrade shows what breaks."""
    assert untested(bitsandbytes_internals) == []


def in_4_bits(outputs: int) -> nn.Module:
    """A linear layer in nf4 with double quantisation."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer: nn.Module = Linear4bit(64, outputs, quant_type="nf4", compute_dtype=torch.float32).to("cpu").eval()
    return layer


def in_8_bits() -> nn.Module:
    """A linear layer of LLM.int8()."""
    from bitsandbytes.nn import Linear8bitLt

    torch.manual_seed(0)
    layer: nn.Module = Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).to("cpu").eval()
    return layer


@contract("bitsandbytes", "the types of quantised weights", is_quantized)
def test_a_quantised_weight_is_no_plain_parameter() -> None:
    """`pack_linears` must leave it alone."""
    assert is_quantized(in_4_bits(32))
    assert is_quantized(in_8_bits())
    assert not is_quantized(nn.Linear(3, 3))
    assert not is_quantized(nn.ReLU())


@contract("bitsandbytes", "the state of quantised weights", scales_of)
def test_a_quantised_weight_has_its_scales() -> None:
    """In 4 bits: 32 scales of 8 bits, their table of 256 values, their scale, their mean, and the 16 values of nf4.

    In 8 bits: a scale for each output, before and after the first pass.
    """
    assert sorted(tensor.numel() for tensor in scales_of(in_4_bits(32))) == [1, 1, 16, 32, 256]
    layer = in_8_bits()
    for _ in range(2):
        assert {tensor.numel() for tensor in scales_of(layer)} == {32}
        with torch.inference_mode():
            layer(torch.randn(2, 64))


@contract("bitsandbytes", "support_avx512bf16_for_cpu of a Linear4bit", keep_stored_order)
def test_a_layer_in_4_bits_keeps_its_order() -> None:
    """Its first pass leaves weights and scales as they are, and 33 outputs are no error."""
    layer = in_4_bits(33)
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    keep_stored_order(layer)
    weight, scales = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    with torch.inference_mode():
        output = layer(torch.randn(2, 64))
    assert output.shape == (2, 33)
    assert torch.equal(layer.weight.data, weight)
    assert torch.equal(layer.weight.quant_state.absmax, scales)


@contract("bitsandbytes", "the state of a Linear8bitLt", separate_outliers)
def test_large_inputs_are_multiplied_apart() -> None:
    """The layer's own threshold is off then, and its answer is nearly that of whole weights."""
    layer = in_8_bits()
    separate_outliers(layer)
    assert (layer.outlier_size, layer.state.threshold) == (6.0, 0.0)
    x = torch.randn(2, 64)
    x[0, 3] = 50.0
    with torch.inference_mode():
        output = layer(x)
        whole = layer.state.CB.float() * (layer.state.SCB / 127).unsqueeze(1)
        expected = nn.functional.linear(x, whole, layer.bias)
    assert torch.allclose(output, expected, atol=0.05)


@contract("bitsandbytes", "the logger of its casts", silence_casts)
def test_casts_are_silent() -> None:
    """Without it, each layer of each pass in another type than float16 writes a line."""
    layer, lines = in_8_bits(), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(CAST_LOGGER)
    level = logger.level
    logger.addHandler(handler)
    try:
        logger.setLevel(logging.WARNING)
        with torch.inference_mode():
            layer(torch.randn(2, 64))
            assert len(lines) == 1
            silence_casts()
            layer(torch.randn(2, 64))
        assert len(lines) == 1
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
