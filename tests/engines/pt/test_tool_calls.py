"""Calls are told from text wherever the text is cut, and nothing that a model writes is lost."""

import json
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from serve_app.engines.pt.tool_calls import HERMES, Delta, TemplateReader, response_template
from serve_app.facts.checkpoint import DEMO_MODEL, model_path

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}]
TWO_CALLS = (
    'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
    '<tool_call>{"name": "g", "arguments": {"y": "é"}}</tool_call>'
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Any tokenizer: only its parser is used."""
    return AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))


def read(tokenizer: PreTrainedTokenizerBase, pieces: list[str], **options: Any) -> Delta:
    """All that comes out of a text in pieces."""
    options = {"parallel": True, "template": HERMES, **options}
    reader = TemplateReader(tokenizer, options["template"], "", TOOLS, options["parallel"])
    delta = Delta()
    for piece in pieces:
        delta += reader.feed(piece)
    return delta + reader.finish()


def test_calls_are_found_wherever_the_text_is_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    """In two pieces at every place, and character by character."""
    cuts = [[TWO_CALLS[:at], TWO_CALLS[at:]] for at in range(len(TWO_CALLS))]
    for pieces in [*cuts, list(TWO_CALLS)]:
        delta = read(tokenizer, pieces)
        assert delta.content == "Let me see."
        assert [(call.index, call.name, json.loads(call.arguments)) for call in delta.calls] == [
            (0, "f", {"x": 1}),
            (1, "g", {"y": "é"}),
        ]


@pytest.mark.parametrize(
    "text",
    [
        "a <tool_call>{bad json}</tool_call>",
        'a <tool_call>{"name": "f"',
        'a <tool_call>{"nam": "f"}</tool_call>',
        "plain <b> text <tool",
    ],
)
def test_what_is_no_call_comes_out_as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """In full, however it is cut."""
    for pieces in [[text], list(text), [text[:9], text[9:]]]:
        delta = read(tokenizer, pieces)
        assert (delta.content, delta.calls) == (text, ())


def test_text_after_a_broken_call_is_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    """The parser has given up by then."""
    pieces = ["a ", "<tool_call>{bad}</tool_call>", " and more"]
    assert read(tokenizer, pieces).content == "".join(pieces)


def test_one_call_only_without_parallel_calls(tokenizer: PreTrainedTokenizerBase) -> None:
    """The field's meaning: at most one."""
    assert [call.name for call in read(tokenizer, [TWO_CALLS], parallel=False).calls] == ["f"]


def test_a_tokenizers_own_template_is_used(tokenizer: PreTrainedTokenizerBase) -> None:
    """With its thinking, and with the prompt that may have begun the answer."""
    own = {
        "start_anchor": "<asks>",
        "fields": {
            "thinking": {"open": "<think>", "close": "</think>", "content": "text"},
            "content": {"content": "text"},
        },
    }
    reader = TemplateReader(tokenizer, own, "<asks><think>", TOOLS, parallel=True)
    assert reader.needs_special_tokens
    delta = reader.feed("hm</think>yes") + reader.finish()
    assert (delta.reasoning, delta.content) == ("hm", "yes")


def test_a_call_without_arguments_is_a_call(tokenizer: PreTrainedTokenizerBase) -> None:
    """Tools without parameters are called so."""
    (call,) = read(tokenizer, ['<tool_call>{"name": "f"}</tool_call>']).calls
    assert (call.name, call.arguments) == ("f", "{}")


def test_which_models_calls_can_be_read(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer's own template first, Hermes' way where the chat template shows it, else unknown."""
    assert response_template(tokenizer) is None
    monkeypatch.setattr(tokenizer, "chat_template", "… <tool_call> …")
    assert response_template(tokenizer) is HERMES
    monkeypatch.setattr(tokenizer, "response_template", {"fields": {}})
    assert response_template(tokenizer) == {"fields": {}}
