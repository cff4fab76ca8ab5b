"""How several models of one file are resolved: engines are asked once for all of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import ModelConfig
from serve_app.deploy.resolve_model import requests_of, resolve_model
from serve_app.engines import model_requests
from serve_app.engines.model_requests import Tell
from serve_app.errors import PlacementError
from serve_app.facts.engine_facts import CacheLayer, RankFacts, VllmFacts
from serve_app.facts.inventory import Device, Inventory, parse_gpus
from serve_app.facts.known_facts import Answer, Question
from serve_app.facts.nodes import Node
from serve_app.planning.resource_demand import Demand
from tests.planning.model_requests import CONFIGS

FACTS = VllmFacts({1: RankFacts((10**8, 10**8), 0, 0, 0, (CacheLayer(0, "full", 16, 65536),))})


def unknown_model(folder: Path, width: int) -> ModelConfig:
    """A config of a model of a type without formulas."""
    config = {
        "architectures": ["NewForCausalLM"], "model_type": "new", "hidden_size": width, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_args({"model": str(folder), "infer_backend": "vllm"})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[Question]]:
    """The questions of each time that engines are asked."""
    seen: list[list[Question]] = []

    def answers(questions: list[Question], _: Any, tell: Tell) -> list[Answer]:
        if questions:
            seen.append(questions)
        return [Answer(FACTS) for _ in questions]

    monkeypatch.setattr(model_requests, "answers", answers)
    return seen


def test_engines_are_asked_once_for_all_models(calls: list[list[Question]], tmp_path: Path) -> None:
    """As `serve-app check` does. Without it, each model asks by itself, as a builder of Serve does."""
    inventory, nodes = parse_gpus("24GiB"), [Node("n1", 8, 1)]
    configs = [unknown_model(tmp_path / str(width), width) for width in (64, 128)]
    request_of = requests_of(configs, inventory)
    resolved = [resolve_model(config, nodes, inventory, request_of=request_of) for config in configs]
    assert [item.facts is not None and item.facts.vllm for item in resolved] == [FACTS, FACTS]
    assert [len(questions) for questions in calls] == [4]
    for config in configs:
        resolve_model(config, nodes, inventory)
    assert [len(questions) for questions in calls] == [4, 2, 2]


def test_a_model_that_cannot_be_read_costs_the_others_nothing(calls: list[list[Question]], tmp_path: Path) -> None:
    """Its own error comes when it is resolved."""
    inventory, nodes = parse_gpus("24GiB"), [Node("n1", 8, 1)]
    good = unknown_model(tmp_path / "good", 64)
    broken = ModelConfig.from_args({"model": str(tmp_path / "none"), "infer_backend": "vllm", "num_gpus": 0.5})
    request_of = requests_of([broken, good], inventory)
    assert resolve_model(good, nodes, inventory, request_of=request_of).facts is not None
    assert [len(questions) for questions in calls] == [2]
    with pytest.raises(PlacementError):
        resolve_model(broken, [Node("n1", 8, 0)], inventory, request_of=request_of)


def test_quantised_weights_are_asked_about_for_the_cards_of_the_cluster(
    calls: list[list[Question]], tmp_path: Path
) -> None:
    """Since vLLM chooses their kernels by the card. Hopper's answer is the one without a card."""
    whole = unknown_model(tmp_path / "a", 64)
    quantised = whole.model_copy(update={"quantization": "fp8"})
    inventory = parse_gpus("A100-80GB,T4,H100,24GiB")
    requests_of([whole], inventory)
    assert {question.settings["rules"] for question in calls[0]} == {"cuda"}
    requests_of([quantised], inventory)
    assert [question.settings["rules"] for question in calls[1]] == ["cuda"] * 2 + ["cuda 7.5"] * 2 + ["cuda 8.0"] * 2


def test_a_model_that_swaps_asks_ray_for_no_gpu() -> None:
    """Its pool has them. On a cluster with nodes of both kinds it must be tied to those with GPUs."""
    swaps = {"model": str(CONFIGS / "gemma3"), "infer_backend": "vllm", "residency": {"policy": "swap"}, "num_cpus": 2}
    config = ModelConfig.from_args(swaps)
    resolved = resolve_model(config, [Node("n1", 8, 1)], parse_gpus("24GiB"))
    assert resolved.demand == Demand(cpus=2)
    assert resolved.config == config
    both = [Node("n1", 8, 1, accelerator_types=("L4",)), Node("n2", 8, 0)]
    with pytest.raises(PlacementError, match="could come to n2, which has none. Set accelerator_type"):
        resolve_model(config, both, parse_gpus("24GiB"))
    auto = ModelConfig.from_args({**swaps, "infer_backend": "auto"})
    chosen = resolve_model(auto, [Node("n1", 8, 1)], parse_gpus("24GiB"))
    assert (chosen.config.infer_backend, chosen.config.num_gpus, chosen.demand) == ("vllm", None, Demand(cpus=2))
    with pytest.raises(PlacementError, match="auto finds no node on which the model fits into the pool 'default'"):
        resolve_model(auto, [Node("n1", 8, 1)], parse_gpus("2GiB"))
    pool = {"policy": "swap", "pool_memory": {"cpu": "60GiB"}}
    on_cpu = ModelConfig.from_args({**swaps, "infer_backend": "auto", "device": "cpu", "residency": pool})
    host = Device("n1", None, "memory", 64 * 2**30, 60 * 2**30)
    assert resolve_model(on_cpu, [Node("n1", 8, 0)], Inventory((host,))).config.infer_backend == "pt"
    tied = ModelConfig.from_args({**swaps, "accelerator_type": "L4"})
    assert resolve_model(tied, both, parse_gpus("24GiB")).demand.accelerator_type == "L4"
