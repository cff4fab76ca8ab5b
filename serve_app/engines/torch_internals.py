"""Has every private or undocumented part of torch that this project uses. `tests/contracts/test_torch.py` has a test of
each.

The operations of `torch.ops.mkldnn` are those that torch's own inductor compiles linear layers to on the CPU.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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


def weighted_sums(
    table: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Returns for each i the sum of the rows `indices[j]` of the table times `weights[j]`, for j from `offsets[i]` to
    `offsets[i + 1]`. A sum of nothing is zeros, whatever the table holds.

    Uses `torch.embedding_bag`, which `torch.nn.functional.embedding_bag` calls after checks that take as long as a
    small sum; seen in torch 2.13.
    """
    return cast(torch.Tensor, torch.embedding_bag(table, indices, offsets, False, 0, False, weights, True)[0])


def onednn_memory(packed: torch.Tensor) -> tuple[int, int]:
    """Returns the address and the bytes of a weight in oneDNN's order, which has no storage that torch shows.

    Uses `torch.ops.mkldnn.data_ptr` and `torch.ops.mkldnn._nbytes`, seen in torch 2.13.
    """
    return int(torch.ops.mkldnn.data_ptr(packed)), int(torch.ops.mkldnn._nbytes(packed))


def is_view(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is a view of another one, whose storage it has. Tensors without data have no address by
    which this could be seen.

    Uses `torch.Tensor._is_view`, seen in torch 2.13.
    """
    return bool(tensor._is_view())


def storages_of(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """Returns the storages of a tensor, which are several if it is made of others, as torchao's are.

    Uses `__tensor_flatten__` of such tensors, seen in torch 2.13. Raises NotImplementedError for a tensor without a
    storage.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        names = tensor.__tensor_flatten__()[0]
        return [storage for name in names for storage in storages_of(getattr(tensor, name))]
    return [tensor.untyped_storage()]


def has_pre_hooks(module: nn.Module) -> bool:
    """Returns whether functions see, and may replace, what a module is given before its `forward` does.

    Uses the attribute `_forward_pre_hooks` of a module, seen in torch 2.13.
    """
    return bool(module._forward_pre_hooks)


def pin_memory(tensor: torch.Tensor) -> bool:
    """Locks a tensor of the host's memory for copies from and to GPUs, and returns whether CUDA could do it. Copies
    with memory that is not locked are slower. CUDA keeps the error of a lock that fails, and torch would raise it at
    the next kernel, so it is taken back here.

    torch's own pinned tensors take up to twice the memory, because their sizes are rounded up to powers of two. Uses
    `cudaHostRegister` of `torch.cuda.cudart()`, seen in torch 2.13.
    """
    if not torch.cuda.is_available() or not tensor.numel():
        return False
    if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0:
        return True
    forget_cuda_error()
    return False


def forget_cuda_error() -> None:
    """Takes back the error that CUDA keeps for this thread after a call of its API has failed.

    `torch.cuda.cudart()` has no `cudaGetLastError`. torch calls it after every kernel and raises what it says, and CUDA
    has forgotten the error then; seen in torch 2.13.
    """
    with suppress(RuntimeError):  # A device that is broken says so again at the next kernel.
        torch.ones(1, device="cuda")


def unpin_memory(tensor: torch.Tensor) -> None:
    """Takes back what `pin_memory` has done.

    Uses `cudaHostUnregister` of `torch.cuda.cudart()`, seen in torch 2.13.
    """
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


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


def pretend_operations(
    namespaces: Collection[str], abilities: Mapping[str, bool], absent: Callable[..., object]
) -> None:
    """Lets every operation of these namespaces of `torch.ops` exist as `absent`, until the process ends. `abilities`
    are operations of the first one that answer a question.

    Layers keep a reference to their operations and call them only when they compute. Uses the class and the dictionary
    of `torch.ops`, seen in torch 2.13.
    """
    for name in namespaces:
        namespace = getattr(torch.ops, name)
        pretended = type("PretendedNamespace", (type(namespace),), {"__getattr__": lambda self, name: absent})
        vars(torch.ops)[name] = pretended(name)
    for name, is_able in abilities.items():
        setattr(getattr(torch.ops, next(iter(namespaces))), name, lambda *_, is_able=is_able: is_able)


class _Nothing:
    """Stands for a stream or an event."""

    def __init__(self, *_: object, **__: object):
        pass


def pretend_gpu(capability: tuple[int, int], name: str, total_bytes: int, units: int) -> None:
    """Lets layers make streams and ask for the current card, until the process ends. `units` are its multiprocessors.

    Replaces documented functions of `torch.cuda`, of which some properties are undocumented, seen in torch 2.13.
    """
    properties = SimpleNamespace(
        major=capability[0], minor=capability[1], name=name, total_memory=total_bytes, is_integrated=False,
        multi_processor_count=units, shared_memory_per_block_optin=232448, warp_size=32, L2_cache_size=50 * 2**20,
    )  # fmt: skip
    answers = {"current_device": 0, "get_device_properties": properties, "get_device_capability": capability}
    for function, answer in answers.items():
        setattr(torch.cuda, function, lambda *_, answer=answer, **__: answer)
    for function in ("Stream", "Event", "current_stream", "default_stream"):
        setattr(torch.cuda, function, _Nothing)


class _OnMeta(TorchFunctionMode):  # type: ignore[misc]
    """Tensors that name a GPU have no storage either. Functions in `real` make real tensors unless a device is
    named."""

    def __init__(self, real: Collection[Any]):
        super().__init__()
        self._real = real

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is None and function in self._real:
            kwargs["device"] = "cpu"
        elif isinstance(device, int) or str(device).startswith("cuda"):
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


@contextmanager
def without_storage(has_real_tables: bool) -> Iterator[None]:
    """Makes tensors on the meta device. With `has_real_tables`, tables that are computed from nothing are real, for
    models that read numbers from theirs.

    Uses `torch.overrides.TorchFunctionMode`, seen in torch 2.13.
    """
    tables = {torch.arange, torch.linspace, torch.tensor, torch.full, torch.eye} if has_real_tables else set()
    with torch.device("meta"), _OnMeta(tables):
        yield


class WithoutData(TorchDispatchMode):  # type: ignore[misc]
    """Lets code run on the meta device that reads numbers out of its tensors: each of them is 1, 0 or False, and no
    element of a tensor counts as chosen. What a model does with its experts by these numbers changes no shape outside
    of them. Gradients must be off by `torch.no_grad`.

    Uses `torch.utils._python_dispatch.TorchDispatchMode` and the operations that `_ANSWERS` and `_CHANGED` name, seen
    in torch 2.13.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Does what the class says, for one operation."""
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], torch.Tensor) or args[0].device.type != "meta":
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _ANSWERS:
            return _ANSWERS[name](args[0])
        if name == "_to_copy" and torch.device(kwargs.get("device") or "meta").type != "meta":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
        if name in _CHANGED:
            args = (args[0], _CHANGED[name](args[0], *args[1:]), *args[2:])
        return func(*args, **kwargs)


def _number(tensor: torch.Tensor) -> bool | int | float:
    return False if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1


def _chosen_by_masks(_: torch.Tensor, indices: Sequence[torch.Tensor | None], *__: Any) -> list[torch.Tensor | None]:
    """Returns the indices with each mask replaced by what `nonzero` returns for it."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found += [index.new_empty((0,), dtype=torch.long) for _ in range(index.ndim)]
        else:
            found.append(index)
    return found


def _whole_parts(tensor: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> list[int]:
    """Returns sizes that add up, where they were read out of a tensor. The first part takes what is missing."""
    return [tensor.shape[dim] - sum(sizes[1:]), *sizes[1:]]


_ANSWERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "_local_scalar_dense": _number,
    "equal": lambda _: False,
    "nonzero": lambda tensor: tensor.new_empty((0, tensor.ndim), dtype=torch.long),
    "masked_select": lambda tensor: tensor.new_empty((0,)),
}
_CHANGED: dict[str, Callable[..., Any]] = {
    "index": _chosen_by_masks,
    "index_put": _chosen_by_masks,
    "index_put_": _chosen_by_masks,
    "split_with_sizes": _whole_parts,
}
