"""Calls are told from text wherever the text is cut, and nothing that a model writes is lost."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from serve_app.engines.pt.api import tool_calls
from serve_app.engines.pt.api.job import WholeChoice
from serve_app.engines.pt.api.tool_calls import (
    HERMES,
    CallListReader,
    Delta,
    NamedCallReader,
    TemplateReader,
    response_template,
)
from serve_app.engines.pt.core.sequence import Piece
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


VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet='a"\\{}[]é', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(alphabet='a"\\}', max_size=3), inner, max_size=2)
    ),
)


@settings(deadline=None)
@given(calls=st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=2), max_size=3), data=st.data())
def test_a_list_of_calls_is_read_in_any_pieces(calls: list[dict[str, Any]], data: st.DataObject) -> None:
    """Braces, quotes and backslashes in the arguments end no call."""
    indent = data.draw(st.sampled_from([None, 1]))
    text = json.dumps([{"name": "f", "arguments": call} for call in calls], indent=indent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    reader = CallListReader()
    deltas = [reader.feed(text[start:end]) for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    delta = Delta.join([*deltas, reader.finish()])
    assert [json.loads(call.arguments) for call in delta.calls] == calls
    assert delta.content == ""


@pytest.mark.parametrize("text", ['[{"name": "f", "arg', '[{"nam": 1}, {"name": "f"}]', "[nonsense {}}} {", "{}"])
def test_what_is_no_list_of_calls_comes_out_as_text(text: str) -> None:
    """In full, however it is cut."""
    for pieces in [[text], list(text)]:
        reader = CallListReader()
        delta = Delta.join([*map(reader.feed, pieces), reader.finish()])
        assert (delta.content, delta.calls) == (text, ())


def test_a_call_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many braces its arguments hold, and however they are cut."""
    parsed = 0
    loads = json.loads

    def counting(text: str) -> Any:
        nonlocal parsed
        parsed += len(text)
        return loads(text)

    monkeypatch.setattr(tool_calls.json, "loads", counting)
    text = json.dumps([{"name": "f", "arguments": {"x": "}" * 5000, "y": [{}] * 500}}])
    reader = CallListReader()
    delta = Delta.join([reader.feed(character) for character in text])
    assert len(delta.calls) == 1
    assert parsed <= len(text)


def test_an_answer_is_joined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with each part, which would cost the square of its length."""
    joined = 0
    join = Delta.join.__func__  # type: ignore[attr-defined]

    def counting(cls: type[Delta], deltas: Any) -> Delta:
        nonlocal joined
        joined += 1
        return join(cls, deltas)  # type: ignore[no-any-return]

    monkeypatch.setattr(Delta, "join", classmethod(counting))
    reader, answer = NamedCallReader("f"), WholeChoice("opening ")
    for number in range(1000):
        answer.add(Piece("a", number), reader.feed("a"))
    assert joined == 0
    (call,) = answer.delta.calls
    assert (call.arguments, call.is_first, answer.delta.content) == ("a" * 1000, True, "opening ")


def test_space_before_a_call_is_left_out_and_other_space_is_not_held_back_for_long(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """All space that is held back is looked at again with each token."""
    reader = TemplateReader(tokenizer, HERMES, "", TOOLS, parallel=True)
    out = "".join(reader.feed(" ").content for _ in range(1000))
    assert len(out) >= 900
    assert len(out + reader.finish().content) == 1000
