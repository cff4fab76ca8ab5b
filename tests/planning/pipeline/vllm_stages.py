"""Asks vLLM's own code what each rank of a pipeline holds: no GPU, no weights, only config.json.

`answers` runs in a fork of `tests/warm_vllm.py`, where vLLM is prepared by the rules of "cuda". A job has `folder`,
`tensor_parallel_size`, `partition` (the layers of each stage) and `available` (the bytes that each stage has for its KV
cache). It may have `max_model_len`. Its answer has the facts of one rank that holds all layers, and what vLLM builds
for each stage: bytes of parameters and buffers, and the KV cache that `get_kv_cache_configs` gives it.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

from serve_app.engines.vllm import vllm_meta_model as meta
from serve_app.engines.vllm.model_facts import rank_facts, size_of
from serve_app.facts.engine_facts import VllmFacts, facts_to_json

Specs = dict[str, Any]


def answers(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of all jobs."""
    with tempfile.TemporaryDirectory() as folder, meta.process_group(folder):
        return [answer(job) for job in jobs]


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The facts of a job, and its stages as vLLM builds them."""
    size, partition = job["tensor_parallel_size"], job["partition"]
    arguments = {"max_model_len": job["max_model_len"]} if "max_model_len" in job else {}
    asked = {"folder": job["folder"], "engine_args": arguments}
    facts = VllmFacts({size: rank_facts(asked, size)})
    built = [stage(job["folder"], size, rank, partition, arguments) for rank in range(len(partition))]
    config, specs = built[0][0], [specs for _, _, specs in built]
    resolve_layout([each for each, _, _ in built], specs)
    caches = kv_caches(config, specs, job["available"])
    page = [cache.kv_cache_tensors[0].size // cache.num_blocks for cache in caches]
    return {
        "facts": facts_to_json(facts),
        "stages": [
            figures | {"blocks": cache.num_blocks, "block_bytes": bytes_}
            for (_, figures, _), cache, bytes_ in zip(built, caches, page, strict=True)
        ],
        "least_blocks": least_blocks(config, specs, page),
        "max_model_len": config.model_config.max_model_len,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "steps": meta.steps_in_flight(config),
        "even_split": even_split(sum(partition), len(partition)),
    }


def stage(
    folder: str, size: int, rank: int, partition: Sequence[int], arguments: dict[str, Any]
) -> tuple[Any, dict[str, int], Specs]:
    """vLLM's configuration of one stage, the bytes of its tensors, and its KV cache by layer."""
    sizes = {"tensor_parallel_size": size, "pipeline_parallel_size": len(partition)}
    with meta.stage_of_pipeline(rank, partition):
        config = meta.engine_config({"model": folder, **sizes, **arguments})
        model = meta.model_without_storage(config, size)
        specs = meta.cache_specs(config)
    figures = {"weights": sum(map(size_of, model.parameters())), "buffers": sum(map(size_of, model.buffers()))}
    return config, figures, specs


def resolve_layout(configs: Sequence[Any], specs: Sequence[Specs]) -> None:
    """Lets vLLM choose the layout of pages from what all stages can do."""
    from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout

    names = []
    for config, of_stage in zip(configs, specs, strict=True):
        with set_current_vllm_config(config):
            layers = get_layers_from_vllm_config(config, AttentionLayerBase)
            layouts = get_supported_kv_cache_layouts(layers[name].get_attn_backend() for name in of_stage)
        names.append([layout.name for layout in layouts])
    merged = {name: spec for of_stage in specs for name, spec in of_stage.items()}
    with set_current_vllm_config(configs[0]):
        resolve_kv_cache_layout(configs[0], names, merged.values())


def kv_caches(config: Any, specs: Sequence[Specs], available: Sequence[int]) -> list[Any]:
    """What vLLM makes of the bytes that each stage has."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    with set_current_vllm_config(config):
        return list(get_kv_cache_configs(config, [dict(of_stage) for of_stage in specs], list(available)))


def least_blocks(config: Any, specs: Sequence[Specs], block_bytes: Sequence[int]) -> int:
    """The least number of blocks with which vLLM starts."""

    def starts(blocks: int) -> bool:
        try:
            kv_caches(config, specs, [blocks * size for size in block_bytes])
        except ValueError:
            return False
        return True

    low, high = 0, 1
    while not starts(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if starts(middle) else (middle, high)
    return high


def even_split(layers: int, stages: int) -> list[int]:
    """vLLM's own split."""
    from vllm.distributed.utils import get_pp_indices

    ends = [get_pp_indices(layers, rank, stages) for rank in range(stages)]
    return [end - start for start, end in ends]
