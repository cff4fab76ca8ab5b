"""A replica places layers as the plan says: limits hold weights and KV cache, and accelerate takes the map."""

from typing import Any

import pytest
import torch
from accelerate.utils import check_device_map
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from serve_app.engines.pt.load.planned_map import known_architecture, plan_layers
from serve_app.errors import EngineError
from tests.builders import model_config
from tests.engines.pt.tiny_models import CONFIGS

# What a context and the activations of such a small model take of each GPU: see planning/memory.py.
OVERHEAD = 620 * 10**6
MB = 10**6


def llama(**fields: Any) -> LlamaConfig:
    """Ten layers of 2.9 MB in float32; the embedding is the head too."""
    shape = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 10}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
    return LlamaConfig(**(shape | heads | {"tie_word_embeddings": True, "dtype": "float32"} | fields))


def meta(config: Any) -> PreTrainedModel:
    """The model without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def planned(
    hf_config: Any, limits: dict[int | str, int], free: int = 10**10, **fields: Any
) -> tuple[dict[str, int | str], int]:
    """The map and the budget for these limits beyond the overhead, on GPUs with so much free."""
    raised = {key: size + OVERHEAD if isinstance(key, int) else size for key, size in limits.items()}
    names = {key: f"{size / 1000}KB" for key, size in raised.items()}
    architecture = known_architecture(hf_config)
    assert architecture is not None
    free_bytes = {key: free for key in raised if isinstance(key, int)}
    config = model_config(max_memory=names, **fields)
    return plan_layers(config, architecture, meta(hf_config), free_bytes, raised)


def layers(device_map: dict[str, int | str]) -> list[int | str]:
    """The devices of the layers, in order."""
    return [place for name, place in device_map.items() if ".layers." in name]


def test_layers_fill_the_gpus_in_turn_and_the_map_is_valid() -> None:
    """Every parameter has a device; a tied head lies with the embedding."""
    device_map, tokens = planned(llama(), {0: 30 * MB, 1: 60 * MB})
    assert layers(device_map) == sorted(layers(device_map))
    assert set(layers(device_map)) == {0, 1}
    assert device_map["lm_head"] == device_map["model.embed_tokens"] == 0
    assert device_map["model.rotary_emb"] == 0
    check_device_map(meta(llama()), device_map)
    assert tokens >= 512


def test_the_kv_cache_counts_within_the_limit() -> None:
    """More cache leaves less room for layers on the first GPU, and at last there is none."""
    short, _ = planned(llama(), {0: 20 * MB, 1: 200 * MB}, max_model_len=512, kv_cache_memory_bytes="100KB")
    long, _ = planned(llama(), {0: 20 * MB, 1: 200 * MB}, max_model_len=512, kv_cache_memory_bytes="9MB")
    assert layers(long).count(0) < layers(short).count(0)
    with pytest.raises(EngineError, match="max_memory: needs .* GiB too much|max_memory: needs .* MiB too much"):
        planned(llama(max_position_embeddings=8192), {0: 20 * MB, 1: 30 * MB})


def test_a_tier_takes_the_rest_when_it_is_named() -> None:
    """The CPU up to its limit, then the disk."""
    device_map, _ = planned(llama(), {0: 1 * MB, "cpu": 9 * MB, "disk": 10**9}, max_model_len=64)
    assert [place for place in (0, "cpu", "disk") if place in layers(device_map)] == [0, "cpu", "disk"]
    assert layers(device_map).count("cpu") <= 3
    check_device_map(meta(llama()), device_map)
    with pytest.raises(EngineError, match="name cpu or disk in max_memory"):
        planned(llama(), {0: 1 * MB}, max_model_len=64)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mamba2"])
def test_every_known_architecture_gets_a_valid_map(name: str) -> None:
    """Over two GPUs, with room to spare."""
    if known_architecture(CONFIGS[name]) is None:
        pytest.fail("the plan should know it")
    device_map, _ = planned(CONFIGS[name], {0: 100 * MB, 1: 100 * MB})
    check_device_map(meta(CONFIGS[name]), device_map)


def test_an_unknown_architecture_is_left_to_accelerate() -> None:
    """The plan knows nothing of its cache."""
    assert known_architecture(CONFIGS["mamba2"]) is None
