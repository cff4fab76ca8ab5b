"""What was measured beside what was planned."""

import pytest

from serve_app.config import ModelConfig
from serve_app.engines.planned_here import plan_here
from serve_app.engines.rank_memory import RankMemory
from serve_app.errors import EngineError
from serve_app.facts.calibration import Calibrations
from serve_app.facts.gpus import Gpu
from serve_app.facts.inventory import Device, Inventory
from serve_app.planning.plan import ModelPlan
from serve_app.planning.planner import make_plan
from serve_app.serving.memory_watch import calibrations_of, planned_by_device, require_own_gpus
from tests.planning.model_requests import CONFIGS, request

GIB = 2**30
GPUS = [Gpu(3, "GPU-a", "NVIDIA GeForce RTX 3090", 24 * GIB, 24 * GIB)]


def config(backend: str = "vllm", **fields: object) -> ModelConfig:
    """Gemma 3 on one card."""
    args = {"model": str(CONFIGS / "gemma3"), "infer_backend": backend, "max_model_len": 4096, **fields}
    return ModelConfig.from_args(args)


def planned(asked: ModelConfig, calibrations: Calibrations | None = None) -> ModelPlan:
    """Its plan on GPUS."""
    plan = plan_here(asked, GPUS, calibrations=calibrations)
    assert plan is not None
    return plan


def rank(activation: int, context: int, plan: ModelPlan, device: str = "GPU-a") -> RankMemory:
    """What holds its planned weights and cache, and so much beside."""
    of = plan.ranks[0]
    held = of.weights.bytes + of.kv_cache.bytes + activation + context
    return RankMemory(device, 1, of.weights.bytes, of.kv_cache.bytes, held, held, context)


def test_vllms_next_plan_has_what_was_measured() -> None:
    """In place of the guesses of activations, graphs and context, and marked so; also where it lowers them."""
    asked = config()
    guess = planned(asked)
    measured = calibrations_of(asked, guess, [rank(GIB // 2, GIB // 4, guess)], GPUS)
    (after,) = planned(asked, measured).ranks
    assert (after.activation.bytes, after.activation.certainty) == (GIB // 2, "calibrated")
    assert (after.graph.bytes, after.context.bytes) == (0, GIB // 4)
    assert after.share.certainty == "calibrated"
    assert after.kv_cache.bytes > guess.ranks[0].kv_cache.bytes  # what the guess took too much


def test_pts_next_plan_is_raised_and_never_lowered() -> None:
    """Its peak depends on what was asked of it so far."""
    asked = config("pt")
    guess = planned(asked)
    small, large = (
        planned(asked, calibrations_of(asked, guess, [rank(size, 0, guess)], GPUS)).ranks[0].activation
        for size in (1, 2 * GIB)
    )
    assert small == guess.ranks[0].activation
    assert (large.bytes, large.certainty) == (2 * GIB, "calibrated")


@pytest.mark.parametrize(
    ("fields", "card"),
    [({"max_num_seqs": 8}, "RTX3090"), ({"engine_args": {"enforce_eager": True}}, "RTX3090"), ({}, "L4")],
)
def test_another_setting_or_card_has_figures_of_its_own(fields: dict[str, object], card: str) -> None:
    """Names of cards are compared as people write them."""
    asked = config()
    measured = calibrations_of(asked, planned(asked), [rank(GIB, GIB, planned(asked))], GPUS)

    def certainty(card: str, **fields: object) -> str:
        found = Inventory((Device("n1", 0, card, 24 * GIB, 24 * GIB, False),), measured)
        unit = request("gemma3", infer_backend="vllm", max_model_len=4096, **fields)
        return make_plan([unit], found).models[0].ranks[0].share.certainty

    assert certainty("RTX3090") == "calibrated"
    assert certainty(card, **fields) == "guessed"


def test_where_the_driver_does_not_tell_nothing_is_calibrated() -> None:
    """As in a container, whose pids NVML does not know; nor for a model that is not planned."""
    asked = config()
    unknown = RankMemory("GPU-a", 1, 1, 1, None, None, None)
    assert calibrations_of(asked, planned(asked), [unknown], GPUS) == {}
    assert calibrations_of(asked, None, [rank(1, 1, planned(asked))], GPUS) == {}


def test_a_plan_by_index_means_the_machines_number_and_else_the_replicas_own() -> None:
    """The one card is number 3 of the machine and 0 of the replica."""
    by_index = plan_here(config(gpu_ids=[3]), GPUS, by_index=True)
    for plan in (planned(config()), by_index):
        assert list(planned_by_device(plan, GPUS)) == ["GPU-a"]


def test_an_engine_on_somebody_elses_gpu_is_refused() -> None:
    """With both named."""
    plan = planned(config())
    require_own_gpus([rank(1, 1, plan)], GPUS)
    require_own_gpus([rank(1, 1, plan, "cpu")], [])
    with pytest.raises(EngineError, match=r"runs on GPU-b, and was given GPU-a\. CUDA_DEVICE_ORDER"):
        require_own_gpus([rank(1, 1, plan, "GPU-b")], GPUS)
