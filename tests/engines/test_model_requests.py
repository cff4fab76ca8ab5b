"""What engines are asked about a model, and what a plan does with their answers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import ModelConfig
from serve_app.engines import model_requests
from serve_app.engines.model_requests import Tell, answered, read_request
from serve_app.facts.engine_facts import CacheLayer, RankFacts, VllmFacts
from serve_app.facts.inventory import parse_gpus
from serve_app.facts.known_facts import Answer, Question
from serve_app.planning.planner import make_plan
from tests.planning.model_requests import CONFIGS

UNKNOWN = {
    "architectures": ["NewForCausalLM"], "model_type": "new", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
MIB = 2**20


def rank(page_bytes: int) -> RankFacts:
    """A rank of two layers with 10 MiB of weights."""
    cache = tuple(CacheLayer(number, "full", 16, page_bytes) for number in range(2))
    return RankFacts((4 * MIB, 4 * MIB), MIB, MIB, 0, cache)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model of a type for which there are no formulas."""
    (tmp_path / "config.json").write_text(json.dumps(UNKNOWN))
    return str(tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """The questions that reach the engines. vLLM knows the model, and transformers does not."""
    seen: list[Question] = []

    def answers(questions: list[Question], _: Any, tell: Tell) -> list[Answer]:
        seen.extend(questions)
        tell("asking")
        return [
            Answer(VllmFacts({1: rank(MIB // 2 if question.settings["kv_cache_dtype"] == "fp8" else MIB)}))
            if question.engine == "vllm"
            else Answer(None, "it knows no such model")
            for question in questions
        ]

    monkeypatch.setattr(model_requests, "answers", answers)
    return seen


def config(model: str, **settings: Any) -> ModelConfig:
    """A config of one model."""
    return ModelConfig.from_args({"model": model, **settings})


def test_a_model_with_formulas_asks_nobody(asked: list[Question]) -> None:
    """Nothing heavy is imported or started for what the plan knows."""
    (found,) = answered([read_request("m", config(str(CONFIGS / "qwen2-7b"), infer_backend="auto"))], print)
    assert asked == []
    assert found.facts_problem == ""


@pytest.mark.parametrize(
    ("backend", "engines"), [("vllm", ["vllm", "vllm"]), ("pt", ["pt"]), ("auto", ["vllm", "vllm", "pt"])]
)
def test_only_engines_that_may_run_the_model_are_asked(
    folder: str, asked: list[Question], backend: str, engines: list[str]
) -> None:
    """vLLM with either type of its cache, so that 8 bits can be offered."""
    answered([read_request("m", config(folder, infer_backend=backend))], print)
    assert [question.engine for question in asked] == engines


def test_code_of_a_model_is_part_of_the_question(folder: str) -> None:
    """Where it may run."""

    def keys(**settings: Any) -> set[str]:
        found = read_request("m", config(folder, infer_backend="auto", **settings)).questions
        return {question.key for question in found.values()}

    code = Path(folder) / "modeling_new.py"
    code.write_text("1")
    safe, trusting = keys(), keys(trust_remote_code=True)
    code.write_text("2")
    assert keys() == safe
    assert not keys(trust_remote_code=True) & trusting


def test_two_replicas_of_a_file_ask_once(folder: str, asked: list[Question]) -> None:
    """Models that are alike are one question."""
    both = [read_request(name, config(folder, infer_backend="vllm")) for name in ("a", "b")]
    one, two = answered(both, print)
    assert len(asked) == 2
    assert one.engine_facts == two.engine_facts


def test_the_plan_counts_what_vllm_said(folder: str, asked: list[Question]) -> None:
    """Weights, and pages of the type that the config asks for."""
    (request,) = answered([read_request("m", config(folder, infer_backend="vllm"))], print)
    plan = make_plan([request], parse_gpus("8GiB"))
    assert plan.fits
    assert plan.models[0].ranks[0].weights.bytes == 10 * MIB
    assert plan.models[0].kv_bytes_per_request == 256 * 2 * MIB
    args = {"kv_cache_dtype": "fp8"}
    (small,) = answered([read_request("m", config(folder, infer_backend="vllm", engine_args=args))], print)
    assert make_plan([small], parse_gpus("8GiB")).models[0].kv_bytes_per_request == 256 * MIB


def test_why_an_engine_said_nothing_is_in_the_problem(folder: str, asked: list[Question]) -> None:
    """With the engine's own words."""
    (request,) = answered([read_request("m", config(folder, infer_backend="pt"))], print)
    (problem,) = make_plan([request], parse_gpus("8GiB")).problems
    assert problem.code == "facts_missing"
    assert "pt: it knows no such model" in problem.message


def test_without_a_word_no_engine_is_asked(folder: str, asked: list[Question]) -> None:
    """A replica that starts goes by what was kept."""
    (request,) = answered([read_request("m", config(folder, infer_backend="vllm"))], None)
    assert asked == []
    assert request.vllm_facts is None


def test_a_quantised_checkpoint_is_asked_about(asked: list[Question], tmp_path: Path) -> None:
    """The formulas are proven for whole weights only."""
    whole = json.loads((CONFIGS / "qwen2-7b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(whole | {"quantization_config": {"quant_method": "awq"}}))
    found = read_request("m", config(str(tmp_path), infer_backend="vllm"))
    assert [question.engine for question in found.questions.values()] == ["vllm", "vllm"]
    assert replace(found.checkpoint.architecture, quantization=None).is_known_to_vllm
