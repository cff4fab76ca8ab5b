"""A replica places layers as the plan says: limits hold weights and KV cache, and accelerate takes the map."""

from typing import Any

import pytest
import torch
from accelerate.utils import check_device_map
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config, PreTrainedModel

from serve_app.engines.pt.load.device_map import device_map_of
from serve_app.engines.pt.load.layout import layout_of
from serve_app.facts.architecture import read_architecture
from serve_app.facts.engine_facts import EngineFacts
from serve_app.facts.inventory import Device
from serve_app.facts.weights import Tensor
from serve_app.planning.fit_pt import fit_pt
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import ModelPlan
from serve_app.planning.shortage import Shortage
from tests.builders import model_config
from tests.engines.pt.tiny_models import CONFIGS
from tests.planning.pt_survey import shape_of

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


def plan(hf_config: Any, limits: dict[int | str, int], free: int = 10**10, **fields: Any) -> ModelPlan | Shortage:
    """For these limits beyond the overhead, on GPUs with so much free."""
    raised = {key: size + OVERHEAD if isinstance(key, int) else size for key, size in limits.items()}
    architecture = read_architecture(hf_config.to_dict(), "m")
    config = model_config(max_memory={key: f"{size / 1000}KB" for key, size in raised.items()}, **fields)
    tensors = tuple(
        Tensor(name, "F32", tuple(parameter.shape)) for name, parameter in meta(hf_config).named_parameters()
    )
    gpus = [Device("n1", key, "GPU", free, free) for key in raised if isinstance(key, int)]
    caps = [raised[gpu.index] for gpu in gpus if gpu.index is not None]
    return fit_pt(ModelRequest("m", config, architecture, tensors), [(gpu, free) for gpu in gpus], caps, ())


def planned(hf_config: Any, limits: dict[int | str, int], **fields: Any) -> tuple[dict[str, int | str], int]:
    """The map of that plan, and its tokens of KV cache."""
    fit = plan(hf_config, limits, **fields)
    assert isinstance(fit, ModelPlan), fit
    return device_map_of(fit, meta(hf_config)), fit.kv_tokens


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
    short_of = plan(llama(max_position_embeddings=8192), {0: 40 * MB, 1: 40 * MB})
    assert isinstance(short_of, Shortage)
    assert "too much" in short_of.message


def test_a_tier_takes_the_rest_when_it_is_named() -> None:
    """The CPU up to its limit, then the disk."""
    device_map, _ = planned(llama(), {0: 1 * MB, "cpu": 9 * MB, "disk": 10**9}, max_model_len=64)
    assert [place for place in (0, "cpu", "disk") if place in layers(device_map)] == [0, "cpu", "disk"]
    assert layers(device_map).count("cpu") <= 3
    check_device_map(meta(llama()), device_map)
    short_of = plan(llama(), {0: 1 * MB}, max_model_len=64)
    assert isinstance(short_of, Shortage)
    assert "name cpu or disk in max_memory" in short_of.message


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("mamba2", "mamba")])
def test_every_known_architecture_gets_a_valid_map(name: str) -> None:
    """Over two GPUs, with room to spare."""
    device_map, _ = planned(CONFIGS[name], {0: 100 * MB, 1: 100 * MB})
    check_device_map(meta(CONFIGS[name]), device_map)


def test_an_architecture_without_formulas_gets_a_valid_map() -> None:
    """By what transformers says of it. Its layers are named otherwise."""
    hf_config = Mamba2Config(**(CONFIGS["mamba2"].to_dict() | {"num_hidden_layers": 6, "vocab_size": 30_000}))
    facts = layout_of(hf_config, torch.float32)
    config = model_config(max_memory={0: "625MB", 1: "800MB"}, max_num_seqs=1, max_model_len=64)
    gpus = [Device("n1", index, "GPU", 10**10, 10**10) for index in (0, 1)]
    request = ModelRequest("m", config, shape_of(facts), (), engine_facts=EngineFacts(pt=facts))
    fit = fit_pt(request, [(gpu, 10**10) for gpu in gpus], [565 * MB, 800 * MB], ())
    assert isinstance(fit, ModelPlan), fit
    device_map = device_map_of(fit, meta(hf_config))
    check_device_map(meta(hf_config), device_map)
    assert set(device_map) >= {f"backbone.layers.{number}" for number in range(6)}


def test_layers_that_bitsandbytes_has_quantised_stay_on_gpus() -> None:
    """transformers refuses to put them on the CPU or the disk, so the plan counts no such tier."""
    limits: dict[int | str, int] = {0: 15 * MB, "cpu": 10**9}
    assert isinstance(plan(llama(), limits), ModelPlan)
    quantised = llama(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    short = plan(quantised, limits)
    assert isinstance(short, Shortage)
    assert "layers that bitsandbytes has quantised stay on a GPU" in short.message
