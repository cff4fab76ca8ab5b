"""Which adapter an engine can serve, and how much room there is for them."""

from pathlib import Path
from typing import Any

import pytest

from serve_app.config import ModelConfig
from serve_app.facts.adapter import read_adapter
from serve_app.facts.weights import Tensor, local_tensors
from serve_app.planning.adapters import adapter_problem, adapter_room, base_note, rounded_rank
from tests.lora_folders import SHAPES, adapter, base


def problem(folder: Path, backend: str = "pt", most: int = 16, tensors: list[Tensor] | None = None) -> str | None:
    """Why an engine cannot serve the adapter in a folder."""
    found = local_tensors(base(folder.parent / "base")) if tensors is None else tensors
    return adapter_problem(read_adapter(folder), backend, most, found)


def test_a_plain_adapter_of_the_model_is_served(tmp_path: Path) -> None:
    """By both engines."""
    folder = adapter(tmp_path / "a")
    assert problem(folder) is None
    assert problem(folder, "vllm") is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"lora_bias": True}, "lora_bias: true"),
        ({"modules_to_save": ["lm_head", "embed"]}, "modules_to_save: embed, lm_head"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
    ],
)
def test_what_no_engine_serves_is_refused_by_name(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    """Nothing of an adapter is left out in silence."""
    folder = adapter(tmp_path / "a", **config)
    for backend in ("pt", "vllm"):
        assert words in (problem(folder, backend) or "")


def test_starts_that_leave_the_base_model_alone_are_served(tmp_path: Path) -> None:
    """They only set the first numbers of a training."""
    for start in (True, False, "gaussian", "orthogonal"):
        assert problem(adapter(tmp_path / "a", init_lora_weights=start)) is None


def test_vllm_takes_the_head_of_a_classifier(tmp_path: Path) -> None:
    """And pt does not."""
    more = {"base_model.model.score.weight": (2, 8)}
    folder = adapter(tmp_path / "a", modules_to_save=["score"], more=more)
    assert problem(folder, "vllm") is None
    assert "(modules_to_save: score), which pt" in (problem(folder) or "")


def test_a_rank_over_the_buffers_says_what_to_set(tmp_path: Path) -> None:
    """One of the ranks that both engines have."""
    folder = adapter(tmp_path / "a", rank=20)
    assert problem(folder, most=32) is None
    assert "Set max_lora_rank: 32, which restarts" in (problem(folder, most=16) or "")
    assert "512 is the largest" in (problem(adapter(tmp_path / "b", rank=600), most=512) or "")


def test_a_tensor_that_is_no_factor_is_named(tmp_path: Path) -> None:
    """A DoRA's vector whose config does not say so, for example."""
    more = {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": (8,)}
    assert "lora_magnitude_vector" in (problem(adapter(tmp_path / "a", more=more)) or "")


def test_shapes_that_differ_from_the_base_model_are_refused_and_another_name_is_noted(tmp_path: Path) -> None:
    """The name alone says nothing, because people rename folders."""
    other = dict.fromkeys(SHAPES, (8, 16))
    assert "this model's has [8, 8]" in (problem(adapter(tmp_path / "a", shapes=other)) or "")
    deep = {"model.layers.7.self_attn.q_proj": (8, 8)}
    assert "the base model has no layers.7" in (problem(adapter(tmp_path / "b", shapes=deep)) or "")
    found = read_adapter(adapter(tmp_path / "c"))
    assert base_note(found, "/srv/models/Base") is None
    assert base_note(found, "/srv/models/other") == (
        "it was trained on org/base, and this model is /srv/models/other. Their shapes agree."
    )


def test_names_of_files_and_of_modules_may_begin_differently(tmp_path: Path) -> None:
    """GPT-2's files leave `transformer.` out, and models with images have `language_model.` in between. A module that
    no file names is the engine's to judge, and so are packed weights."""
    shapes = {"transformer.h.0.attn.c_attn": (8, 24)}
    tensors = [Tensor("h.0.attn.c_attn.weight", "F32", (8, 24))]
    folder = adapter(tmp_path / "a", shapes=shapes)
    assert "the shape [24, 8]" in (problem(folder, tensors=tensors) or "")
    folder = adapter(tmp_path / "a", shapes=shapes, fan_in_fan_out=True)  # As PEFT saves it for Conv1D.
    assert problem(folder, tensors=tensors) is None
    assert problem(folder, tensors=[Tensor("h.0.attn.other.weight", "F32", (3, 3))]) is None
    assert problem(folder, tensors=[Tensor("h.0.attn.c_attn.weight", "U8", (96, 1))]) is None
    assert problem(folder, tensors=[]) is None


def test_the_room_follows_the_adapters_unless_it_is_set() -> None:
    """At most eight different ones in a batch, and the smallest rank of buffers that holds the largest adapter."""

    def config(count: int, **fields: Any) -> ModelConfig:
        names = {f"a{number}": "/x" for number in range(count)}
        return ModelConfig.from_args({"model": "m", "infer_backend": "pt", "adapters": names} | fields)

    assert adapter_room(config(3), [8, 20]).__dict__ == {"max_loras": 3, "max_lora_rank": 32}
    assert adapter_room(config(20), []).__dict__ == {"max_loras": 8, "max_lora_rank": 16}
    assert adapter_room(config(2, max_loras=5, max_lora_rank=64), [8]).__dict__ == {"max_loras": 5, "max_lora_rank": 64}
    assert [rounded_rank(rank) for rank in (1, 2, 9, 257, 512, 900)] == [1, 8, 16, 320, 512, 512]
