"""Says what weights take in pt that are quantised while they load (`quantization: bnb-nf4` or `bnb-int8`), or that are
stored so.

transformers (5.19) quantises linear layers alone. Embeddings, head, norms, biases, routers and the fused experts of a
mixture stay in the model's type, so most of such a mixture stays whole. The sizes are those of the storages that
bitsandbytes 0.50 makes (compared in tests/engines/pt/load/test_quantization.py).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from serve_app.facts.architecture import Architecture
from serve_app.facts.weights import FLOATS, Tensor

# bitsandbytes has a scale for so many weights of nf4, and a scale in float32 for so many of these scales of 8 bits
# (double quantisation).
NF4_BLOCK, NF4_SCALE_BLOCK = 64, 256
# Beside them, each weight in nf4 has the mean of its scales, and the tables of the 16 values of nf4 and of the 256 of
# the scales, in float32.
NF4_TABLES = 4 * (1 + 16 + 256)
# These are the bits of a weight.
BITS = {"bnb-nf4": 4, "bnb-int8": 8}
# The layers of these have their weights the other way round (`Conv1D`).
_CONV1D = frozenset({"gpt2"})
_IN_A_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.(.+)\.weight$")
# In the layers of known architectures, these modules with two dimensions are no linear layers in transformers.
_WHOLE = re.compile(r"(?:^|\.)(?:experts\..*|gate|\w*norm\w*)$")

# transformers needs these packages for a checkpoint, or a method, of this name.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "aqlm": ("aqlm",), "awq": ("gptqmodel",), "bitsandbytes": ("bitsandbytes",), "bnb-int8": ("bitsandbytes",),
    "bnb-nf4": ("bitsandbytes",), "compressed-tensors": ("compressed_tensors",), "gptq": ("gptqmodel", "optimum"),
    "hqq": ("hqq",), "torchao": ("torchao",), "vptq": ("vptq",),
}  # fmt: skip
# bitsandbytes stores these beside a weight, and keeps them in float32 or in 8 bits.
BNB_SCALES = re.compile(r"(?:\.absmax|\.nested_absmax|\.quant_map|\.nested_quant_map|\.SCB|\.offset)$")
# It reads these while it loads and keeps nothing of them but the mean of the scales.
_BNB_NOTES = re.compile(r"(?:\.quant_state\.bitsandbytes__\w+|\.weight_format)$")
_NESTED = ".nested_absmax"
# transformers multiplies a weight in FP8 by these and drops them when it makes it whole.
_FP8_SCALES = re.compile(r"_scale_inv$")
_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True)
class Quantized:
    """These are the bytes of one quantised weight: its own `values`, and the `scales` with their tables."""

    values: int
    scales: int

    @property
    def bytes(self) -> int:
        """Returns the bytes of both."""
        return self.values + self.scales


def quantized(method: str, outputs: int, inputs: int) -> Quantized:
    """Returns what the weight of a linear layer takes, which does not depend on the model's own type."""
    elements = outputs * inputs
    if method == "bnb-nf4":
        scales = -(-elements // NF4_BLOCK)
        return Quantized(-(-elements // 2), scales + 4 * -(-scales // NF4_SCALE_BLOCK) + NF4_TABLES)
    return Quantized(elements, 4 * outputs)  # A scale in float32 for each output.


def quantized_tensor(method: str, tensor: Tensor, architecture: Architecture) -> Quantized | None:
    """Returns what a tensor of a checkpoint becomes, or None if it stays whole. The architecture has formulas."""
    found = _IN_A_LAYER.search(tensor.name)
    is_linear = found is not None and len(tensor.shape) == 2 and not _WHOLE.search(found[1])
    if not is_linear or tensor.dtype not in FLOATS:
        return None
    outputs, inputs = reversed(tensor.shape) if architecture.model_type in _CONV1D else tensor.shape
    return quantized(method, outputs, inputs)


def loading_bytes(method: str, elements: int, element_bytes: int) -> int:
    """Returns the most that a weight of so many elements takes beside its own figure while it is quantised.

    It is there whole, and for 8 bits there is a copy of it in float16.
    """
    return elements * (element_bytes + (2 if method == "bnb-int8" else 0))


def held_tensors(method: str, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Returns what transformers (5.19) holds of a checkpoint that is quantised by `method`, or None if that is not
    known.

    Weights of bitsandbytes stay as they are stored. Those in FP8 become whole weights in the model's type, on the CPU
    and on old cards (`cards.py`). The sizes are compared with loaded models in
    tests/engines/pt/load/test_stored_quantization.py.
    """
    if not tensors:
        return None
    if method == "bitsandbytes":
        kept = [tensor for tensor in tensors if not _BNB_NOTES.search(tensor.name)]
        means = [
            replace(tensor, name=f"{tensor.name.removesuffix(_NESTED)}.offset", dtype="F32", shape=())
            for tensor in tensors
            if tensor.name.endswith(_NESTED)
        ]
        return (*kept, *means)
    if method == "fp8":
        whole = [
            replace(tensor, dtype="BF16") if tensor.dtype in _FP8 else tensor
            for tensor in tensors
            if not _FP8_SCALES.search(tensor.name)
        ]
        return tuple(whole) if all(tensor.dtype in FLOATS for tensor in whole) else None
    return None


def unpacked_elements(tensors: Sequence[Tensor]) -> int:
    """Returns the weights in the largest tensor of bitsandbytes, which many kernels make whole while it is computed, or
    0 if there is none. A byte holds two weights in 4 bits."""
    names = {tensor.name for tensor in tensors}
    sizes = [
        tensor.elements // tensor.count * (2 if f"{tensor.name}.absmax" in names else 1)
        for tensor in tensors
        if f"{tensor.name}.absmax" in names or f"{tensor.name.removesuffix('.weight')}.SCB" in names
    ]
    return max(sizes, default=0)
