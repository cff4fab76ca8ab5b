"""What engines are asked about a model, and what a plan does with their answers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import ModelConfig
from serve_app.engines import model_requests
from serve_app.engines.model_requests import Tell, _joined, answered, read_request
from serve_app.errors import ConfigError
from serve_app.facts.checkpoint import DEMO_MODEL
from serve_app.facts.engine_facts import CacheLayer, RankFacts, TensorFacts, VllmFacts
from serve_app.facts.inventory import parse_gpus
from serve_app.facts.known_facts import Answer, Question
from serve_app.facts.weights import Tensor
from serve_app.planning.planner import make_plan
from serve_app.planning.unplanned import missing_facts, unplanned
from tests.planning.model_requests import CONFIGS

UNKNOWN = {
    "architectures": ["NewForCausalLM"], "model_type": "new", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
MIB = 2**20
TENSORS = (Tensor("model.embed_tokens.weight", "BF16", (1000, 64)),)


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
    """The questions that reach the engines. vLLM knows the model. Of transformers only the tensors are known."""
    seen: list[Question] = []

    def answer(question: Question) -> Answer:
        if question.settings.get("wants") == "tensors":
            return Answer(TensorFacts(TENSORS))
        if question.engine == "pt":
            return Answer(None, "it knows no such model")
        return Answer(VllmFacts({1: rank(MIB // 2 if question.settings["kv_cache_dtype"] == "fp8" else MIB)}))

    def answers(questions: list[Question], _: Any, tell: Tell) -> list[Answer]:
        seen.extend(questions)
        tell("asking")
        return [answer(question) for question in questions]

    monkeypatch.setattr(model_requests, "answers", answers)
    return seen


def config(model: str, **settings: Any) -> ModelConfig:
    """A config of one model."""
    return ModelConfig.from_args({"model": model, **settings})


def test_a_model_with_formulas_asks_nobody(asked: list[Question]) -> None:
    """Nothing heavy is imported or started for what the plan knows."""
    (found,) = answered([read_request("m", config(DEMO_MODEL, infer_backend="auto"))], print)
    assert asked == []
    assert found.facts_problem == ""


def test_a_folder_without_weights_asks_for_its_tensors(asked: list[Question], monkeypatch: pytest.MonkeyPatch) -> None:
    """By one question for both backends. In a replica, where no process is asked, torch builds the model at once."""
    found = read_request("m", config(str(CONFIGS / "qwen2-7b"), infer_backend="auto"))
    assert found.request.tensors == ()
    (request,) = answered([found], print)
    assert [question.settings for question in asked] == [{"wants": "tensors"}]
    assert request.tensors == TENSORS
    assert unplanned(request) == ""
    monkeypatch.setattr(model_requests, "known_answer", lambda _: None)
    monkeypatch.setattr(model_requests, "tensors_without_weights", lambda *_: list(TENSORS))
    assert answered([found], None)[0].tensors == TENSORS


def test_a_config_of_which_no_model_can_be_built_is_refused(
    asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the folder and the reason, on a machine without transformers too."""
    reason = "pt is not installed here"
    monkeypatch.setattr(model_requests, "answers", lambda questions, *_: [Answer(None, reason) for _ in questions])
    found = read_request("m", config(str(CONFIGS / "qwen2-7b"), infer_backend="vllm"))
    with pytest.raises(ConfigError, match=f"qwen2-7b: there are no weights, and no model can be built.*: {reason}"):
        answered([found], print)


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


