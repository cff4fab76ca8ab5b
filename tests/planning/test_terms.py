"""Every guess of a plan is explained by terms that add up to it."""

import pytest

from serve_app.facts.calibration import Calibration, setting_key
from serve_app.facts.inventory import Device, Inventory, parse_gpus
from serve_app.planning.calibration_setting import calibration_setting
from serve_app.planning.memory import Figure
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import TERMS, ModelPlan, RankPlan
from serve_app.planning.planner import make_plan
from serve_app.planning.terms import total
from serve_app.planning.unplanned import unplanned
from tests.planning.model_requests import request


def figures(model: ModelPlan) -> list[Figure]:
    """All figures of all ranks that are no product of the checkpoint alone."""
    found = [getattr(rank, kind) for rank in model.ranks for kind in TERMS]
    return [figure for figure in found if figure.certainty != "exact" or figure.terms]


@pytest.mark.parametrize(
    ("asked", "gpus"),
    [
        (request(), "24GiB"),
        (request(infer_backend="vllm", tensor_parallel_size=2), "2x24GiB"),
        (request(infer_backend="vllm", engine_args={"enforce_eager": True}), "24GiB"),
        (request("qwen3-next", infer_backend="vllm", tensor_parallel_size=4), "4x80GiB"),
        (request("deepseek-v2-lite", infer_backend="vllm"), "80GiB"),
        (request(infer_backend="pt", num_gpus=2, max_model_len=4096), "8GiB,24GiB"),
        (request(infer_backend="pt", max_memory={0: "6GiB", "cpu": "30GiB"}, max_model_len=4096), "8GiB"),
        (request(infer_backend="vllm", quantization="fp8"), "24GiB"),
        (request(infer_backend="pt", max_model_len=4096, speculative={"method": "ngram"}), "24GiB"),
    ],
)
def test_terms_add_up(asked: ModelRequest, gpus: str) -> None:
    """Each guess of either backend, with its margin."""
    plan = make_plan([asked], parse_gpus(gpus))
    assert plan.fits
    found = figures(plan.models[0])
    assert len(found) >= 2
    for figure in found:
        assert total(figure.terms) == figure.bytes


def test_speculation_takes_the_logits_of_its_tokens() -> None:
    """For all rows, and at most for the tokens of one chunk. The KV cache and the weights stay as they are."""

    def rank(**fields: object) -> RankPlan:
        plan = make_plan(
            [request(infer_backend="pt", max_model_len=4096, max_num_seqs=16, **fields)], parse_gpus("24GiB")
        )
        return plan.models[0].ranks[0]

    plain, four = rank(), rank(speculative={"method": "ngram"})
    many = rank(speculative={"method": "ngram", "num_speculative_tokens": 32})
    terms = {term.name: term for term in four.activation.terms}
    drafted = terms["logits of drafted tokens"]
    assert dict(drafted.factors)["drafted tokens"] == 16 * 4
    assert four.weights == plain.weights
    assert four.activation.bytes - plain.activation.bytes == pytest.approx(1.1 * drafted.bytes, abs=2)
    assert many.activation.bytes - plain.activation.bytes == pytest.approx(8 * 1.1 * drafted.bytes, abs=10)


def test_a_plan_says_what_does_not_speculate() -> None:
    """A model with states answers without drafts, and vLLM's memory for drafts is not known."""
    speculative = {"method": "ngram"}
    hybrid = request("qwen3-next", infer_backend="pt", max_model_len=4096, num_gpus=4, speculative=speculative)
    (model,) = make_plan([hybrid], parse_gpus("4x80GiB")).models
    assert any("it does not speculate, because its cache has states" in reason for reason in model.reasons)
    assert "logits of drafted tokens" not in {term.name for rank in model.ranks for term in rank.activation.terms}
    for fields in ({"infer_backend": "vllm"}, {"infer_backend": "auto", "tensor_parallel_size": 2}):
        of_vllm = request(speculative=speculative, **fields)
        assert "the plan does not know how much memory vLLM takes for it" in unplanned(of_vllm)
    free = request(infer_backend="auto", max_model_len=4096, speculative=speculative)
    (model,) = make_plan([free], parse_gpus("24GiB")).models
    assert model.backend == "pt"
    assert "speculative is set, whose memory the plan knows only for pt" in model.reasons


def test_a_measured_figure_says_so() -> None:
    """It replaces the guess that it is above, and the calibration file is named."""
    asked, gpus = request(infer_backend="vllm"), parse_gpus("24GiB")
    device = gpus.gpus[0]
    setting = calibration_setting(asked.config, asked.architecture, asked.max_model_len, "", device, 0, 1)
    measured = Calibration(setting, 3 * 2**30, 2**30)
    plan = make_plan([asked], type(gpus)(gpus.devices, calibrations={setting_key(setting): measured}))
    rank = plan.models[0].ranks[0]
    assert [term.bytes for term in rank.activation.terms] == [3 * 2**30]
    assert "calibration.json" in rank.activation.terms[0].name
    assert rank.context.certainty == "calibrated"


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "masked"),
    [
        (32768, 32, 4096, 32768),  # Nothing is repeated beyond 4096 columns, but the mask has them all.
        (4096, 32, 4096, None),
        (512, 32, 2048, None),  # A group of prompts takes four steps at most.
        (512, 2, 1024, None),
    ],
)
def test_a_gpu_repeats_a_bounded_number_of_columns(tokens: int, rows: int, columns: int, masked: int | None) -> None:
    """A step without prompts repeats none, and a chunk those of its prompts. The CPU repeats none at all."""

    def terms(**fields: object) -> dict[str, dict[str, int]]:
        asked = request(infer_backend="pt", max_model_len=tokens, max_num_seqs=rows, **fields)
        devices = (*parse_gpus("80GiB").devices, Device("n1", None, "memory", 64 * 2**30, 64 * 2**30))
        (model,) = make_plan([asked], Inventory(devices)).models
        return {term.name: dict(term.factors) for term in model.ranks[0].activation.terms}

    found = terms()
    assert found["keys and values repeated to all heads, and the mask"]["columns"] == columns
    assert found.get("mask of a chunk over the longest text", {}).get("columns") == masked
    on_cpu = terms(device="cpu")
    assert on_cpu["keys and values repeated to all heads, and the mask"]["columns"] == min(tokens, 4096)
    assert "mask of a chunk over the longest text" not in on_cpu


def test_the_sampler_works_where_the_embedding_is() -> None:
    """accelerate takes the logits from the head's GPU to that of the input."""
    speculative = {"method": "ngram"}
    limits = {0: "6GiB", 1: "16GiB"}
    asked = request(infer_backend="pt", max_memory=limits, max_model_len=4096, speculative=speculative)
    (model,) = make_plan([asked], parse_gpus("8GiB,24GiB")).models
    first, last = ({term.name for term in rank.activation.terms} for rank in model.ranks)
    assert {"logits and two copies", "logits of drafted tokens"} <= first
    assert "logits before they go to the sampler" in last
    assert not last & {"logits and two copies", "logits of drafted tokens"}
    assert "logits before they go to the sampler" not in first
