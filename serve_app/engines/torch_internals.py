"""Has every private or undocumented part of torch that this project uses. `tests/contracts/test_torch.py` has a test of
each.

The operations of `torch.ops.mkldnn` are those that torch's own inductor compiles linear layers to on the CPU.
"""

from typing import cast

import torch

# torch's allocator on the CPU says this if there is no memory. It raises a RuntimeError without a class of its own.
NO_CPU_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def multiplies_with_onednn(weight: torch.Tensor) -> bool:
    """Returns whether oneDNN multiplies with a weight of this device and type on this processor.

    Uses `torch.ops.mkldnn._is_mkldnn_bf16_supported`, seen in torch 2.13.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(weight.dtype == torch.float32)


def in_onednn_order(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Returns the weight, of shape (out_features, in_features), in the order that oneDNN prefers for so many input
    rows.

    Uses `torch.ops.mkldnn._reorder_linear_weight`, seen in torch 2.13.
    """
    return cast(torch.Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, rows))


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns `torch.nn.functional.linear` by oneDNN, with a weight that is plain or in oneDNN's order. `x` is not
    empty.

    Uses `torch.ops.mkldnn._linear_pointwise`, seen in torch 2.13.
    """
    return cast(torch.Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether the error is CUDA's or the CPU allocator's, which is known only by its text (`NO_CPU_MEMORY`).

    The text was seen in torch 2.13.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_CPU_MEMORY)


def gpu_uuid(device: torch.device) -> str:
    """Returns the UUID of a CUDA device as NVML writes it.

    Uses `uuid` of `torch.cuda.get_device_properties`, which torch's documentation does not list, seen in torch 2.13.
    """
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