@pytest.mark.parametrize(
    ("kind", "types"),
    [(None, [None, "fp8"]), ("auto", [None, "fp8"]), ("fp8", ["fp8"]), ("fp8_e5m2", ["fp8_e5m2", "fp8"])],
)
def test_vllm_is_asked_for_the_very_type_of_the_cache(
    folder: str, asked: list[Question], kind: str | None, types: list[str | None]
) -> None:
    """The answer for another type of 8 bits is not taken for it."""
    args = {} if kind is None else {"kv_cache_dtype": kind}
    (request,) = answered([read_request("m", config(folder, infer_backend="vllm", engine_args=args))], print)
    assert [question.settings["kv_cache_dtype"] for question in asked] == types
    assert request.kv_bytes(1, 4096, 8192) == 256 * (MIB if types[0] != "fp8" else MIB // 2) * 2


def test_the_formulas_leave_a_checkpoint_that_names_its_cache(asked: list[Question], tmp_path: Path) -> None:
    """Its `auto` is 8 bits, so not even a guess is made."""
    whole = json.loads((CONFIGS / "qwen2-7b" / "config.json").read_text())
    scheme = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    (tmp_path / "config.json").write_text(json.dumps(whole | {"quantization_config": scheme}))
    found = read_request("m", config(str(tmp_path), infer_backend="vllm", engine_args={"kv_cache_dtype": "bfloat16"}))
    assert found.questions["vllm"].settings["kv_cache_dtype"] == "bfloat16"
    assert found.request.architecture.names_kv_cache
    assert "quantization_config (compressed-tensors)" in missing_facts(
        read_request("m", config(str(tmp_path), infer_backend="vllm")).request
    )


def test_arguments_that_change_the_cache_go_into_the_question(asked: list[Question]) -> None:
    """Also for a type with formulas, which then do not hold. Arguments of the server do not."""
    args = {"disable-hybrid-kv-cache-manager": True, "tool_call_parser": "hermes", "no_async_scheduling": True}
    found = read_request("m", config(str(CONFIGS / "qwen2-7b"), infer_backend="vllm", engine_args=args))
    answered([found], print)
    told = {"async_scheduling": False, "disable_hybrid_kv_cache_manager": True}
    of_vllm = [question for question in asked if question.engine == "vllm"]
    assert [question.settings["engine_args"] for question in of_vllm] == [told, told]
    assert "with engine_args.async_scheduling and engine_args.disable_hybrid" in missing_facts(found.request)


def test_arguments_at_their_defaults_ask_nobody(asked: list[Question]) -> None:
    """The formulas have prefix caching and asynchronous scheduling, as vLLM has them on a GPU."""
    args = {"enable_prefix_caching": True, "async_scheduling": True, "seed": 1}
    found = read_request("m", config(str(CONFIGS / "qwen2-7b"), infer_backend="vllm", engine_args=args))
    assert unplanned(answered([found], print)[0]) == ""
    assert [question.engine for question in asked] == ["pt"], "only its tensors are asked for"
    own = {**args, "limit_mm_per_prompt": {"image": 0}}
    found = read_request("m", config(str(CONFIGS / "qwen2-7b"), infer_backend="vllm", engine_args=own))
    assert found.questions["vllm"].settings["engine_args"] == {"limit_mm_per_prompt": {"image": 0}}


def test_an_unusual_size_is_asked_about_beside_the_usual_ones(folder: str, asked: list[Question]) -> None:
    """So the answer for the usual sizes is one that is kept or shipped, and the plan has all of them."""
    usual = read_request("m", config(folder, infer_backend="vllm"))
    found = read_request("m", config(folder, infer_backend="vllm", tensor_parallel_size=3))
    keys = {question.key for question in usual.questions.values()}
    assert keys < {question.key for question in found.questions.values()}
    (request,) = answered([found], print)
    assert [question.settings["tensor_parallel_sizes"] for question in asked] == [[1, 2, 4, 8]] * 2 + [[3]] * 2
    assert request.vllm_facts is not None
    assert set(request.vllm_facts.ranks) == {1}, "the engine here says the same of each question"


def test_what_is_said_of_one_size_joins_what_is_said_of_the_others() -> None:
    """Ranks and refusals. A fault over one size costs the others nothing."""
    usual = Answer(VllmFacts({1: rank(MIB)}, {8: "8 heads"}))
    own = Answer(VllmFacts({3: rank(2 * MIB)}))
    both, of_pt = VllmFacts({1: rank(MIB), 3: rank(2 * MIB)}, {8: "8 heads"}), Answer(None, "no")
    assert _joined({"vllm": usual, "vllm+": own, "pt": of_pt}) == {"vllm": Answer(both), "pt": of_pt}
    assert _joined({"vllm": usual, "vllm+": Answer(None, "a fault")})["vllm"].facts == usual.facts
