"""What the builder of a model plans, and refuses before anything starts."""

import pytest

from serve_app.config import ModelConfig
from serve_app.deploy.resolve_model import needs_devices, resolve_model
from serve_app.errors import PlacementError
from serve_app.facts.inventory import Device, Inventory
from tests.builders import model_config, node
from tests.planning.model_requests import CONFIGS

GIB = 2**30
HOST = Inventory((Device("n1", None, "memory", 64 * GIB, 64 * GIB),))


def split(**fields: object) -> ModelConfig:
    """Qwen2-7B, of 28 layers and heads, in vLLM on the CPU."""
    return model_config(
        model=str(CONFIGS / "qwen2-7b"), infer_backend="vllm", device="cpu", max_model_len=1024, **fields
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"pipeline_layers": [1, 2]},
            r"pipeline_layers: \[1, 2\]: the stages have 3 layers together",
        ),
        ({"pipeline_layers": [27]}, "the model's 28 together"),
        ({"pipeline_parallel_size": 29}, "29 stages need a layer each, and the model has 28"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size: 3 is not valid"),
    ],
)
def test_ranks_that_vllm_would_refuse_are_refused_on_the_cpu(fields: dict[str, object], reason: str) -> None:
    """The engine would find it out half a minute later, in the log of one of its processes."""
    with pytest.raises(PlacementError, match=reason):
        resolve_model(split(**fields), [node()], HOST)


def test_ranks_on_the_cpu_are_planned_and_keep_their_config() -> None:
    """The replica solves the stages again by the same facts, which come along. Its memory refuses nothing here."""
    for asked in (split(pipeline_parallel_size=2), split(tensor_parallel_size=2, kv_cache_memory_bytes="9TiB")):
        found = resolve_model(asked, [node()], HOST)
        assert needs_devices(asked)
        assert found.config == asked
        assert found.facts is not None
        assert (found.demand.cpus, found.demand.gpus) == (asked.num_cpus, 0)


def test_one_rank_on_the_cpu_is_left_to_the_engine() -> None:
    """Its place depends on nothing that the plan knows."""
    assert not needs_devices(split())
    assert resolve_model(split(), [node()], HOST).facts is None
