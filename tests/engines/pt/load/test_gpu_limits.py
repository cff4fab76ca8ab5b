"""What a process may take of each GPU. The GPUs here do not exist: torch's functions are replaced."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from serve_app.engines.pt.load import model_loader
from serve_app.engines.pt.load.model_loader import allocator_limits
from serve_app.facts.inventory import Device
from serve_app.planning.memory import GIB, Figure, context
from serve_app.planning.plan import ModelPlan, RankPlan
from tests.builders import model_config
from tests.planning.model_requests import request
from tests.planning.test_planner import solved

CONTEXT = context("cuda").bytes
POOL = {"policy": "swap"}


class Gpus:
    """Four GPUs of 24 GiB, of which 20 GiB are free, and what was asked of them and set for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.free = 20 * GIB
        self.asked: list[int] = []
        self.fractions: dict[int, float] = {}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setattr(torch.cuda, "mem_get_info", self._info)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 0)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self._set)

    def _info(self, index: int) -> tuple[int, int]:
        self.asked.append(index)
        return self.free, 24 * GIB

    def _set(self, fraction: float, index: int) -> None:
        self.fractions[index] = fraction

    @property
    def caps(self) -> dict[int, int]:
        """The bytes of each GPU that the allocator may take."""
        return {index: round(fraction * 24 * GIB) for index, fraction in self.fractions.items()}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """The GPUs that torch sees."""
    return Gpus(monkeypatch)


def planned_on(*shares: int) -> ModelPlan:
    """A plan on the GPUs from number 2 on, with so many GiB on each: 1 GiB of activations, the context, and the rest
    for weights and cache."""
    (model,) = solved([request(infer_backend="pt", max_model_len=4096)], "24GiB").models
    ranks = []
    for place, share in enumerate(shares):
        device = Device("here", 2 + place, "24GiB", 24 * GIB, 24 * GIB)
        rest = share * GIB - GIB - CONTEXT
        figures = (Figure(rest // 2), Figure(rest - rest // 2), Figure(GIB), Figure(0), Figure(CONTEXT))
        ranks.append(RankPlan(device, *figures, seat=(place, len(shares))))
    return replace(model, ranks=tuple(ranks))


def placed(planned: ModelPlan | None, **fields: Any) -> dict[str, Any]:
    """The options of a quantised checkpoint that transformers places itself."""

    class Stored:
        quantization_config: dict[str, Any] = {"quant_method": "gptq"}  # noqa: RUF012

    return model_loader._placement(model_config(**fields), Stored(), planned)[0]


def test_a_model_of_a_pool_takes_what_it_has_leased(gpus: Gpus) -> None:
    """The allocator raises out-of-memory beyond the plan of each GPU, which others have leased. What is free does not
    count, because a model that parks may still be freeing its memory."""
    gpus.free = 6 * GIB
    placed(planned_on(8, 10), residency=POOL)
    assert gpus.caps == {2: 8 * GIB - CONTEXT, 3: 10 * GIB - CONTEXT}


def test_a_gpu_of_ones_own_has_no_limit(gpus: Gpus) -> None:
    """What a replica takes there beyond its plan is no one else's. Without a plan, a pool has none to enforce."""
    placed(planned_on(8))
    assert gpus.caps == {}
    assert allocator_limits(model_config(residency=POOL), None, {0: GIB}) == {}
    on_cpu = model_config(residency=POOL | {"pool_memory": {"cpu": "8GiB"}}, device="cpu")
    assert allocator_limits(on_cpu, planned_on(8), {}) == {}


@pytest.mark.parametrize("fields", [{}, {"device_map": "auto"}, {"residency": POOL}, {"device_map": {"": 2}}])
def test_no_context_is_made_on_gpus_of_others(gpus: Gpus, fields: dict[str, Any]) -> None:
    """To ask for a GPU's memory makes one, so only those of the plan are asked. That a draft model has a device is no
    other case."""
    model_loader.gpu_memory(model_config(**fields), planned_on(8, 10))
    assert set(gpus.asked) == {2, 3}


@pytest.mark.parametrize("fields", [{}, {"device_map": "balanced"}])
def test_all_gpus_are_asked_where_the_plan_does_not_decide(gpus: Gpus, fields: dict[str, Any]) -> None:
    """Without a plan, and for a way to spread the model that the user has named."""
    planned = planned_on(8, 10) if fields else None
    assert set(model_loader.gpu_memory(model_config(**fields), planned)) == {0, 1, 2, 3}


def test_a_named_way_to_spread_keeps_to_the_lease(gpus: Gpus) -> None:
    """The other GPUs of the pool are those of others."""
    config = model_config(device_map="balanced", residency=POOL)
    assert set(model_loader.gpu_memory(config, planned_on(8, 10))) == {2, 3}


def test_a_limit_goes_with_the_gpu_of_the_plan(gpus: Gpus) -> None:
    """The plan may leave a GPU that `max_memory` names unused, and the other one keeps its own limit."""
    config = model_config(max_memory={0: "6GiB", 1: "7GiB"})
    planned = replace(planned_on(5, 5), config=config)
    second = replace(planned, ranks=planned.ranks[1:])
    assert allocator_limits(config, second, model_loader.gpu_memory(config, second)) == {3: 7 * GIB}


@pytest.mark.parametrize("fields", [{}, {"residency": POOL}, {"max_memory": {0: "8GiB", 1: "10GiB", "cpu": "4GiB"}}])
def test_transformers_places_a_quantised_checkpoint_on_the_gpus_of_the_plan(gpus: Gpus, fields: dict[str, Any]) -> None:
    """With the room for weights and cache there. Tiers are those that the user has named."""
    planned = replace(planned_on(8, 10), config=model_config(**fields))
    options = placed(planned, **fields)
    assert options["device_map"] == "auto"
    tiers = {"cpu": 4 * GIB} if "max_memory" in fields else {}
    assert options["max_memory"] == {2: 7 * GIB - CONTEXT, 3: 9 * GIB - CONTEXT} | tiers
    gpus.free = 2 * GIB
    assert set(placed(planned, **fields)["max_memory"].values()) - {4 * GIB} == {2 * GIB}


def test_without_a_plan_a_quantised_checkpoint_may_take_most_of_each_gpu(gpus: Gpus) -> None:
    """A share of what is free, as before."""
    assert placed(None)["max_memory"] == dict.fromkeys(range(4), 16 * GIB)


@pytest.mark.parametrize("has_plan", [True, False])
def test_the_context_is_taken_off_once(gpus: Gpus, has_plan: bool) -> None:
    """What is free is without it, because to ask makes the context. Nor does it have the model for which a draft model
    is loaded afterwards."""
    fields: dict[str, Any] = {"max_memory": {0: "6GiB", 1: "7GiB"}}
    planned = replace(planned_on(5, 5), config=model_config(**fields)) if has_plan else None
    first, second = (2, 3) if has_plan else (0, 1)
    placed(planned, **fields)
    assert gpus.caps == {first: 6 * GIB - CONTEXT, second: 7 * GIB - CONTEXT}
    gpus.free = 4 * GIB
    placed(planned, **fields)
    assert gpus.caps == dict.fromkeys((first, second), 4 * GIB)
