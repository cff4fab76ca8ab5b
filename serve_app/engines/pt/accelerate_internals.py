"""Imports accelerate, as the only file that does, and has every private part of it that this project uses.
`tests/contracts/test_accelerate.py` has a test of each.

accelerate is imported when it is needed, since a model on one device is loaded without it.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

Device = int | str


def no_weights() -> AbstractContextManager[None]:
    """Returns a context in which a new model's parameters are on "meta", but not its buffers.

    Uses `accelerate.init_empty_weights`, which is public; seen in accelerate 1.15.
    """
    from accelerate import init_empty_weights

    context: AbstractContextManager[None] = init_empty_weights()
    return context


def balanced_limits(
    model: nn.Module, limits: Mapping[Device, int], blocks: Iterable[str], dtype: torch.dtype, low_zero: bool
) -> dict[Device, int]:
    """Returns the limits in bytes, lowered so that the GPUs get equal parts of the model. With `low_zero` the first
    gets less.

    `blocks` are the classes of modules that stay on one device. Uses `accelerate.utils.get_balanced_memory`, seen in
    accelerate 1.15.
    """
    from accelerate.utils import get_balanced_memory

    lowered: dict[Device, int] = get_balanced_memory(
        model, dict(limits), no_split_module_classes=list(blocks), dtype=dtype, low_zero=low_zero
    )
    return lowered


def inferred_map(
    model: nn.Module, limits: Mapping[Device, int], blocks: Iterable[str], dtype: torch.dtype
) -> dict[str, Device]:
    """Returns accelerate's own device of each module. What does not fit into `limits`, in bytes, goes to "cpu" or
    "disk" without an error, even if these are not in `limits`.

    Uses `accelerate.infer_auto_device_map`, seen in accelerate 1.15.
    """
    from accelerate import infer_auto_device_map

    inferred: dict[str, Device] = infer_auto_device_map(
        model, max_memory=dict(limits), no_split_module_classes=list(blocks), dtype=dtype
    )
    return inferred


def has_hook(module: nn.Module) -> bool:
    """Returns whether accelerate brings the module's weights, or its inputs, to a device at every pass.

    Uses the attribute `_hf_hook` of `accelerate.hooks.add_hook_to_module`, seen in accelerate 1.15.
    """
    return hasattr(module, "_hf_hook")


def execution_device(module: nn.Module) -> torch.device | None:
    """Returns where a module with a hook computes, or None for a module without one.

    Uses `execution_device` of `accelerate.hooks.AlignDevicesHook`, seen in accelerate 1.15.
    """
    return torch.device(module._hf_hook.execution_device) if has_hook(module) else None


def set_hooked_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Has the module's hook call `forward` once the weights are there.

    Uses the attribute `_old_forward` of `accelerate.hooks.add_hook_to_module`, seen in accelerate 1.15.
    """
    module._old_forward = forward
