"""What is sent to a model that is tuned."""

import json
from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.tuning.workload import MARGIN, PRESETS, Ask, Workload, fitted, read_workload


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("context", [256, 2048, 131072])
def test_every_request_fits_the_context(name: str, context: int) -> None:
    """Whatever the context is, and it is the same in every run."""
    workload = read_workload(name, context)
    assert workload.longest <= context - MARGIN
    assert all(0 <= ask.shared_tokens < ask.prompt_tokens and ask.output_tokens > 0 for ask in workload.asks)
    assert read_workload(name, context) == workload  # It is the same in every run.


def test_the_medians_are_those_of_the_traces() -> None:
    """Before anything is made to fit."""
    asks = read_workload("chat", 131072).asks
    assert sorted(ask.prompt_tokens for ask in asks)[len(asks) // 2] == pytest.approx(1020, rel=0.1)
    assert sorted(ask.output_tokens for ask in asks)[len(asks) // 2] == pytest.approx(129, rel=0.1)


def test_lengths_shrink_together_and_it_is_said() -> None:
    """Prompts keep their proportions, apart from the few that are cut."""
    short, whole = read_workload("rag", 1024), read_workload("rag", 131072)
    ratios = {
        round(one.prompt_tokens / other.prompt_tokens, 1) for one, other in zip(short.asks, whole.asks, strict=True)
    }
    assert len(ratios) <= 2
    assert "so that they fit a context of 1024 tokens" in short.note


def test_a_log_has_bodies_or_numbers(tmp_path: Path) -> None:
    """As requests, as answers' usage, or as both."""
    messages = [{"role": "user", "content": "Hello"}]
    lines = [
        {"model": "gpt", "messages": messages, "max_tokens": 20, "temperature": 1},
        {"usage": {"prompt_tokens": 30, "completion_tokens": 5}},
        {"prompt_tokens": 40, "completion_tokens": 6},
        {"prompt": "Once", "usage": {"prompt_tokens": 1, "completion_tokens": 7}},
    ]
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second, third, fourth = read_workload(str(file), 4096).asks
    assert (first.body, first.output_tokens) == ({"messages": messages}, 20)
    assert (second, third) == (Ask(30, 5), Ask(40, 6))
    assert (fourth.body, fourth.prompt_tokens, fourth.output_tokens) == ({"prompt": "Once"}, 1, 7)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "log.jsonl:2: the line is not JSON"),
        ("[]", "log.jsonl:2: the line must be an object"),
        ('{"text": 1}', "has neither messages nor prompt nor prompt_tokens"),
        ('{"prompt_tokens": 0, "completion_tokens": 1}', "prompt_tokens is 0"),
        ('{"prompt_tokens": 5}', "completion_tokens is None"),
        ('{"prompt_tokens": 5, "completion_tokens": true}', "completion_tokens is True"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    """With its number and what is wrong with it."""
    file = tmp_path / "log.jsonl"
    file.write_text('{"prompt_tokens": 1, "completion_tokens": 1}\n' + line)
    with pytest.raises(ConfigError, match=words):
        read_workload(str(file), 4096)


def test_a_line_may_have_any_character_in_its_text(tmp_path: Path) -> None:
    """Such as U+2028, at which Python's `splitlines` ends a line."""
    file = tmp_path / "log.jsonl"
    file.write_text('{"prompt": "one\u2028two\x85", "max_tokens": 3}\n')
    assert [ask.body for ask in read_workload(str(file), 4096).asks] == [{"prompt": "one\u2028two\x85"}]


@pytest.mark.parametrize(
    ("name", "words"), [("chatt", "it is none of chat, rag, code"), ("/nowhere/a.jsonl", "No such file")]
)
def test_a_wrong_name_is_refused(name: str, words: str) -> None:
    """With the names that there are, or why a file cannot be read."""
    with pytest.raises(ConfigError, match=words):
        read_workload(name, 4096)


def test_texts_that_are_too_long_are_left_out_and_counted() -> None:
    """They cannot shrink. A log of which nothing fits is refused."""
    body = {"prompt": "x"}
    found = fitted(Workload("log", (Ask(5000, 10, 0, body), Ask(50, 5000, 0, body))), 1000)
    assert [ask.output_tokens for ask in found.asks] == [1000 - MARGIN - 50]
    assert found.note.startswith("of 2 requests, 1 were left out")
    assert found.note.endswith("and 1 get shorter answers")
    with pytest.raises(ConfigError, match="no request of it fits"):
        fitted(Workload("log", (Ask(5000, 10, 0, body),)), 1000)
