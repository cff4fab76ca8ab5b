"""Weights and KV cache of each stage are what vLLM's own code builds for its rank, to the byte."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from serve_app.facts.architecture import read_architecture
from serve_app.facts.engine_facts import RankFacts, VllmFacts, facts_from_json
from serve_app.facts.weights import tensors_without_weights
from serve_app.planning.pipeline.solver import count
from serve_app.planning.pipeline.stage import Demand, NoPipeline, Pipeline, Rooms, StageCards, even_split
from serve_app.planning.vllm_formulas import rank_by_formula
from tests.planning.model_requests import CONFIGS
from tests.warm_vllm import WarmVllm

GIB = 2**30
MAX_MODEL_LEN = 4096
SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 7, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 1000, "max_position_embeddings": 4096,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
# Small models whose stages have different things beside their layers: the embedding on the first and the head on the
# last, a tied one on both, and both on every stage.
MADE: Mapping[str, Mapping[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False},
    "qwen2 tied": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3 moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "tie_word_embeddings": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [0], **EXPERTS,
    },
}  # fmt: skip
# Each model with its tensor parallel size and its layers per stage.
JOBS: Mapping[str, tuple[str, int, tuple[int, ...]]] = {
    "llama, 2 stages": ("llama", 1, (5, 2)),
    "llama, 3 stages of 2": ("llama", 2, (1, 4, 2)),
    "qwen2 tied, 2 stages": ("qwen2 tied", 1, (1, 6)),
    "qwen2 tied, 3 stages": ("qwen2 tied", 2, (3, 1, 3)),
    "qwen3 moe, 3 stages": ("qwen3 moe", 1, (2, 3, 2)),
    "deepseek-v2-lite, 3 stages": ("deepseek-v2-lite", 1, (9, 11, 7)),
    "gpt-oss-20b, 3 stages": ("gpt-oss-20b", 1, (7, 9, 8)),
    "gemma3, 2 stages": ("gemma3", 1, ()),
    "qwen3-next, 2 stages": ("qwen3-next", 1, (4, 4)),
    "qwen3-next-80b, 3 stages of 2": ("qwen3-next-80b", 2, (17, 14, 17)),
    "qwen2.5-vl-7b, 3 stages": ("qwen2.5-vl-7b", 1, (10, 9, 9)),
    "llama-4-scout, 3 stages of 4": ("llama-4-scout", 4, (15, 17, 16)),
}
# The plan has formulas for these, too.
BY_FORMULA = (
    "llama, 2 stages", "qwen2 tied, 2 stages", "qwen3 moe, 3 stages", "deepseek-v2-lite, 3 stages", "gemma3, 2 stages",
    "qwen3-next, 2 stages",
)  # fmt: skip
AVAILABLE = (6 * GIB, 2 * GIB, 4 * GIB)


def partition_of(name: str, folder: Path) -> tuple[int, ...]:
    """The layers of each stage: those of the job, or one layer on the first of two stages."""
    given = JOBS[name][2]
    config = json.loads((folder / "config.json").read_text())
    return given or (1, int(config.get("text_config", config)["num_hidden_layers"]) - 1)


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory, warm_vllm: WarmVllm
) -> dict[str, tuple[tuple[int, ...], dict[str, Any]]]:
    """The partition and vLLM's answer of each job."""
    scratch = tmp_path_factory.mktemp("stages")
    for name, config in MADE.items():
        (scratch / name).mkdir()
        (scratch / name / "config.json").write_text(json.dumps({**SMALL, **config}))
    jobs = []
    for name, (model, size, _) in JOBS.items():
        folder = scratch / model if model in MADE else CONFIGS / model
        partition = partition_of(name, folder)
        available = AVAILABLE[: len(partition)]
        jobs.append(
            {
                "folder": str(folder),
                "tensor_parallel_size": size,
                "partition": partition,
                "available": available,
                "max_model_len": MAX_MODEL_LEN,
            }
        )
    told = warm_vllm.call("cuda", "tests.planning.pipeline.vllm_stages:answers", jobs, timeout_s=160)
    return dict(zip(JOBS, zip((job["partition"] for job in jobs), told, strict=True), strict=True))


