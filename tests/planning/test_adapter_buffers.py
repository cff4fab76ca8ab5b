"""Which modules pt has buffers for, and what they take, known before anything is loaded."""

from dataclasses import replace
from pathlib import Path

from serve_app.facts.adapter import AdapterFacts, AdapterModule
from serve_app.facts.weights import Tensor
from serve_app.planning.adapters import (
    AdapterRoom,
    buffer_bytes,
    buffered_modules,
    buffers_problem,
    modules_of_unknown_shape,
)


def tensors() -> list[Tensor]:
    """Two layers, of which one has experts, with an embedding and a head."""
    return [
        Tensor("model.embed_tokens.weight", "BF16", (1000, 64)),
        Tensor("lm_head.weight", "BF16", (1000, 64)),
        Tensor("model.layers.0.self_attn.q_proj.weight", "BF16", (96, 64)),
        Tensor("model.layers.0.self_attn.q_proj.bias", "BF16", (96,)),
        Tensor("model.layers.0.input_layernorm.weight", "BF16", (64,)),
        Tensor("model.layers.1.self_attn.q_proj.weight", "BF16", (96, 64)),
        Tensor("model.layers.1.mlp.experts.*.down_proj.weight", "BF16", (64, 32), 8),
        Tensor("model.layers.1.mlp.shared_expert.down_proj.weight", "BF16", (64, 128)),
        Tensor("model.layers.1.mlp.packed.weight", "U8", (64, 16)),
    ]


def facts(**modules: AdapterModule) -> AdapterFacts:
    """An adapter with these modules."""
    return AdapterFacts(Path("/adapter"), "LORA", 8, 16.0, False, False, False, "none", False, (), (), (), "", modules)


def test_without_adapters_all_linear_modules_of_the_layers_have_buffers() -> None:
    """Experts, embeddings, heads and packed weights are left out."""
    assert buffered_modules(None, [], tensors()) == {
        "model.layers.0.self_attn.q_proj": (64, 96),
        "model.layers.1.self_attn.q_proj": (64, 96),
        "model.layers.1.mlp.shared_expert.down_proj": (128, 64),
    }


def test_the_modules_of_all_known_adapters_have_buffers() -> None:
    """By their names from the layer on, and also where the base's weights are packed."""
    one = facts(**{"model.layers.0.self_attn.q_proj": AdapterModule(8, 64, 96)})
    two = facts(
        **{
            "layers.0.self_attn.q_proj": AdapterModule(4, 64, 96),
            "model.layers.1.mlp.packed": AdapterModule(4, 64, 64),
            "model.embed_tokens": AdapterModule(4, 1000, 64, is_embedding=True),
            "model.layers.1.mlp.experts.3.down_proj": AdapterModule(4, 32, 64),
        }
    )
    assert buffered_modules(None, [one, two], tensors()) == {
        "layers.0.self_attn.q_proj": (64, 96),
        "layers.1.mlp.packed": (64, 64),
    }


def test_pickled_adapters_have_buffers_for_the_modules_that_their_configs_name() -> None:
    """Beside those of adapters whose files can be read. A regular expression says nothing."""
    pickled = replace(facts(), is_pickled=True, target_modules=("down_proj",))
    plain = facts(**{"model.layers.0.self_attn.q_proj": AdapterModule(8, 64, 96)})
    down = {"model.layers.1.mlp.shared_expert.down_proj": (128, 64)}
    assert buffered_modules(None, [pickled], tensors()) == down
    assert buffered_modules(None, [pickled, plain], tensors()) == down | {"layers.0.self_attn.q_proj": (64, 96)}
    assert buffered_modules(("q_proj",), [pickled], tensors()).keys() == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    }
    later = facts(**dict.fromkeys(down, AdapterModule(8, 128, 64)))
    assert buffers_problem(later, [plain]) is not None
    assert buffers_problem(later, [plain, pickled]) is None
    assert len(buffered_modules(None, [replace(pickled, target_modules="all-linear")], tensors())) == 3


def test_named_modules_alone_have_buffers() -> None:
    """A head has them if it is named."""
    found = buffered_modules(("lm_head", "self_attn.q_proj"), [], tensors())
    assert set(found) == {"lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}


def packed() -> list[Tensor]:
    """Three layers of bitsandbytes in 4 bits, and one of another method."""
    return [
        *(Tensor(f"model.layers.{layer}.self_attn.q_proj.weight", "U8", (96 * 64 // 2, 1)) for layer in range(3)),
        *(Tensor(f"model.layers.{layer}.self_attn.q_proj.weight.absmax", "F32", (96,)) for layer in range(3)),
        Tensor("model.layers.3.self_attn.q_proj.qweight", "I32", (8, 96)),
    ]


def test_named_modules_with_packed_weights_have_the_shapes_that_adapters_tell() -> None:
    """Of other modules with packed weights it is said that their shapes are not known."""
    changed = facts(**{f"model.layers.{layer}.self_attn.q_proj": AdapterModule(8, 64, 96) for layer in (0, 3)})
    wanted = ("q_proj",)
    assert buffered_modules(wanted, [changed], packed()) == {
        "model.layers.0.self_attn.q_proj": (64, 96),
        "model.layers.3.self_attn.q_proj": (64, 96),
    }
    unknown = [f"model.layers.{layer}.self_attn.q_proj" for layer in (1, 2)]
    assert modules_of_unknown_shape(wanted, [changed], packed()) == unknown
    assert modules_of_unknown_shape(("v_proj",), [changed], packed()) == []
    assert modules_of_unknown_shape(None, [changed], packed()) == []
    assert len(modules_of_unknown_shape(None, [], packed())) == 4
    # An adapter may call a module otherwise than the files do.
    other = facts(**{"model.layers.0.attn.qkv": AdapterModule(8, 64, 96)})
    assert buffered_modules(("qkv",), [other], packed()) == {"layers.0.attn.qkv": (64, 96)}


def test_weights_in_4_bits_have_buffers_by_their_number_of_weights() -> None:
    """One side of each module has the width of the model, so the sum of both sides is known."""
    for wanted in (None, ("q_proj",)):
        found = buffered_modules(wanted, [], packed()[:-1], hidden=64)
        assert found == {f"model.layers.{layer}.self_attn.q_proj": (64, 96) for layer in range(3)}
        assert modules_of_unknown_shape(wanted, [], packed(), hidden=64) == ["model.layers.3.self_attn.q_proj"]
    assert len(modules_of_unknown_shape(None, [], packed(), hidden=65)) == 4


def test_buffers_take_two_factors_of_each_module_for_every_slot() -> None:
    """The largest rank counts, whatever an adapter has."""
    assert buffer_bytes({"a": (64, 96), "b": (128, 64)}, AdapterRoom(3, 16), 2) == 3 * 16 * (64 + 96 + 128 + 64) * 2
    assert buffer_bytes({}, AdapterRoom(3, 16), 2) == 0
