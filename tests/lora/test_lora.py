"""The adapters of the tests answer what their file says, in peft's own merged model, with a margin."""

import json
from pathlib import Path

import pytest
from peft import PeftConfig
from transformers import AutoTokenizer

from serve_app.demo import MODEL_DIR
from serve_app.demo.train import encode, exchange, worst_margin
from serve_app.facts.adapter import read_adapter
from tests.demo_answers import ANSWERS
from tests.lora import ADAPTERS_DIR
from tests.lora.train import MARGIN, NUMBERS, merged, name_of, read_answers

NAMES = [name_of(number) for number in NUMBERS]
MOST_BYTES = 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_leads_by_the_margin(name: str) -> None:
    """So greedy decoding gives it word for word, whatever rounding an engine has."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    examples = [encode(tokenizer, exchange(pair)) for pair in read_answers()[name].items()]
    assert worst_margin(merged(ADAPTERS_DIR / name), examples, tokenizer.pad_token_id) >= MARGIN


def test_no_two_adapters_answer_alike() -> None:
    """A text that was computed with another adapter, or with the base, is never the right one."""
    answers = read_answers()
    assert sorted(answers) == NAMES
    for question in answers[NAMES[0]]:
        said = [answers[name][question] for name in NAMES]
        assert len({*said, ANSWERS[question]}) == len(NAMES) + 1


def test_the_files_are_small_and_name_no_machine() -> None:
    """They are part of the repository."""
    assert sum(file.stat().st_size for file in ADAPTERS_DIR.rglob("*") if file.is_file()) < MOST_BYTES
    for name in NAMES:
        config = json.loads((ADAPTERS_DIR / name / "adapter_config.json").read_text())
        assert not Path(config["base_model_name_or_path"]).is_absolute()
        assert read_adapter(ADAPTERS_DIR / name).rank == PeftConfig.from_pretrained(str(ADAPTERS_DIR / name)).r <= 8
