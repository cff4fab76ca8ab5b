"""What this project uses of torch beyond its documentation."""

import ast
import ctypes
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from serve_app.engines import torch_internals
from serve_app.engines.torch_internals import (
    WithoutData,
    forget_cuda_error,
    gpu_uuid,
    has_pre_hooks,
    in_onednn_order,
    is_out_of_memory,
    is_view,
    multiplies_with_onednn,
    onednn_linear,
    onednn_memory,
    pin_memory,
    storages_of,
    unpin_memory,
    weighted_sums,
)
from tests.contracts.contract import as_imported_with, contract, untested

ROWS = 32


def test_each_part_has_a_test() -> None:
    """So that an upgrade shows what breaks. What stands for a GPU is tested with vLLM's models."""
    importlib.import_module("tests.contracts.test_vllm_meta_model")
    assert untested(torch_internals) == []


@contract("torch", "which types oneDNN multiplies with", multiplies_with_onednn)
def test_onednn_is_asked_for_by_type_and_device() -> None:
    """float32 always, bfloat16 where the processor can, and nothing that is not on the CPU."""
    assert multiplies_with_onednn(torch.empty(2, 2)) == torch.backends.mkldnn.is_available()
    assert isinstance(multiplies_with_onednn(torch.empty(2, 2, dtype=torch.bfloat16)), bool)
    assert not multiplies_with_onednn(torch.empty(2, 2, dtype=torch.float64))
    assert not multiplies_with_onednn(torch.empty(2, 2, device="meta"))


@pytest.mark.parametrize("bias", [True, False])
@contract("torch", "torch.ops.mkldnn._linear_pointwise", onednn_linear)
@torch.inference_mode()
def test_onednn_multiplies_with_a_plain_weight(bias: bool) -> None:
    """As `linear` does, for inputs of two and of three dimensions."""
    linear = nn.Linear(24, 40, bias=bias)
    for shape in ((5, 24), (3, 7, 24)):
        x = torch.randn(shape)
        torch.testing.assert_close(onednn_linear(x, linear.weight, linear.bias), linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@contract("torch", "torch.embedding_bag", weighted_sums)
@torch.inference_mode()
def test_bags_are_weighted_sums(dtype: torch.dtype) -> None:
    """An empty bag is zeros beside rows that are not finite, and no bag reads the rows of another one."""
    table, weights = torch.randn(6, 40).to(dtype), torch.randn(5).to(dtype)
    table[5] = float("nan")
    indices, offsets = torch.tensor([0, 3, 3, 5, 1]), torch.tensor([0, 0, 3, 4, 4, 5])
    sums = weighted_sums(table, indices, offsets, weights)
    assert sums.dtype == dtype
    assert sums.shape == (5, 40)
    assert not sums[0].any()
    assert not sums[3].any()
    assert sums[2].isnan().all()
    wanted = (weights[:3, None].float() * table[indices[:3]].float()).sum(0)
    torch.testing.assert_close(sums[1].float(), wanted, atol=5e-2, rtol=5e-2)
    torch.testing.assert_close(sums[4].float(), weights[4].float() * table[1].float(), atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@contract("torch", "torch.Tensor._is_view", is_view)
def test_a_view_is_told_from_a_tensor_of_its_own(device: str) -> None:
    """With storage and without."""
    whole = torch.zeros(2, 3, device=device)
    assert [is_view(each) for each in (whole, whole[0], whole.view(6), torch.zeros_like(whole))] == [
        False, True, True, False,
    ]  # fmt: skip


@contract("torch", "torch.ops.mkldnn._reorder_linear_weight", in_onednn_order)
@torch.inference_mode()
def test_a_weight_is_ordered_once_for_any_number_of_rows() -> None:
    """The ordered weight hides its data from `parameters()`, so that its bytes are counted from its shape."""
    linear = nn.Linear(24, 40)
    ordered = in_onednn_order(linear.weight.detach(), ROWS)
    assert ordered.is_mkldnn
    assert ordered.element_size() == 4
    for rows in (1, ROWS, 100):
        x = torch.randn(rows, 24)
        torch.testing.assert_close(onednn_linear(x, ordered, linear.bias), linear(x), atol=1e-5, rtol=1e-5)


@contract("torch", "torch.ops.mkldnn.data_ptr and _nbytes", onednn_memory)
@torch.inference_mode()
def test_an_ordered_weight_is_moved_by_its_bytes() -> None:
    """They lie at an address, and the product is the same once they have been taken away and brought back."""
    linear = nn.Linear(96, 64)
    ordered = in_onednn_order(linear.weight.detach(), ROWS)
    address, size = onednn_memory(ordered)
    assert 96 * 64 * 4 <= size < 2 * 96 * 64 * 4
    kept = ctypes.string_at(address, size)
    x = torch.randn(5, 96)
    before = onednn_linear(x, ordered, linear.bias)
    ctypes.memset(address, 0, size)
    assert torch.equal(onednn_linear(x, ordered, None), torch.zeros(5, 64))
    ctypes.memmove(address, kept, size)
    assert torch.equal(onednn_linear(x, ordered, linear.bias), before)


class _Pair(torch.Tensor):
    """A tensor that is made of two others, as torchao's are."""

    @staticmethod
    def __new__(cls, first: torch.Tensor, second: torch.Tensor) -> "_Pair":
        pair = torch.Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype)
        pair.first, pair.second = first, second
        return pair

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["first", "second"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


@contract("torch", "__tensor_flatten__ of tensors that are made of others", storages_of)
def test_a_tensor_that_is_made_of_others_has_their_storages() -> None:
    """And any other one its own, which its views share."""
    first, second = torch.zeros(4, 5), torch.zeros(3)
    assert [storage.data_ptr() for storage in storages_of(first[2:])] == [first.data_ptr()]
    found = storages_of(_Pair(first, second))
    assert [storage.data_ptr() for storage in found] == [first.data_ptr(), second.data_ptr()]


@contract("torch", "cudaHostRegister of torch.cuda.cudart()", pin_memory, unpin_memory)
def test_memory_is_locked_where_there_is_a_gpu() -> None:
    """Elsewhere nothing is locked, and copies work all the same."""
    host = torch.zeros(2**20, dtype=torch.uint8)
    assert pin_memory(host) == torch.cuda.is_available()
    if torch.cuda.is_available():
        unpin_memory(host)


@contract("torch", "cudaGetLastError after each kernel", forget_cuda_error)
def test_a_lock_that_fails_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next kernel of the model would raise it. Memory that is locked already cannot be locked again."""
    if torch.cuda.is_available():
        host = torch.zeros(2**20, dtype=torch.uint8)
        assert pin_memory(host)
        assert not pin_memory(host)
        assert torch.ones(2, device="cuda").tolist() == [1, 1]
        unpin_memory(host)
        return
    kept, make_ones = ["an error"], torch.ones

    class Cudart:
        def cudaHostRegister(self, *_: int) -> int:
            return 712

    def ones(*sizes: int, device: str) -> torch.Tensor:
        if kept:
            raise torch.AcceleratorError(kept.pop())
        return make_ones(*sizes)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch, "ones", ones)
    assert not pin_memory(torch.zeros(2**20, dtype=torch.uint8))
    assert kept == []


@contract("torch", "what its allocator on the CPU says where there is no memory", is_out_of_memory)
def test_too_little_memory_is_known_by_its_text() -> None:
    """A request that asks for too much must not count as a broken engine."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value), str(caught.value).splitlines()[0]
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))


