"""Calls every part of vLLM that `serve_app/engines/vllm/vllm_meta_model.py` uses, in a process that pretends to have a
GPU. `calls` runs in a fork of `tests/warm_vllm.py`, where `prepare("cuda")` has been called.
"""

import tempfile
from collections.abc import Callable
from typing import Any

from serve_app.engines.vllm import vllm_meta_model as vllm
from tests.planning.model_requests import CONFIGS

MODELS = ("llama-3-70b", "gpt-oss-20b", "qwen3-next", "qwen2.5-vl-7b")


def calls() -> dict[str, Any]:
    """For each function by its name its result, or the error that says what has changed, in an order in which each
    finds what it needs."""
    found: dict[str, Any] = {}

    def call(name: str, function: Callable[[], Any]) -> None:
        try:
            found[name] = function()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    call("pretend_card", platform)
    with tempfile.TemporaryDirectory() as folder, vllm.process_group(folder):
        for name in MODELS:
            config = vllm.engine_config({"model": str(CONFIGS / name), "tensor_parallel_size": 2})
            model = vllm.model_without_storage(config, 2)
            specs = vllm.cache_specs(config)
            groups = vllm.cache_groups(config, specs)
            of_model = {
                "model_without_storage": lambda model=model: weights(model),
                "cache_specs": lambda specs=specs: len(specs),
                "cache_groups": lambda groups=groups: sorted(len(group.layer_names) for group in groups),
                "packs_blocks": lambda config=config: vllm.packs_blocks(config),
                "steps_in_flight": lambda config=config: vllm.steps_in_flight(config),
                "batched_tokens": lambda config=config: vllm.batched_tokens(config) >= 2048,
                "longest": lambda config=config: vllm.longest(config),
                "is_multimodal": lambda config=config: vllm.is_multimodal(config),
                "kind_of": lambda specs=specs: sorted({vllm.kind_of(spec) for spec in specs.values()}),
                "page_of": lambda specs=specs: vllm.page_of(next(iter(specs.values()))),
                "state_pages": lambda config=config, specs=specs: states(config, specs),
                "forms_of": lambda specs=specs: len(set(vllm.forms_of(specs).values())),
                "cached_modules": lambda config=config, specs=specs: vllm.cached_modules(config).keys() >= specs.keys(),
                "is_head": lambda model=model: sum(map(vllm.is_head, model.modules())),
                "bytes_per_request": lambda config=config, groups=groups: vllm.bytes_per_request(config, groups, 1600),
            }
            for function, run in of_model.items():
                call(f"{function} {name}", run)
        call("stage_of_pipeline", stages)
        call("adapter_buffers llama-3-70b", buffers)
    return found


def platform() -> dict[str, Any]:
    """What vLLM's platform says."""
    from vllm.platforms import current_platform

    return {"is_cuda": current_platform.is_cuda(), "capability": list(current_platform.get_device_capability())}


def weights(model: Any) -> dict[str, Any]:
    """The parameters of a model, and whether one has storage."""
    parameters = list(model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return {"bytes": size, "devices": sorted({str(parameter.device) for parameter in parameters})}


def stages() -> list[int]:
    """The layers with a cache in each of three stages, and in the whole model afterwards."""
    partition, found = (30, 40, 10), []
    folder = str(CONFIGS / "llama-3-70b")
    for rank in range(3):
        with vllm.stage_of_pipeline(rank, partition):
            config = vllm.engine_config({"model": folder, "pipeline_parallel_size": 3})
            vllm.model_without_storage(config, 1)
            found.append(len(vllm.cache_specs(config)))
    config = vllm.engine_config({"model": folder})
    vllm.model_without_storage(config, 1)
    return [*found, len(vllm.cache_specs(config))]


def buffers() -> dict[str, Any]:
    """The bytes of the buffers for adapters in one layer, and where they are."""
    room = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "dtype": "bfloat16"}
    config = vllm.engine_config({"model": str(CONFIGS / "llama-3-70b"), "tensor_parallel_size": 2, **room})
    found = vllm.adapter_buffers(config, vllm.model_without_storage(config, 2))
    tensors = [tensor for name, own in found.items() if ".layers.7." in name for tensor in own]
    return {
        "layer": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "devices": sorted({str(tensor.device) for own in found.values() for tensor in own}),
    }


def states(config: Any, specs: dict[str, Any]) -> list[int]:
    """The pages of each state."""
    return sorted({vllm.state_pages(spec, config) for spec in specs.values() if vllm.kind_of(spec) == "state"})
