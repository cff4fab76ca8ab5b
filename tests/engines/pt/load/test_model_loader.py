"""Where a model's modules may go. The GPUs here do not exist: accelerate plans on a model without weights."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from serve_app.engines.pt.load import model_loader
from serve_app.engines.pt.load.model_loader import choose_device_map, device_limits, load_model
from serve_app.errors import ConfigError, EngineError
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.builders import model_config

# Ten layers of about 2.9 MB each in float32, 33 MB in all.
HF_CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=10,
    num_attention_heads=4,
    num_key_value_heads=4,
    tie_word_embeddings=True,
    dtype="float32",
)
ROOMY = {0: 10**9, 1: 10**9}


def devices(**config: Any) -> set[int | str]:
    """The devices in the map of a model with such a config."""
    free = config.pop("free", ROOMY)
    return set(choose_device_map(model_config(**config), HF_CONFIG, free).values())


def test_unequal_limits_are_kept() -> None:
    """Both GPUs are used, and the larger limit gets more layers."""
    config = model_config(max_memory={0: "15MB", 1: "60MB"})
    layers = [device for name, device in choose_device_map(config, HF_CONFIG, ROOMY).items() if "layers" in name]
    assert 0 < layers.count(0) < layers.count(1)
    assert layers.count(0) + layers.count(1) == 10


def test_a_model_that_does_not_fit_is_refused_and_not_spilled() -> None:
    """accelerate would put the rest on disk without an error."""
    with pytest.raises(EngineError, match=r"not fit in GPU 0: 0.015 GB, GPU 1: 0.01 GB, so part of it would go to"):
        devices(max_memory={0: "15MB", 1: "10MB"})


def test_a_tier_is_used_when_it_is_named() -> None:
    """`cpu` in max_memory is the user's consent; `disk` is another one."""
    assert devices(max_memory={0: "15MB", "cpu": "1GB"}) == {0, "cpu"}
    with pytest.raises(EngineError, match="would go to disk"):
        devices(max_memory={0: "15MB", "cpu": "8MB"})
    assert devices(max_memory={0: "15MB", "cpu": "8MB", "disk": "1GB"}) == {0, "cpu", "disk"}


def test_without_limits_the_free_memory_is_the_limit() -> None:
    """Less a reserve for the cache and the context; nothing is spilled then either."""
    assert devices(free={0: 10**9}) == {0}
    with pytest.raises(EngineError, match="does not fit in GPU 0: 0.008 GB"):
        devices(free={0: 10**7})


def test_a_large_gpu_before_a_small_one_is_enough_without_limits() -> None:
    """accelerate's balanced map gives the first GPU half of the model, whatever its size, and would spill the rest."""
    assert devices(free={0: 40 * 10**6, 1: 12 * 10**6}) == {0, 1}
    assert devices(free={0: 20 * 10**6, 1: 40 * 10**6}) == {0, 1}


def test_the_limit_is_never_more_than_what_is_free() -> None:
    """Another process may already hold a part of the card."""
    config = model_config(max_memory={0: "3GB", 1: "10GB"})
    assert device_limits(config, {0: 2 * 10**9, 1: 24 * 10**9}) == {0: 2 * 10**9, 1: 10**10}


def test_indices_are_matched_in_order_with_the_gpus_that_the_replica_sees() -> None:
    """With cards 1 and 3 of the machine visible, torch calls them 0 and 1."""
    config = model_config(max_memory={1: "3GB", 3: "10GB"})
    assert device_limits(config, {0: 24 * 10**9, 1: 24 * 10**9}) == {0: 3 * 10**9, 1: 10**10}
    with pytest.raises(EngineError, match="names 2 GPUs, but this replica sees 1"):
        device_limits(config, {0: 24 * 10**9})


def test_a_limit_on_the_cpu_is_a_limit() -> None:
    """The same law as for GPUs: no silent disk."""
    with pytest.raises(EngineError, match="does not fit in cpu: 0.01 GB, so part of it would go to disk"):
        devices(device="cpu", max_memory={"cpu": "10MB"}, free={})
    assert devices(device="cpu", max_memory={"cpu": "1GB"}, free={}) == {"cpu"}


def test_a_mapping_is_used_as_it_stands() -> None:
    """The user places every module."""
    assert devices(device_map={"model": 1, "lm_head": 0}) == {0, 1}


def test_a_device_that_is_not_there_is_named() -> None:
    """Instead of accelerate's "Cannot access accelerator device"."""
    with pytest.raises(EngineError, match="torch sees no GPU.*device: cpu"):
        load_model(model_config(model=model_path(DEMO_MODEL)))


def test_a_context_longer_than_the_models_is_refused() -> None:
    """The model would answer nonsense beyond it."""
    config = model_config(model=model_path(DEMO_MODEL), device="cpu", max_model_len=4096)
    with pytest.raises(ConfigError, match="4096 is over the model's own context of 2048"):
        load_model(config)


def test_a_folder_that_holds_no_model_is_named() -> None:
    """One message instead of a traceback through transformers."""
    with pytest.raises(EngineError, match="/nowhere cannot be read"):
        load_model(model_config(model="/nowhere", device="cpu"))


@pytest.mark.parametrize("cap", [None, {"cpu": "2GB"}])
def test_linear_layers_are_packed_on_the_cpu(cap: dict[str, str] | None) -> None:
    """All of them; with a limit on memory, all but a head that shares the embedding's weight."""
    model = load_model(model_config(model=model_path(DEMO_MODEL), device="cpu", max_memory=cap)).model
    plain = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert plain == ([] if cap is None else ["lm_head"])


def test_a_model_that_cannot_run_packed_is_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models' own code multiplies with a linear layer's weight, which a packed layer does not show."""

    def pack(model: torch.nn.Module, copy_tied: bool) -> None:
        del model.lm_head.weight

    monkeypatch.setattr(model_loader, "pack_linears", pack)
    model = load_model(model_config(model=model_path(DEMO_MODEL), device="cpu")).model
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
