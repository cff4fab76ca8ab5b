"""Answers of engines are kept by their question, and read back as they were."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from serve_app.facts.engine_facts import (
    BesideLayers,
    CacheLayer,
    RankFacts,
    TensorFacts,
    VllmFacts,
    facts_from_json,
    facts_to_json,
)
from serve_app.facts.known_facts import Answer, Question, answer_from_json, facts_folder, known_answer
from serve_app.facts.weights import Tensor

RANK = RankFacts(layers=(10, 20), before=5, after=6, buffers=7, cache=(CacheLayer(0, "sliding", 16, 4096, window=128),))
OTHERS = {
    2: replace(RANK, beside=BesideLayers(5, 1, 6), dependent=(0,)),
    4: replace(RANK, before=3, no_stages="no such interface"),
}
FACTS = VllmFacts({1: RANK, **OTHERS}, {3: "3 does not divide the heads"})
QUESTION = Question("vllm", "0.32.0", {"model_type": "x", "hidden_size": 8}, {"dtype": "auto"})


def test_facts_are_read_as_they_were_written() -> None:
    """Through JSON, whose keys are text."""
    assert facts_from_json("vllm", json.loads(json.dumps(facts_to_json(FACTS)))) == FACTS
    assert RANK.weights == 41


def test_tensors_are_read_as_they_were_written() -> None:
    """Those of equal layers are one line, and the model of a tensor whose name has two numbers is the same."""
    layers = [
        Tensor(f"model.layers.{number}.{name}.weight", "BF16", shape)
        for number in (0, 1, 3)
        for name, shape in (("q_proj", (8, 4)), ("experts.0", (2,)), ("experts.1", (2,)))
    ]
    tensors = (Tensor("embed.weight", "F32", (10, 8)), *layers, Tensor("scale", "F32", ()))
    written = json.dumps(facts_to_json(TensorFacts(tensors)))
    read = facts_from_json("pt", json.loads(written))
    assert isinstance(read, TensorFacts)
    assert sorted(read.tensors, key=str) == sorted(tensors, key=str)
    assert len(json.loads(written)["tensors"]) == 5


@pytest.mark.parametrize("item", [["w", "F99", [1], []], ["w", "F32", [-1], []], ["w", "F32"], ["w", "F32", ["x"], []]])
def test_tensors_of_another_form_are_not_read(item: list[object]) -> None:
    """A damaged file counts as none, and the engine is asked again."""
    with pytest.raises((KeyError, TypeError, ValueError)):
        answer_from_json("pt", {"facts": {"tensors": [item]}})


def test_a_question_is_known_by_what_has_an_effect() -> None:
    """The order of fields and the version that wrote the file have none. The engine's version and a size have one."""
    same = replace(QUESTION, config={"hidden_size": 8, "transformers_version": "4.1", "model_type": "x"})
    assert same.key == QUESTION.key
    others = [
        replace(QUESTION, version="0.33.0"),
        replace(QUESTION, config={"model_type": "x", "hidden_size": 9}),
        replace(QUESTION, settings={"dtype": "float16"}),
        replace(QUESTION, engine="pt"),
    ]
    assert len({question.key for question in [QUESTION, *others]}) == 5


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"facts": {"ranks": {"x": 1}, "refusals": {}}}'])
def test_what_is_missing_or_damaged_is_asked_again(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was cut off is no answer, and stops nothing."""
    monkeypatch.setenv("SERVE_APP_CACHE", str(tmp_path))
    facts_folder().mkdir()
    file = facts_folder() / f"{QUESTION.key}.json"
    if text is not None:
        file.write_text(text)
    assert known_answer(QUESTION) is None
    file.write_text(json.dumps(Answer(FACTS).to_json()))
    assert known_answer(QUESTION) == Answer(FACTS)


def test_a_refusal_is_an_answer() -> None:
    """It would be the same a second time."""
    refused = Answer(None, "it knows no such model")
    assert answer_from_json("vllm", json.loads(json.dumps(refused.to_json()))) == refused
