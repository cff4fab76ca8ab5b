"""vLLM's own code says how it lays out public models, without a GPU and without weights."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import ModelConfig
from serve_app.engines.vllm import model_facts
from serve_app.facts.architecture import read_architecture
from serve_app.facts.engine_facts import CacheLayer, EngineFacts, RankFacts, VllmFacts, facts_from_json
from serve_app.facts.inventory import parse_gpus
from serve_app.planning.kv_groups import kv_bytes_per_request
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.planner import make_plan
from serve_app.planning.vllm_formulas import rank_by_formula
from tests.planning.model_requests import CONFIGS, shape_of
from tests.warm_vllm import WarmVllm

SIZES = (1, 2, 4, 8)
# A model that vLLM takes at all sizes is asked at these two, and `python -m tests.planning.vllm_survey --configs` asks
# at all four. Two models are compared with the formulas at all of them.
ENDS = (1, 8)
BY_FORMULAS = ("qwen2-7b", "deepseek-v2-lite")
# Checkpoints that are here for the bytes of their weights, whose models may not be split by 8.
CHECKPOINT_SIZES = (1, 4)
BATCHED = 8192
# The kinds of cache that each model has, and the sizes that vLLM takes if they are not all.
MODELS: dict[str, tuple[str, tuple[int, ...]]] = {
    "bge-m3": ("", SIZES),
    "deepseek-v2-lite": ("mla", SIZES),
    "deepseek-v3": ("mla", SIZES),
    "deepseek-v4-small": ("mla sliding_mla", SIZES),
    "gemma-3-27b-it": ("full sliding", SIZES),
    "glm-4.5-air": ("full", SIZES),
    "gpt-oss-20b": ("full sliding", SIZES),
    "kimi-k2": ("mla", SIZES),
    "llama-4-scout": ("chunked full", SIZES),
    "mamba2-1.3b": ("state", SIZES),
    "minimax-m2": ("full", SIZES),
    "mistral-small-24b": ("full", SIZES),
    "phi-4": ("full", (1, 2)),
    "qwen2-7b": ("full", (1, 2, 4)),
    "qwen2.5-vl-7b": ("full", (1, 2, 4)),
    "qwen3-next": ("full state", SIZES),
    "qwen3-next-80b": ("full state", SIZES),
    "whisper-large-v3": ("cross full", (1, 2, 4)),
}
# Billions of bytes of a checkpoint's weights on one rank, rounded, by what its repository stores.
QUANTISED = {
    "gpt-oss-20b": 13.8, "deepseek-v3": 671.0, "kimi-k2": 1028.0, "minimax-m2": 230.0, "qwen2.5-7b-awq": 5.6,
    "qwen2.5-7b-gptq-int4": 5.6, "llama-3.1-8b-fp8": 9.1, "llama-3.1-8b-w4a16": 5.7, "qwen3-8b-fp8": 9.4,
}  # fmt: skip
# vLLM pads the 2880 channels of gpt-oss, which makes its experts 9 % and the model 6.7 % larger.
TOLERANCE = 0.07


# Arguments that change the KV cache of gpt-oss.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "keeps all tokens": {"disable_hybrid_kv_cache_manager": True},
    "one step at a time": {"async_scheduling": False},
}


def sizes_asked(name: str) -> tuple[int, ...]:
    """The tensor parallel sizes at which a model is asked."""
    if name not in MODELS:
        return CHECKPOINT_SIZES
    return ENDS if MODELS[name][1] == SIZES and name not in BY_FORMULAS else SIZES


@pytest.fixture(scope="module")
def answers(warm_vllm: WarmVllm) -> dict[tuple[str, str], dict[str, Any]]:
    """What vLLM's code says of each model and each type of the KV cache."""
    asked = [(name, "auto") for name in sorted(MODELS.keys() | QUANTISED.keys() | {"llama-3.1-8b-bnb-4bit"})]
    asked += [(name, "fp8") for name in BY_FORMULAS]
    asked += [("gpt-oss-20b", name) for name in ARGUMENTS]
    jobs = [
        {
            "folder": str(CONFIGS / name),
            "tensor_parallel_sizes": sizes_asked(name),
            "kv_cache_dtype": "auto" if kind in ARGUMENTS else kind,
            "engine_args": ARGUMENTS.get(kind, {}),
        }
        for name, kind in asked
    ]
    return dict(zip(asked, warm_answers(warm_vllm, "cuda", jobs), strict=True))


