"""`quantization: auto` becomes the method that loses least of those that fit, before anything starts."""

import re
from io import StringIO

import pytest
from ruamel.yaml import YAML

from serve_app.cli.plan.write import pinned_text
from serve_app.config import ModelConfig
from serve_app.deploy.resolve_model import needs_devices, resolve_model
from serve_app.errors import ConfigError, PlacementError
from serve_app.facts.inventory import Device, Inventory, parse_gpus
from serve_app.planning.plan import ModelPlan
from serve_app.planning.planner import make_plan
from serve_app.planning.resolve import resolve
from serve_app.planning.unplanned import unplanned
from tests.builders import model_config, node
from tests.planning.model_requests import CONFIGS, request

GIB = 2**30


def planned(gpus: str, **fields: object) -> ModelPlan:
    """Qwen2-7B with `quantization: auto` on these cards, where it fits."""
    asked = request(infer_backend="pt", max_model_len=4096, max_num_seqs=4, quantization="auto", **fields)
    plan = make_plan([asked], parse_gpus(gpus))
    assert plan.fits, plan.problems
    return plan.models[0]


@pytest.mark.parametrize(
    ("gpus", "method", "reason"),
    [
        ("24GiB", None, "keeps the weights whole, because they fit"),
        ("12GiB", "bnb-int8", r"takes bnb-int8, because whole weights lack \d"),
        ("8GiB", "bnb-nf4", r"takes bnb-nf4, because whole weights lack .* and bnb-int8 lacks \d"),
    ],
)
def test_the_least_loss_that_fits_is_taken(gpus: str, method: str | None, reason: str) -> None:
    """And the plan says why."""
    model = planned(gpus)
    assert model.config.quantization == method
    assert [text for text in model.reasons if "quantization: auto" in text] == [model.reasons[-1]]
    assert re.search(reason, model.reasons[-1])


def test_the_plan_is_that_of_the_method_by_name() -> None:
    """In every figure."""
    chosen = planned("8GiB")
    named = request(infer_backend="pt", max_model_len=4096, max_num_seqs=4, quantization="bnb-nf4")
    assert make_plan([named], parse_gpus("8GiB")).models[0].ranks == chosen.ranks


def test_what_fits_in_no_method_is_refused_with_fixes() -> None:
    """By what the smallest weights lack."""
    asked = request(infer_backend="pt", max_model_len=4096, quantization="auto")
    with pytest.raises(PlacementError, match="(?s)too much.*Fix: "):
        resolve(asked, parse_gpus("4GiB"))


def test_the_replica_is_told_the_method() -> None:
    """So it loads what was planned, whatever is free when it starts."""
    asked = request(infer_backend="pt", max_model_len=4096, quantization="auto")
    assert resolve(asked, parse_gpus("12GiB")).config.quantization == "bnb-int8"


def test_auto_of_both_fields_means_pt() -> None:
    """As with the methods of pt by their names."""
    asked = request(max_model_len=4096, quantization="auto")
    config = resolve(asked, parse_gpus("8GiB")).config
    assert (config.infer_backend, config.quantization) == ("pt", "bnb-nf4")


@pytest.mark.parametrize(
    ("memory", "method"), [(64 * GIB, None), (12 * GIB, "bnb-int8"), (8 * GIB, "bnb-nf4"), (2 * GIB, "bnb-nf4")]
)
def test_on_the_cpu_the_memory_of_the_host_decides(memory: int, method: str | None) -> None:
    """A shortage refuses nothing there, so the smallest weights are taken if nothing fits."""
    config = model_config(
        model=str(CONFIGS / "qwen2-7b"), device="cpu", max_model_len=1024, max_num_seqs=1, quantization="auto"
    )
    host = Inventory((Device("n1", None, "memory", memory, memory),))
    assert needs_devices(config)
    assert resolve_model(config, [node()], host).config.quantization == method


def test_without_a_plan_there_is_no_start() -> None:
    """Devices that are not known, and a model that the plan has no formulas for."""
    config = model_config(model=str(CONFIGS / "qwen2-7b"), quantization="auto")
    with pytest.raises(PlacementError, match="quantization: auto is chosen by the memory plan, and there is no plan"):
        resolve_model(config, [node(gpus=1)], None)
    mamba = model_config(model=str(CONFIGS / "mamba2-1.3b"), quantization="auto", device="cpu")
    host = Inventory((Device("n1", None, "memory", 64 * GIB, 64 * GIB),))
    with pytest.raises(PlacementError, match="quantization: auto: the plan has no formulas"):
        resolve_model(mamba, [node()], host)


def test_a_quantised_checkpoint_leaves_no_choice() -> None:
    """It is refused as for a method by name."""
    asked = request("qwen2.5-7b-awq", infer_backend="pt", quantization="auto")
    assert "quantization: auto, but this checkpoint is quantised already (by awq)" in unplanned(asked)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"infer_backend": "vllm"}, "quantization: auto is a method of pt"),
        ({"infer_backend": "auto", "tensor_parallel_size": 2}, "quantization works with pt only"),
        ({"max_memory": {0: "3GB", "cpu": "20GB"}}, "max_memory names cpu, but"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], words: str) -> None:
    """vLLM's fields, and tiers on which no quantised layer can be."""
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_args({"model": "x", "infer_backend": "pt", "quantization": "auto", **fields})


@pytest.mark.parametrize(("gpus", "written"), [("12GiB", "bnb-int8"), ("24GiB", None)])
def test_a_pinned_file_names_the_method(gpus: str, written: str | None) -> None:
    """`serve-app plan --write` leaves nothing open."""
    asked = request(infer_backend="pt", max_model_len=4096, quantization="auto")
    text = "applications:\n- name: m\n  args: {model: x, infer_backend: pt, quantization: auto}\n"
    document = YAML().load(StringIO(pinned_text(make_plan([asked], parse_gpus(gpus)), text)))
    assert document["applications"][0]["args"]["quantization"] == written
