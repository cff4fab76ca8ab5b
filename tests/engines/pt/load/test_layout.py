"""transformers' own code says how a model is laid out, without weights, without a network, and without foreign code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from serve_app.engines import model_facts as asking
from serve_app.engines.pt.load.block_names import block_names
from serve_app.engines.pt.load.layout import layout_of, read_config
from serve_app.engines.pt.model_facts import answer
from serve_app.facts.engine_facts import PtFacts, facts_from_json
from serve_app.facts.known_facts import Question
from tests.engines.pt.tiny_models import CONFIGS, VOCABULARY, tiny_model

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).with_name("ran").touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_tied_head_counts_once() -> None:
    """And its size is said, since the CPU makes a copy of it."""
    tied = layout_of(LlamaConfig(**(CONFIGS["llama"].to_dict() | {"tie_word_embeddings": True})), torch.float32)
    apart = layout_of(CONFIGS["llama"], torch.float32)
    head = 4 * VOCABULARY * 32
    assert (tied.tied_head, apart.tied_head) == (head, 0)
    assert apart.after - tied.after == head
    assert "lm_head" in tied.names.before


def test_the_type_decides_the_bytes() -> None:
    """DeepSeek keeps the bias of its experts in float32 whatever is asked for."""
    half, whole = (layout_of(CONFIGS["deepseek-v3"], dtype) for dtype in (torch.bfloat16, torch.float32))
    assert half.kv == tuple(size // 2 for size in whole.kv)
    assert half.before == whole.before // 2
    assert whole.layers[1] - 2 * half.layers[1] == -4 * 4


def test_a_cache_that_is_shared_lies_in_the_layer_that_fills_it() -> None:
    """And a layer without a cache of its own has none."""
    facts = layout_of(CONFIGS["qwen3-next"], torch.float32)
    assert [bool(size) for size in facts.kv] == [False, False, False, True]
    assert [bool(size) for size in facts.state] == [True, True, True, False]


def test_lists_of_parts_of_layers_are_layers() -> None:
    """The outermost list with the most parameters counts, and not the one of experts inside of it."""
    assert block_names(tiny_model("qwen2-moe")).layers == ("model.layers",)
    assert block_names(tiny_model("gpt2")).layers == ("transformer.h",)
    assert block_names(tiny_model("bloom")).before == (
        "transformer.word_embeddings",
        "transformer.word_embeddings_layernorm",
        "lm_head",
    )


def test_a_config_says_its_type() -> None:
    """`auto` is the type of the config."""
    folder = Path(__file__).parents[3] / "planning" / "configs" / "qwen2-7b"
    assert read_config(folder, "auto", False)[1] is torch.bfloat16
    assert read_config(folder, "float16", False)[1] is torch.float16


def write_config(folder: Path, **fields: Any) -> Path:
    """A folder with nothing but a config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "model_type"),
        ({"model_type": "no-such-type"}, "no-such-type"),
        ({"model_type": "t5"}, "AutoModelForCausalLM"),
        ({"model_type": "llama", "hidden_size": "4096"}, "hidden_size"),
    ],
)
def test_what_cannot_be_built_has_a_reason(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    """In one line, and the process goes on."""
    reason = answer({"folder": str(write_config(tmp_path / "m", **fields)), "dtype": "auto"})["error"]
    assert words in reason
    assert "\n" not in reason
    assert len(reason) <= 400


def test_code_of_a_model_runs_only_when_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked at the terminal, and nothing of it is imported."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked at the terminal"))
    places = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    fields = CONFIGS["llama"].to_dict() | {"model_type": "own", "auto_map": places}
    folder = write_config(tmp_path / "m", **fields)
    (folder / "own.py").write_text(CODE)
    job: dict[str, Any] = {"folder": str(folder), "dtype": "float32"}
    for refused in (job, job | {"trust_remote_code": False}):
        assert "contains custom code" in answer(refused)["error"]
    assert not list(tmp_path.rglob("ran"))
    facts = facts_from_json("pt", answer(job | {"trust_remote_code": True})["facts"])
    assert facts == layout_of(CONFIGS["llama"], torch.float32)
    assert list(tmp_path.rglob("ran"))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_process_answers_each_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be answered does not hold up the others, and the answers are kept, the refusal too."""
    monkeypatch.setenv("SERVE_APP_CACHE", str(tmp_path))
    configs: list[dict[str, Any]] = [CONFIGS["llama"].to_dict(), {"model_type": "t5"}, CONFIGS["mamba2"].to_dict()]
    questions = [Question("pt", "5.19", config, {"dtype": "float32"}) for config in configs]
    found = asking.answers(questions, [None] * 3, lambda _: None)
    assert "AutoModelForCausalLM" in found[1].problem
    for number, name in ((0, "llama"), (2, "mamba2")):
        facts = found[number].facts
        assert isinstance(facts, PtFacts)
        assert facts == layout_of(CONFIGS[name], torch.float32)
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
        assert facts.before + sum(facts.layers) + facts.after == sum(p.nbytes for p in model.parameters())
    assert len(list(tmp_path.rglob("pt-*.json"))) == 3
