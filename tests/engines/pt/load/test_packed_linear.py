"""Packed layers compute what plain ones do, and nothing is packed that must not be."""

import weakref

import pytest
import torch
from torch import nn

from serve_app.engines.pt.load.packed_linear import PackedLinear, PlainLinear, pack_linears
from tests.engines.pt.tiny_models import JOINED, tiny_model


def packed(linear: nn.Linear) -> PackedLinear:
    """The layer alone, packed."""
    holder = nn.Sequential(linear)
    assert pack_linears(holder, copy_tied=True) == 1
    assert isinstance(holder[0], PackedLinear)
    return holder[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (5, 24), (3, 7, 24), (100, 1, 24), (0, 24)])
@torch.inference_mode()
def test_a_packed_layer_equals_the_plain_one(shape: tuple[int, ...], bias: bool) -> None:
    """For one row, many rows, more dimensions, and no row at all."""
    linear = nn.Linear(24, 40, bias=bias)
    x = torch.randn(shape)
    torch.testing.assert_close(packed(linear)(x), linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 for this processor"
)
@torch.inference_mode()
def test_bfloat16_and_strided_input() -> None:
    """The other type, and an input that is not contiguous."""
    linear = nn.Linear(24, 40).to(torch.bfloat16)
    x = torch.randn(24, 6, dtype=torch.bfloat16).t()
    torch.testing.assert_close(packed(linear)(x), linear(x), atol=2e-2, rtol=2e-2)


def test_a_packed_layer_has_no_weight() -> None:
    """Code that reads it gets an error, not other numbers."""
    with pytest.raises(AttributeError, match="weight"):
        _ = packed(nn.Linear(24, 40, bias=False)).weight


@pytest.mark.parametrize("copy_tied", [True, False])
def test_a_tied_head_is_copied_only_when_asked(copy_tied: bool) -> None:
    """With a limit on memory the head stays plain, since the embedding needs the plain weight too."""
    model = tiny_model("gemma3")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    pack_linears(model, copy_tied)
    assert isinstance(model.get_output_embeddings(), PackedLinear if copy_tied else PlainLinear)


def test_a_plain_weight_goes_when_its_packed_one_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a model would need twice its memory while it loads."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    reorder = torch.ops.mkldnn._reorder_linear_weight

    def count(*args: object) -> object:
        alive.append(sum(weight() is not None for weight in weights))
        return reorder(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", count)
    pack_linears(model, copy_tied=True)
    assert alive == [6, 5, 4, 3, 2, 1]


def test_layers_that_move_are_left_alone() -> None:
    """An accelerate hook brings the weight of such a layer at every pass."""
    holder = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    holder[0]._hf_hook = object()  # type: ignore[assignment]
    assert pack_linears(holder, copy_tied=True) == 1
    assert isinstance(holder[0], nn.Linear)


@torch.inference_mode()
def test_a_weight_that_must_stay_plain_is_handed_over_as_it_stands() -> None:
    """A tied head gives the same numbers; a type that oneDNN does not take goes the usual way."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        embedding, head = nn.Embedding(40, 24, dtype=dtype), nn.Linear(24, 40, bias=False, dtype=dtype)
        head.weight = embedding.weight
        x = torch.randn(3, 5, 24, dtype=dtype)
        expected = head(x)
        assert pack_linears(nn.ModuleDict({"embedding": embedding, "head": head}), copy_tied=False) == 0
        assert isinstance(head, PlainLinear)
        torch.testing.assert_close(head(x), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", [name for name in JOINED if name != "mamba2"])
@torch.inference_mode()
def test_a_packed_model_has_the_same_logits(name: str) -> None:
    """For every kind of architecture that does not read a linear layer's weight behind its back, as Mamba-2 does. The
    loader leaves that one as it is."""
    model = tiny_model(name)
    ids = torch.arange(1, 21).reshape(2, 10)
    expected = model(input_ids=ids, use_cache=False).logits
    pack_linears(model, copy_tied=True)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
