"""Has linear layers on the CPU with weights in oneDNN's own order.

`torch.nn.functional.linear` passes float32 to MKL, which orders the weights anew in every call and does not use the
widest vector instructions of every maker's CPUs. vLLM's CPU backend and torch's own inductor use oneDNN with weights
that are ordered once. On a 2-core AMD machine this is 2.3 to 3.4 times as fast at 8 to 256 rows
(`python -m benchmarks.packed_linear`). The ordered weights replace the plain ones, so they cost no memory. Only a head
that is tied to the input embedding becomes a copy.
"""

import torch
from torch import nn

from serve_app.engines.pt.accelerate_internals import has_hook, set_hooked_forward
from serve_app.engines.pt.bitsandbytes_internals import is_quantized
from serve_app.engines.torch_internals import in_onednn_order, multiplies_with_onednn, onednn_linear

# oneDNN chooses the order for this many rows. Any number works with any order, but one for a single row is slow for
# many.
ROWS = 32


class PackedLinear(nn.Module):  # type: ignore[misc]
    """Replaces an `nn.Linear` whose weight is on the CPU. It maps x of shape (…, in_features) to (…, out_features).

    It has no `weight`. A stand-in on "meta" would be no safer: torch multiplies a CPU tensor with a meta tensor without
    an error, and returns what happens to be in memory.
    """

    def __init__(self, linear: nn.Linear, packed: torch.Tensor):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the product of shape (…, out_features)."""
        if x.numel() == 0:  # It is an expert that no token chose.
            return x.new_empty(*x.shape[:-1], self.out_features)
        return onednn_linear(x, self._packed, self.bias)

    @property
    def packed(self) -> torch.Tensor:
        """Returns the weight in oneDNN's order."""
        return self._packed

    @property
    def packed_bytes(self) -> int:
        """Returns bytes of the weight in oneDNN's order, without its padding."""
        return int(self.in_features * self.out_features * self._packed.element_size())

    def extra_repr(self) -> str:
        """Does what `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PlainLinear(nn.Linear):  # type: ignore[misc]
    """This is an `nn.Linear` that passes its weight to oneDNN as it is, which brings half the gain if a weight must
    stay plain.

    It is never made anew, since `pack_linears` turns layers of a loaded model into it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Does what `nn.Linear` does."""
        if x.numel() == 0 or not multiplies_with_onednn(self.weight):
            y: torch.Tensor = super().forward(x)
            return y
        return onednn_linear(x, self.weight, self.bias)


def pack_linears(model: nn.Module, copy_tied: bool) -> int:
    """Replaces the linear layers that stay on the CPU, in float32 or bfloat16, and returns how many there were.

    Two kinds become a `PlainLinear` and are not counted: layers with an accelerate hook, which brings the weight at
    every pass, and, unless `copy_tied`, layers whose weight another kind of module (the input embedding) shares, since
    that one needs the plain order. Quantised layers do not change.
    """
    shared = {id(parameter) for module in model.modules() if not _is_plain(module) for parameter in _own(module)}
    packed: dict[int, torch.Tensor] = {}
    replaced = 0
    # Only the parents and one child at a time are held, because the plain weight must be freed once its packed one
    # exists.
    for parent in [module for module in model.modules() if not _is_plain(module)]:
        for name in [name for name, _ in parent.named_children()]:
            child = getattr(parent, name)
            if not _is_plain(child):
                continue
            key = id(child.weight)
            if not multiplies_with_onednn(child.weight) or has_hook(child) or (key in shared and not copy_tied):
                _turn_plain(child)
                continue
            if key not in packed:
                packed[key] = in_onednn_order(child.weight.detach(), ROWS)
            setattr(parent, name, PackedLinear(child, packed[key]))
            replaced += 1
    if replaced:
        _leave_the_file(model)
    return replaced


def _leave_the_file(model: nn.Module) -> None:
    """Copies what is left on the CPU. Loaded weights are views of the mapped file, all of which one view keeps."""
    for module in model.modules():
        for parameter in () if is_quantized(module) else _own(module):  # Quantised weights were made anew.
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()


def _turn_plain(linear: nn.Linear) -> None:
    linear.__class__ = PlainLinear
    if has_hook(linear):  # The hook has kept the forward of `nn.Linear`.
        set_hooked_forward(linear, linear.__class__.forward.__get__(linear))


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not is_quantized(module)


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))
