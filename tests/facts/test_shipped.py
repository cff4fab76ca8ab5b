"""A machine without engines plans public models by the answers that the package ships."""

from pathlib import Path

import pytest

from scripts.ship_facts import shipped_questions
from serve_app.facts.known_facts import SHIPPED, Question, known_answer

# transformers has no causal model of these.
REFUSED = {("pt", "kimi_k2"), ("pt", "qwen2_5_vl")}


def test_the_file_is_in_the_package() -> None:
    """It is small, since much of it repeats."""
    assert 10_000 < SHIPPED.stat().st_size < 200_000


@pytest.mark.parametrize("question", shipped_questions(), ids=lambda question: f"{question.engine}-{question.key[-8:]}")
def test_each_public_model_has_an_answer(question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make facts` asks again. A refusal is not shipped."""
    monkeypatch.setenv("SERVE_APP_CACHE", str(tmp_path))
    kind = question.engine, str(question.config.get("model_type"))
    assert (known_answer(question) is not None) == (kind not in REFUSED)