@contract("torch", "the property uuid of a CUDA device", gpu_uuid)
def test_a_cuda_device_has_a_uuid() -> None:
    """Read from torch's own description of its C++ classes, since a machine without a GPU has no such device."""
    described = ast.parse((Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text())
    properties = next(
        node for node in described.body if isinstance(node, ast.ClassDef) and node.name == "_CudaDeviceProperties"
    )
    fields = {node.target.id for node in properties.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    assert "uuid" in fields
    if torch.cuda.is_available():
        import pynvml

        pynvml.nvmlInit()
        known = {
            str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)))
            for index in range(pynvml.nvmlDeviceGetCount())
        }
        assert gpu_uuid(torch.device("cuda", 0)) in known


@contract("torch", "the environment variable TORCH_COMPILE_DISABLE", "serve_app/engines/vllm/engine.py")
def test_compiling_can_be_switched_off() -> None:
    """vLLM would compile functions of its sampler for seconds in which nobody gets a token."""
    import torch._dynamo.config as config

    assert as_imported_with(config, {"TORCH_COMPILE_DISABLE": "1"}).disable is True
    assert as_imported_with(config, {"TORCH_COMPILE_DISABLE": "0"}).disable is False


@contract("torch", "TorchDispatchMode and the operations that read numbers", WithoutData)
@torch.no_grad()
def test_code_that_reads_numbers_runs_without_data() -> None:
    """Each way in which a model asks a tensor for a number, or chooses elements by a mask."""
    with torch.device("meta"), WithoutData():
        numbers, mask = torch.arange(6), torch.ones(6, dtype=torch.bool)
        assert (numbers.max().item(), bool(mask.any()), torch.ones(2)[0].item()) == (1, False, 1.0)
        assert numbers.tolist() == [0] * 6
        assert numbers.nonzero().shape == (0, 1)
        assert torch.ones(6, 4)[mask].shape == (0, 4)
        assert numbers.masked_select(mask).shape == (0,)
        assert not torch.equal(numbers, numbers)
        hidden = torch.ones(6, 4)
        hidden[mask] = torch.ones(0, 4)
        assert [tuple(part.shape) for part in hidden.split(numbers[:3].tolist())] == [(6, 4), (0, 4), (0, 4)]
    assert torch.arange(3).tolist() == [0, 1, 2]


@contract("torch", "Module._forward_pre_hooks", has_pre_hooks)
def test_functions_before_a_module_s_forward_are_seen() -> None:
    """Layers of 8 bits have some."""
    linear = nn.Linear(2, 2)
    assert not has_pre_hooks(linear)
    hook = linear.register_forward_pre_hook(lambda *_: None)
    assert has_pre_hooks(linear)
    hook.remove()
    assert not has_pre_hooks(linear)
