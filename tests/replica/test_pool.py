"""What a pool may take of a node, and how a replica is planned in it."""

import os
from typing import Any

import pytest

from serve_app.config import ModelConfig
from serve_app.errors import EngineError
from serve_app.facts.gpus import Gpu
from serve_app.model_fields import ResidencyConfig
from serve_app.planning.memory import reserve
from serve_app.replica.pool import cpu_seats, gpu_budget, gpu_seats, host_budget, ray_options, show_gpus
from tests.planning.model_requests import CONFIGS

GIB = 2**30
CARDS = [Gpu(0, "GPU-0", "card", 24 * GIB, 2 * GIB), Gpu(1, "GPU-1", "card", 16 * GIB, 16 * GIB)]


def swaps(**fields: Any) -> ResidencyConfig:
    """How a model shares."""
    return ResidencyConfig(policy="swap", **fields)


def config(**fields: Any) -> ModelConfig:
    """Gemma 3, 4B, in a pool."""
    own = {"model": str(CONFIGS / "gemma3"), "infer_backend": "pt", "max_model_len": 4096, "dtype": "bfloat16"}
    return ModelConfig.from_args(own | {"residency": {"policy": "swap"}} | fields)


def test_the_budget_is_what_the_config_says_and_never_the_reserve() -> None:
    """What others hold of the cards now does not count, because the keeper has them in Ray's books."""
    whole = {f"GPU {card.index}": card.total_bytes - reserve(card.total_bytes) for card in CARDS}
    assert gpu_budget(swaps(), CARDS) == whole
    assert gpu_budget(swaps(pool_memory={0: "10GiB"}), CARDS[:1]) == {"GPU 0": 10 * GIB}
    assert gpu_budget(swaps(pool_memory={1: "99GiB"}), CARDS[1:]) == {"GPU 1": whole["GPU 1"]}
    with pytest.raises(EngineError, match="names GPU 7, and this node has 0, 1"):
        gpu_budget(swaps(pool_memory={7: "1GiB"}), CARDS)


def test_copies_go_to_the_next_slower_tier() -> None:
    """Those of GPUs to the host's memory, and those of the processor to the disk."""
    assert host_budget(swaps(pool_memory={0: "1GiB", "cpu": "3GiB"}), on_cpu=False) == 3 * GIB
    assert host_budget(swaps(pool_memory={"cpu": "1GiB", "disk": "4GiB"}), on_cpu=True) == 4 * GIB
    assert host_budget(swaps(), on_cpu=False) > 0


def test_the_keeper_asks_ray_once_for_all_models() -> None:
    """For bytes where the node advertises them, and for whole GPUs otherwise."""
    assert ray_options(swaps(), CARDS, {"CPU": 8, "GPU": 2}) == {"num_gpus": 2}
    by_index = ray_options(swaps(pool_memory={0: "10GiB"}), CARDS[:1], {"vram_mib_0": 24576})
    assert by_index == {"resources": {"vram_mib_0": 10240}}
    assert ray_options(swaps(), [], {}) == {}
    with pytest.raises(EngineError, match="names 1 GPUs, and Ray has 2 whole ones"):
        ray_options(swaps(pool_memory={0: "10GiB"}), CARDS[:1], {"CPU": 8, "GPU": 2})


@pytest.mark.parametrize("backend", ["pt", "vllm"])
def test_a_model_may_go_to_any_card_on_which_it_fits(backend: str) -> None:
    """It takes no more KV cache than it needs, so that others fit beside it."""
    model = config(infer_backend=backend)
    assert model.swaps is not None
    seats = gpu_seats(model, CARDS, gpu_budget(model.swaps, CARDS), by_index=False, facts=None)
    assert sorted(tuple(seat.lease) for seat in seats) == [("GPU 0",), ("GPU 1",)]
    assert all(9 * GIB < sum(seat.lease.values()) < 12 * GIB for seat in seats)


def test_one_that_does_not_fit_is_refused_with_the_figures() -> None:
    """Before anything starts."""
    model = config()
    with pytest.raises(EngineError, match="GiB"):
        gpu_seats(model, CARDS, {"GPU 0": GIB, "GPU 1": GIB}, by_index=False, facts=None)


def test_the_processor_is_planned_by_the_budget_of_the_pool() -> None:
    """And not by what the machine has free."""
    model = config(
        device="cpu", model="serve-app/demo", dtype="float32", max_model_len=None, residency=_on_cpu("64MiB")
    )
    assert model.swaps is not None
    (seat,) = cpu_seats(model, model.swaps, None)
    assert 10 * 2**20 < seat.lease["cpu"] < 64 * 2**20
    assert seat.planned.config.kv_cache_memory_bytes == sum(rank.kv_cache.bytes for rank in seat.planned.ranks)
    small = config(device="cpu", model="serve-app/demo", dtype="float32", max_model_len=None, residency=_on_cpu("8MiB"))
    assert small.swaps is not None
    with pytest.raises(EngineError):
        cpu_seats(small, small.swaps, None)


def test_vllm_is_shown_the_cards_of_its_plan_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its n-th rank takes the n-th visible card. pt takes cards by their numbers among all of the pool."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shown = {}
    for backend in ("vllm", "pt"):
        model = config(infer_backend=backend)
        seats = gpu_seats(model, CARDS, {"GPU 0": 20 * GIB, "GPU 1": 12 * GIB}, by_index=False, facts=None)
        (second,) = [seat for seat in seats if "GPU 1" in seat.lease]
        show_gpus(second.planned, CARDS)
        shown[backend] = os.environ["CUDA_VISIBLE_DEVICES"]
    assert shown == {"vllm": "1,0", "pt": "0,1"}


def _on_cpu(memory: str) -> dict[str, Any]:
    return {"policy": "swap", "pool_memory": {"cpu": memory}}