def warm_answers(warm_vllm: WarmVllm, rules: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to jobs of these rules."""
    found: list[dict[str, Any]] = warm_vllm.call(rules, "tests.planning.vllm_facts:answers", jobs, timeout_s=280)
    return found


def run(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The answers of the product's own process, which prints nothing to stdout."""
    asked, answered = folder / "jobs.json", folder / "answers.jsonl"
    asked.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "serve_app.engines.vllm.model_facts", str(asked), str(answered)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
    lines = [json.loads(line) for line in answered.read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "job"}
        for line in lines
        if "facts" in line or "error" in line
    ]


def facts_of(answer: dict[str, Any]) -> VllmFacts:
    """The facts of an answer."""
    facts = facts_from_json("vllm", answer["facts"])
    assert isinstance(facts, VllmFacts)
    return facts


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MODELS)
def test_facts_of_a_public_model(name: str, answers: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Each kind of cache and each size that vLLM takes; its cache was compared with vLLM's own bytes."""
    facts = facts_of(answers[name, "auto"])
    kinds, sizes = MODELS[name]
    asked = sizes_asked(name)
    assert tuple(facts.ranks) == tuple(size for size in asked if size in sizes), facts.refusals
    assert set(facts.refusals) == set(asked) - set(sizes)
    for rank in facts.ranks.values():
        assert " ".join(sorted({layer.kind for layer in rank.cache})) == kinds
        assert rank.weights > 0
        assert all(rank.layers)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_arguments_change_the_cache_as_vllm_says(answers: dict[tuple[str, str], dict[str, Any]]) -> None:
    """gpt-oss keeps half of its layers in full and the others in windows. Without vLLM's manager of both, a request
    takes all tokens in all 24 layers, and without asynchronous scheduling a window holds fewer tokens."""
    own, whole, single = (
        facts_of(answers["gpt-oss-20b", kind]).ranks[1] for kind in ("auto", "keeps all tokens", "one step at a time")
    )
    tokens = own.max_model_len
    assert kv_bytes_per_request(whole, tokens, BATCHED) == 24 * tokens * 2 * 8 * 64 * 2
    assert kv_bytes_per_request(single, tokens, BATCHED) < kv_bytes_per_request(own, tokens, BATCHED)
    assert (own.steps, single.steps) == (2, 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", QUANTISED)
def test_weights_of_a_quantised_checkpoint(name: str, answers: dict[tuple[str, str], dict[str, Any]]) -> None:
    """As many bytes as the repository stores, within 7 %."""
    rank = facts_of(answers[name, "auto"]).ranks[1]
    assert abs(rank.weights / 1e9 - QUANTISED[name]) < TOLERANCE * QUANTISED[name]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", sorted(MODELS.keys() | QUANTISED.keys()))
def test_a_public_model_is_planned(name: str, answers: dict[tuple[str, str], dict[str, Any]]) -> None:
    """On eight large cards, at the largest size that vLLM takes, without its tensors if there are no formulas."""
    config = json.loads((CONFIGS / name / "config.json").read_text())
    facts, architecture = facts_of(answers[name, "auto"]), read_architecture(config, name)
    size, length = max(facts.ranks), min(4096, architecture.max_model_len)
    given = {"model": "x", "infer_backend": "vllm", "tensor_parallel_size": size, "max_model_len": length}
    has_formulas = architecture.is_known_to_vllm and architecture.quantization is None
    tensors = shape_of(name)[1] if has_formulas else ()
    request = ModelRequest(
        "m", ModelConfig.from_args(given), architecture, tensors, engine_facts=EngineFacts(vllm=facts)
    )
    plan = make_plan([request], parse_gpus("8x192GiB"))
    assert plan.fits, plan.problems
    assert plan.models[0].ranks[0].weights.bytes == facts.ranks[size].weights


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["auto", "fp8"])
@pytest.mark.parametrize("name", BY_FORMULAS)
def test_formulas_give_what_vllm_says(name: str, kind: str, answers: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Parts of the weights, pages and bytes of a request, to the byte."""
    architecture, tensors = shape_of(name)
    for size, theirs in facts_of(answers[name, kind]).ranks.items():
        ours = rank_by_formula(architecture, tensors, size, 2, 2 if kind == "auto" else 1)
        assert (ours.layers, ours.before, ours.after) == (theirs.layers, theirs.before, theirs.after)
        assert [page(layer) for layer in ours.cache] == [page(layer) for layer in theirs.cache]
        for tokens in (1, 1000, 8192):
            assert kv_bytes_per_request(ours, tokens, BATCHED) == kv_bytes_per_request(theirs, tokens, BATCHED)


def page(layer: CacheLayer) -> tuple[object, ...]:
    """What makes a page, without the number of its form."""
    return layer.layer, layer.kind, layer.block_tokens, layer.page_bytes, layer.window, layer.pages


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_encoder_comes_before_the_layers(answers: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Qwen2.5-VL's encoder has 0.68 billion parameters, and its embedding has 0.54."""
    rank = facts_of(answers["qwen2.5-vl-7b", "auto"]).ranks[1]
    assert 2 * (0.54 + 0.66) < rank.before / 1e9 < 2 * (0.55 + 0.70)
    assert len(rank.layers) == 28


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_vllm_cannot_load_is_refused_in_its_words(answers: dict[tuple[str, str], dict[str, Any]]) -> None:
    """vLLM 0.32 has no bitsandbytes."""
    facts = facts_of(answers["llama-3.1-8b-bnb-4bit", "auto"])
    assert not facts.ranks
    assert all("bitsandbytes" in reason for reason in facts.refusals.values())


# It reads images, and vLLM refuses one of the sizes.
STARTED = "qwen2.5-vl-7b"
OWN_CODE = """
from transformers import LlamaConfig

open({ran!r}, "w").close()

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""


@pytest.fixture(scope="module")
def own_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two copies of a model that brings its own code, which leaves a file where it runs."""
    folder = tmp_path_factory.mktemp("own")
    config = json.loads((CONFIGS / "llama-3-70b" / "config.json").read_text())
    config |= {
        "num_hidden_layers": 2,
        "model_type": "own_llama",
        "auto_map": {"AutoConfig": "configuration_own.OwnConfig"},
    }
    for name in ("trusted", "untrusted"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "configuration_own.py").write_text(OWN_CODE.format(ran=f"{folder}/ran-{name}"))
    return folder


@pytest.fixture(scope="module")
def of_process(own_code: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the product's own process says of a model whose code is not trusted, of one whose code is, and of a public
    one."""
    jobs = [
        {"folder": str(own_code / "untrusted"), "tensor_parallel_sizes": [1]},
        {"folder": str(own_code / "trusted"), "tensor_parallel_sizes": [1], "trust_remote_code": True},
        {"folder": str(CONFIGS / STARTED), "tensor_parallel_sizes": sizes_asked(STARTED)},
    ]
    return run(jobs, tmp_path_factory.mktemp("process"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_code_of_a_model_runs_only_if_it_is_trusted(own_code: Path, of_process: list[dict[str, Any]]) -> None:
    """Without `trust_remote_code` the process leaves the folder's code alone and says why there are no facts."""
    untrusted, trusted = map(facts_of, of_process[:2])
    assert not untrusted.ranks
    assert "contains custom code" in untrusted.refusals[1]
    assert str(own_code) not in untrusted.refusals[1]
    # Two layers, embedding and head of Llama 3 70B.
    assert 7.6e9 < trusted.ranks[1].weights < 7.7e9
    assert (own_code / "ran-trusted").exists()
    assert not (own_code / "ran-untrusted").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_products_process_says_the_same(
    of_process: list[dict[str, Any]], answers: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """As the process in which these tests ask, to the letter, with the size that is refused."""
    assert of_process[2:] == [answers[STARTED, "auto"]]
    assert facts_of(of_process[2]).refusals


def test_jobs_of_two_rules_are_refused() -> None:
    """A process has one platform, and vLLM is not even imported."""
    jobs = [{"folder": "x"}, {"folder": "x", "rules": "cpu"}]
    with pytest.raises(ValueError, match="the rules cpu and cuda, and need the same"), model_facts.ready(jobs):
        pass


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_rules_of_the_cpu(warm_vllm: WarmVllm) -> None:
    """vLLM's CPU build has blocks of 128 tokens and one step on its way, and the same weights as on a GPU."""
    (answer,) = warm_answers(warm_vllm, "cpu", [{"folder": str(CONFIGS / "qwen2-7b"), "tensor_parallel_sizes": [1]}])
    rank = facts_of(answer).ranks[1]
    ours = rank_by_formula(*shape_of("qwen2-7b"), 1, 2, 2, on_cpu=True)
    assert [page(layer) for layer in ours.cache] == [page(layer) for layer in rank.cache]
    assert ours.steps == rank.steps
    assert {layer.block_tokens for layer in rank.cache} == {128}
    assert rank.steps == 1
    assert 15.2e9 < rank.weights < 15.3e9


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_quantised_weights_on_older_cards(warm_vllm: WarmVllm, answers: dict[tuple[str, str], dict[str, Any]]) -> None:
    """A T4 takes a checkpoint in FP8 as a Hopper does, with Marlin's kernels, and refuses MXFP4 in vLLM's words."""
    jobs = [
        {"folder": str(CONFIGS / name), "tensor_parallel_sizes": [1]} for name in ("llama-3.1-8b-fp8", "gpt-oss-20b")
    ]
    fp8, mxfp4 = map(facts_of, warm_answers(warm_vllm, "cuda 7.5", jobs))
    assert fp8.ranks[1].weights == facts_of(answers["llama-3.1-8b-fp8", "auto"]).ranks[1].weights
    assert "Minimum capability: 80. Current capability: 75" in mxfp4.refusals[1]


def rank(weights: int = 10**9, page_bytes: int = 65536) -> RankFacts:
    """A rank of a model with two layers."""
    cache = tuple(CacheLayer(number, "full", 16, page_bytes) for number in range(2))
    return RankFacts((weights // 2, weights // 2), 0, 0, 1000, cache)


OUTLINE = {
    "architectures": ["NewForCausalLM"], "model_type": "new", "hidden_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 8, "vocab_size": 1000, "max_position_embeddings": 4096, "dtype": "bfloat16",
}  # fmt: skip


def asked(facts: VllmFacts | None, **config: Any) -> ModelRequest:
    """A model of an unknown type."""
    settings = {"model": "x", "infer_backend": "vllm", **config}
    architecture = read_architecture(OUTLINE, "model: x")
    return ModelRequest("m", ModelConfig.from_args(settings), architecture, (), engine_facts=EngineFacts(vllm=facts))


def test_a_model_of_an_unknown_type_is_planned_by_vllms_facts() -> None:
    """Weights, buffers and KV cache are vLLM's, and the sizes that vLLM refuses are refused in its words."""
    facts = VllmFacts({1: rank(), 2: rank(5 * 10**8)}, {4: "8 heads cannot be divided by it"})
    plan = make_plan([asked(facts)], parse_gpus("24GiB"))
    assert plan.fits
    assert plan.models[0].ranks[0].weights.bytes == 10**9
    assert plan.models[0].kv_bytes_per_request == 4096 // 16 * 2 * 65536
    longer = VllmFacts({1: replace(rank(), max_model_len=8192)})
    assert make_plan([asked(longer)], parse_gpus("24GiB")).models[0].max_model_len == 8192
    assert make_plan([asked(facts, tensor_parallel_size=2)], parse_gpus("2x24GiB")).fits
    (problem,) = make_plan([asked(facts, tensor_parallel_size=4)], parse_gpus("4x24GiB")).problems
    assert problem.code == "tensor_parallel"
    assert "8 heads cannot be divided by it" in problem.message
    assert problem.message.endswith("by it. Of the sizes that vLLM was asked about, these are valid: 1, 2.")


@pytest.mark.parametrize(("kind", "page_bytes"), [("auto", 65536), ("bfloat16", 65536), ("fp8", 32768)])
def test_the_facts_of_the_type_of_the_cache_are_used(kind: str, page_bytes: int) -> None:
    """vLLM is asked with the config's own type and with 8 bits, which differ in pages and may differ in weights."""
    told = EngineFacts(vllm=VllmFacts({1: rank()}), vllm_fp8=VllmFacts({1: rank(9 * 10**8, 32768)}))
    request = replace(asked(None, engine_args={"kv_cache_dtype": kind}), engine_facts=told)
    (model,) = make_plan([request], parse_gpus("24GiB")).models
    assert model.kv_bytes_per_request == 4096 // 16 * 2 * page_bytes
    assert model.ranks[0].weights.bytes == (9 * 10**8 if kind == "fp8" else 10**9)


def test_missing_facts_are_named_with_the_way_to_get_them() -> None:
    """For vLLM, and for a backend that the plan is to choose."""
    for backend in ("vllm", "auto"):
        (problem,) = make_plan([asked(None, infer_backend=backend)], parse_gpus("24GiB")).problems
        assert problem.code == "facts_missing"
        assert "NewForCausalLM" in problem.message
        assert "serve-app plan" in problem.message


def test_a_model_that_vllm_refuses_at_every_size_is_refused_in_its_words() -> None:
    """So that the user reads vLLM's reason once."""
    (problem,) = make_plan([asked(VllmFacts({}, {1: "It needs Blackwell"}))], parse_gpus("24GiB")).problems
    assert problem.code == "vllm_refuses"
    assert "It needs Blackwell" in problem.message


@pytest.mark.parametrize("reason", ["It needs Blackwell", "It needs Blackwell."])
def test_a_reason_of_vllm_ends_in_one_full_stop(reason: str) -> None:
    """Whether vLLM's own words end in one or not."""
    for facts in (VllmFacts({}, {1: reason}), VllmFacts({2: rank()}, {1: reason})):
        (problem,) = make_plan([asked(facts)], parse_gpus("2x24GiB")).problems
        assert ".." not in problem.message
        assert problem.message.endswith(".")
    (problem,) = make_plan([replace(asked(None), facts_problem=reason)], parse_gpus("24GiB")).problems
    assert problem.message.endswith("It was asked: It needs Blackwell.")


def test_a_model_that_only_encodes_takes_no_cache() -> None:
    """vLLM runs as many requests at once as it has rows."""
    encoder = RankFacts((10**8, 10**8), 0, 0, 0, ())
    plan = make_plan([asked(VllmFacts({1: encoder}), max_num_seqs=16)], parse_gpus("24GiB"))
    assert plan.fits
    assert plan.models[0].max_full_length_requests == 16


def test_an_encoders_cache_and_activations_are_named_terms() -> None:
    """2048 embeddings of 1024 elements, and a layer of width 2 × 100 + 3 × 400 for four patches of each."""
    config = OUTLINE | {"vision_config": {"hidden_size": 100, "intermediate_size": 400}}
    given = {"model": "x", "infer_backend": "vllm", "engine_args": {"max_num_batched_tokens": 2048}}
    request = ModelRequest(
        "m",
        ModelConfig.from_args(given),
        read_architecture(config, "x"),
        (),
        engine_facts=EngineFacts(vllm=VllmFacts({1: rank()})),
    )
    (model,) = make_plan([request], parse_gpus("24GiB")).models
    terms = {term.name: term.bytes for term in model.ranks[0].activation.terms}
    assert terms["embeddings in the encoder's cache"] == 2048 * 1024 * 2
    assert terms["one layer of the encoder for a whole batch"] == 2048 * 4 * (2 * 100 + 3 * 400) * 2
    assert sum(terms.values()) <= model.ranks[0].activation.bytes


def test_vllms_facts_come_before_the_formulas_for_a_quantised_checkpoint() -> None:
    """The formulas know the stored tensors, and vLLM may pad them or add scales."""
    config = json.loads((CONFIGS / "qwen2.5-7b-awq" / "config.json").read_text())
    given = ModelConfig.from_args({"model": "x", "infer_backend": "vllm"})
    request = ModelRequest(
        "m",
        given,
        read_architecture(config, "x"),
        (),
        engine_facts=EngineFacts(vllm=VllmFacts({1: rank()})),
    )
    assert request.rank_weights(1).bytes == 10**9
    plain = read_architecture(config | {"quantization_config": None}, "x")
    assert (
        ModelRequest(
            "m",
            given,
            plain,
            (),
            engine_facts=EngineFacts(vllm=VllmFacts({1: rank()})),
        )
        .rank_weights(1)
        .bytes
        == 0
    )
