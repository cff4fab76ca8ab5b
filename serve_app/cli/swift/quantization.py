"""Says what becomes of swift's arguments for quantising weights while they load."""

from collections.abc import Mapping

from serve_app.cli.swift.command import SwiftCommand

NAMES = ("quant_bits", "quant_method", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
# By swift's method and bits. swift's own default of `bnb_4bit_quant_type` is nf4.
METHODS: Mapping[tuple[str, str], str] = {("bnb", "4"): "bnb-nf4", ("bnb", "8"): "bnb-int8"}
REASONS: Mapping[str, str] = {
    "hqq": "hqq is not here. With pt, quantization: bnb-nf4 (4 bits) or bnb-int8 (8 bits) is nearest, and without "
    "calibration too.",
    "eetq": "eetq is not here. With pt, quantization: bnb-int8 has the same 8 bits of weights.",
    "quanto": "quanto is not here. With pt, quantization: bnb-nf4 (4 bits) or bnb-int8 (8 bits) is nearest.",
    "fp8": "pt rounds no weights to fp8. Use quantization: bnb-int8, which takes as much memory, or infer_backend: "
    "vllm with quantization: fp8.",
}


def quantization_of(parsed: SwiftCommand, backend: str) -> tuple[str | None, str]:
    """Returns pt's method for a command, or None and why there is none."""
    method, bits = parsed.one("quant_method", ""), parsed.one("quant_bits", "")
    if backend != "pt":
        return None, (
            "swift quantizes weights while they load with its transformers backend only. Use a quantized checkpoint "
            "(swift export makes one), quantization: fp8, or infer_backend: pt, to which it carries over."
        )
    if method in REASONS:
        return None, REASONS[method]
    if (method, bits) not in METHODS:
        return None, "pt quantizes by --quant_method bnb with --quant_bits 4 or 8, and both have to be given."
    if METHODS[method, bits] == "bnb-nf4" and parsed.one("bnb_4bit_quant_type", "nf4") != "nf4":
        return None, "pt has 4 bits as nf4 only, which is more exact than fp4. Set quantization: bnb-nf4."
    return METHODS[method, bits], ""
