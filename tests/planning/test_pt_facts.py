"""What transformers' own code says of a model equals the model itself, and the formulas where there are some."""

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from serve_app.engines.pt.load.layout import layout_of
from serve_app.facts.architecture import HYBRID, MLA, PT_ONLY, STANDARD, read_architecture
from serve_app.facts.engine_facts import BlockNames, EngineFacts, PtFacts
from serve_app.facts.inventory import Device
from serve_app.facts.weights import Tensor, local_tensors
from serve_app.planning.fit_pt import fit_pt
from serve_app.planning.layer_map import Block, block_number, blocks_of, stored_block
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import ModelPlan
from serve_app.planning.unplanned import unplanned
from tests.builders import model_config
from tests.planning.pt_survey import shape_of, survey
from tests.planning.real_configs import PARAMETERS, QUICK, TOLERANCE, billions, facts_of
from tests.planning.small_configs import small_config

# One type for each kind of cache and each way to name layers, and some that pt runs alone.
SURVEYED = (
    "gpt_oss", "glm4_moe", "gemma3", "gpt_neox", "opt", "falcon", "mamba2", "mamba", "nemotron_h", "jamba", "xlm",
    "minimax", "deepseek_v32", "gemma3n_text", "roberta", "dbrx", "mpt",
)  # fmt: skip
ELEMENT_BYTES = 2
FACTS = PtFacts(
    layers=(100, 200), before=50, after=30, kv=(4, 8), state=(0, 16), buffers=(1, 2, 3, 4),
    names=BlockNames(("model.layers",), ("model.embed_tokens",), 2),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SURVEYED)
def test_the_plan_equals_the_model(model_type: str) -> None:
    """Weights, cache, place of each layer, and whether pt joins its rows: `python -m tests.planning.pt_survey`."""
    finding = survey(model_type)
    assert (finding.refused, finding.different) == ("", "")


@cache
def stored(model_type: str) -> tuple[PreTrainedConfig, tuple[Tensor, ...]]:
    """A small config, and the tensors that a checkpoint of it has."""
    config = small_config(model_type)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        return config, tuple(local_tensors(Path(folder)))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(STANDARD | MLA | HYBRID | PT_ONLY))
def test_facts_equal_the_formulas(model_type: str) -> None:
    """For each type with formulas, block by block. The facts count what the model makes itself besides."""
    config, tensors = stored(model_type)
    architecture = read_architecture(config.to_dict(), model_type)
    facts = layout_of(config, torch.bfloat16)
    without_buffers = replace(facts, buffers=(0,) * len(facts.buffers))
    for copies_tied in (False, True):
        by_formulas = blocks_of(tensors, architecture, ELEMENT_BYTES, None, copies_tied)
        assert blocks_of((), architecture, ELEMENT_BYTES, without_buffers, copies_tied) == by_formulas


def test_facts_become_blocks() -> None:
    """With what the model makes itself, and the copy of a tied head."""
    found = blocks_of((), shape_of(FACTS), ELEMENT_BYTES, FACTS)
    assert found == [Block(-1, 51), Block(0, 102, 4, 0), Block(1, 203, 8, 16), Block(2, 34)]
    tied = blocks_of((), shape_of(FACTS), ELEMENT_BYTES, replace(FACTS, tied_head=40), copies_tied=True)
    assert [block.weights for block in tied] == [51, 102, 203, 74]


def test_a_quantised_checkpoint_says_its_weights_itself() -> None:
    """Names may lack the first part. A copy of the tied head and a layer after the last one are not loaded."""
    tensors = (
        Tensor("embed_tokens.weight", "BF16", (5, 2)),
        Tensor("layers.0.mlp.experts.7.down_proj.qweight", "I32", (4, 3)),
        Tensor("layers.1.norm.weight", "F32", (6,)),
        Tensor("layers.2.mtp.weight", "BF16", (600,)),
        Tensor("lm_head.weight", "BF16", (5, 2)),
        Tensor("norm.weight", "BF16", (2,)),
    )
    facts = replace(FACTS, tied_head=20, buffers=(0, 0, 0, 0))
    assert [block.weights for block in blocks_of(tensors, shape_of(facts), ELEMENT_BYTES, facts)] == [20, 48, 12, 4]
    floats = tuple(tensor for tensor in tensors if tensor.dtype != "I32")
    assert [block.weights for block in blocks_of(floats, shape_of(facts), ELEMENT_BYTES, facts)] == [50, 100, 200, 30]


@pytest.mark.parametrize(
    ("name", "number"),
    [("model.embed_tokens.weight", -1), ("model.layers.1.mlp.layers.0.weight", 1), ("model.norm.weight", 2)],
)
def test_a_name_says_its_block(name: str, number: int) -> None:
    """A list inside of a layer is none of layers."""
    assert block_number(name, FACTS.names) == stored_block(name, FACTS.names) == number


def fit(facts: PtFacts, **fields: Any) -> ModelPlan:
    """On one GPU with room to spare."""
    request = ModelRequest("m", model_config(**fields), shape_of(facts), (), engine_facts=EngineFacts(pt=facts))
    gpu = Device("n1", 0, "GPU", 2**34, 2**34)
    found = fit_pt(request, [(gpu, 2**34)], [2**34], ())
    assert isinstance(found, ModelPlan), found
    return found


def test_a_model_that_runs_alone_is_planned_for_one_request() -> None:
    """Whatever the config asks for, and with the room that a pass over the whole text takes."""
    joined, alone = fit(FACTS, max_num_seqs=8), fit(replace(FACTS, alone="it has no cache"), max_num_seqs=8)
    assert (joined.max_full_length_requests, alone.max_full_length_requests) == (8, 1)
    assert alone.ranks[0].weights.bytes == joined.ranks[0].weights.bytes == 51 + 102 + 203 + 34


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_widely_used_models_have_their_published_size(name: str) -> None:
    """Within 2 %. `python -m tests.planning.real_configs` asks for all of `PARAMETERS`."""
    facts = facts_of(name)
    assert billions(facts) == pytest.approx(PARAMETERS[name], rel=TOLERANCE)
    assert len(facts.layers) == facts.names.count


def test_an_architecture_without_formulas_is_planned_by_facts() -> None:
    """Without them, the plan says which facts it lacks."""
    outline = replace(shape_of(FACTS), has_formulas=False)
    request = ModelRequest("m", model_config(), outline, ())
    assert "the engine's own code" in unplanned(request)
    told = replace(request, engine_facts=EngineFacts(pt=FACTS))
    assert (unplanned(told), told.weights) == ("", 50 + 100 + 200 + 30)
    assert "vLLM's own code" in unplanned(replace(told, config=model_config(infer_backend="vllm")))