def rank_of(name: str, answer: Mapping[str, Any]) -> RankFacts:
    """The facts of a job."""
    facts = facts_from_json("vllm", answer["facts"])
    assert isinstance(facts, VllmFacts)
    return facts.ranks[JOBS[name][1]]


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", JOBS)
def test_a_stage_holds_what_vllm_builds(name: str, answers: dict[str, tuple[tuple[int, ...], dict[str, Any]]]) -> None:
    """Weights, bytes of a block, blocks that all stages have, and the least with which vLLM starts."""
    partition, theirs = answers[name]
    facts, stages = rank_of(name, theirs), theirs["stages"]
    demand = Demand(theirs["max_model_len"], 10**6, theirs["max_num_batched_tokens"])
    assert demand.max_model_len == MAX_MODEL_LEN
    assert tuple(theirs["even_split"]) == even_split(len(facts.layers), len(partition))
    assert theirs["steps"] == facts.steps - 1 + len(partition)

    def counted(available: list[int]) -> Pipeline | NoPipeline:
        rooms = [stage["weights"] + facts.buffers + size for stage, size in zip(stages, available, strict=True)]
        cards = [StageCards((f"n1:{n}",), Rooms(room, room, room)) for n, room in enumerate(rooms)]
        return count(facts, cards, partition, demand)

    ours = counted(list(AVAILABLE[: len(partition)]))
    assert isinstance(ours, Pipeline), ours
    for stage, their in zip(ours.stages, stages, strict=True):
        assert (stage.weights, stage.block_bytes) == (their["weights"], their["block_bytes"])
        assert stage.kv_cache == their["blocks"] * their["block_bytes"]
        assert their["buffers"] <= stage.buffers
    assert {their["blocks"] for their in stages} == {ours.blocks}
    assert theirs["least_blocks"] == ours.blocks_per_request + 1
    least = [theirs["least_blocks"] * their["block_bytes"] for their in stages]
    assert isinstance(counted(least), Pipeline)
    assert isinstance(counted([least[0] - 1, *least[1:]]), NoPipeline)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", BY_FORMULA)
def test_the_formulas_say_the_same_of_stages(
    name: str, answers: dict[str, tuple[tuple[int, ...], dict[str, Any]]]
) -> None:
    """To the byte; or they say nothing, and each stage counts with all that is beside its layers, which is no less."""
    theirs, model = rank_of(name, answers[name][1]), JOBS[name][0]
    config = {**SMALL, **MADE[model]} if model in MADE else json.loads((CONFIGS / model / "config.json").read_text())
    architecture = read_architecture(config, model)
    ours = rank_by_formula(architecture, tensors_without_weights(config, model), JOBS[name][1], 2, 2)
    assert theirs.beside is not None
    if ours.beside is None:
        everything = ours.before + ours.after
        assert max(theirs.beside.first, theirs.beside.middle, theirs.beside.last) <= everything
    else:
        assert (ours.beside.first, ours.beside.last) == (theirs.beside.first, theirs.beside.last)
    assert ours.dependent == theirs.dependent


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("name", "dependent"),
    [
        ("llama, 2 stages", ()),
        ("gemma3, 2 stages", ()),
        ("deepseek-v2-lite, 3 stages", ()),
        ("qwen3 moe, 3 stages", (0,)),
        ("qwen3-next, 2 stages", (0, 1, 2, 4, 5, 6)),
    ],
)
def test_layers_that_cannot_be_a_stage_alone_are_known(
    name: str, dependent: tuple[int, ...], answers: dict[str, tuple[tuple[int, ...], dict[str, Any]]]
) -> None:
    """vLLM wants experts in each stage of Qwen3-MoE, and pads the states of a hybrid only where it has attention."""
    assert rank_of(name, answers[name][1]).dependent == dependent
