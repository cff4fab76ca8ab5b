"""What this project uses of accelerate."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from serve_app.engines.pt import accelerate_internals
from serve_app.engines.pt.accelerate_internals import (
    balanced_limits,
    execution_device,
    has_hook,
    inferred_map,
    no_weights,
    set_hooked_forward,
)
from tests.contracts.contract import contract, untested
from tests.engines.pt.tiny_models import CONFIGS

BLOCKS = ["LlamaDecoderLayer"]


def test_each_part_has_a_test() -> None:
    """So that an upgrade shows what breaks."""
    assert untested(accelerate_internals) == []


def without_weights() -> PreTrainedModel:
    """A model of two layers, as the loader makes it to plan where its modules go."""
    with no_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32)
    model.tie_weights()
    return model


def size(model: nn.Module) -> int:
    """Bytes of its parameters in float32."""
    return sum(4 * parameter.numel() for parameter in model.parameters())


@pytest.fixture
def offloaded() -> nn.Module:
    """Two linear layers whose weights accelerate brings to the CPU at every pass."""
    from accelerate import cpu_offload

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    return cpu_offload(model, execution_device=torch.device("cpu"))  # type: ignore[no-any-return]


@contract("accelerate", "init_empty_weights", no_weights)
def test_a_model_can_be_made_without_weights() -> None:
    """Its parameters have shapes and no storage; its buffers, such as tables of positions, are there."""
    model = without_weights()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}


@contract("accelerate", "infer_auto_device_map", inferred_map)
def test_a_map_names_every_module_and_spills_without_an_error() -> None:
    """GPUs are numbers, and exist only on paper here. The loader looks for "cpu" and "disk" in what comes back."""
    model = without_weights()
    whole = inferred_map(model, {0: 10 * size(model)}, BLOCKS, torch.float32)
    assert set(whole.values()) == {0}
    small = inferred_map(model, {0: size(model) // 2}, BLOCKS, torch.float32)
    assert set(small.values()) & {"cpu", "disk"}
    assert set(small.values()) <= {0, "cpu", "disk"}
    assert not [name for name in small if name.startswith("model.layers.") and name.count(".") > 2], "a block is split"


@contract("accelerate", "accelerate.utils.get_balanced_memory", balanced_limits)
def test_limits_are_lowered_so_that_each_gpu_gets_a_part() -> None:
    """With the same keys, and never above what was given; `low_zero` leaves the first GPU for other things."""
    model = without_weights()
    given: dict[int | str, int] = {0: 100 * size(model), 1: 100 * size(model)}
    lowered = balanced_limits(model, given, BLOCKS, torch.float32, low_zero=False)
    assert lowered[0] < given[0]
    assert set(inferred_map(model, lowered, BLOCKS, torch.float32).values()) == {0, 1}
    spared = balanced_limits(model, given, BLOCKS, torch.float32, low_zero=True)
    assert spared[0] < lowered[0]


@contract("accelerate", "the attribute _hf_hook", has_hook)
def test_a_layer_that_moves_is_known_by_its_hook(offloaded: nn.Module) -> None:
    """`pack_linears` must leave its weight alone."""
    assert all(has_hook(layer) for layer in offloaded)
    assert not has_hook(nn.Linear(3, 3))


@contract("accelerate", "execution_device of a hook", execution_device)
def test_a_hook_says_where_its_module_computes(offloaded: nn.Module) -> None:
    """Inputs of an embedding without weights have to be there."""
    assert isinstance(offloaded, nn.Sequential)
    assert offloaded[0].weight.device.type == "meta"
    assert execution_device(offloaded[0]) == torch.device("cpu")
    assert execution_device(nn.Linear(3, 3)) is None


@contract("accelerate", "the attribute _old_forward of a module with a hook", set_hooked_forward)
def test_a_hook_calls_the_forward_that_it_is_given(offloaded: nn.Module) -> None:
    """With the weights on their device, which are on "meta" before and after."""
    assert isinstance(offloaded, nn.Sequential)
    layer, seen = offloaded[0], []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(layer.weight.device.type)
        return 2 * x

    set_hooked_forward(layer, forward)
    x = torch.ones(1, 3)
    assert torch.equal(layer(x), 2 * x)
    assert (seen, layer.weight.device.type) == (["cpu"], "meta")
