"""Says what weights take in pt that are quantised while they load (`quantization: bnb-nf4` or `bnb-int8`).

transformers (5.19) quantises linear layers alone. Embeddings, head, norms, biases, routers and the fused experts of a
mixture stay in the model's type, so most of such a mixture stays whole. The sizes are those of the storages that
bitsandbytes 0.50 makes (compared in tests/engines/pt/load/test_quantization.py).
"""

import re
from dataclasses import dataclass

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
