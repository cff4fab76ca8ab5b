"""Says how the KV cache keeps keys and values: as the model makes them, or in 8 bits.

In 8 bits, each key and each value of a head has a scale of its own, in the model's type, so that its largest element
becomes the largest number of the 8 bits. A row is therefore rounded in the same way whatever rows run beside it and
however its prompt was cut into chunks, and an answer does not depend on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# These are the types of an element by the names in a config, with the largest number of each.
TYPES = {
    "fp8": (torch.float8_e4m3fn, 448.0),
    "fp8_e4m3": (torch.float8_e4m3fn, 448.0),
    "fp8_e5m2": (torch.float8_e5m2, 57344.0),
    "int8": (torch.int8, 127.0),
}


@dataclass(frozen=True)
class CacheCodec:
    """Turns keys or values into the tensors that are kept, and back. `name` is a `kv_cache_dtype` of a config, or None
    for the model's own type."""

    name: str | None = None

    def encode(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns what is kept of keys or values of shape (rows, heads, tokens, size): tensors of this shape, of which
        a scale has the size 1."""
        if self.name is None:
            return (states,)
        dtype, most = TYPES[self.name]
        least = torch.finfo(states.dtype).tiny  # A key of zeros has a scale too, since it must not be divided by zero.
        scales = (states.abs().amax(-1, keepdim=True) / most).clamp_(min=least)
        scaled = (states / scales).clamp_(-most, most)  # The scale is rounded, and may be a little too small.
        return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scales

    def decode(self, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the keys or values of what is kept, as a new tensor of the model's type if they are in 8 bits."""
        if self.name is None:
            return kept[0]
        values, scales = kept
        return values.to(scales.dtype).mul_(scales)

    def decoded_bytes(self, kept: Sequence[torch.Tensor]) -> int:
        """Returns the bytes of what `decode` makes anew."""
        return 0 if self.name is None else kept[0].numel() * kept[1].element_size()


WHOLE = CacheCodec()
