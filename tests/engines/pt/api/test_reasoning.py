"""Thinking is told from the answer by the template's tags, wherever the text is cut."""

import httpx
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from serve_app.engines.pt.api.conversation import with_known_roles
from serve_app.engines.pt.api.reasoning import Tags, ThinkReader, thinking_tags
from serve_app.engines.pt.api.tool_calls import HERMES, Delta, MessageReader, PlainReader, TemplateReader
from serve_app.engines.pt.engine import PtEngine
from serve_app.facts.checkpoint import DEMO_MODEL, model_path
from tests.demo_answers import ANSWERS, QUESTIONS
from tests.engines.pt.api_client import chat, events

TAGS = Tags("<think>", "</think>")
ASSISTANT = "<|im_start|>assistant\n"


def read(pieces: list[str], prompt_end: str = ASSISTANT, inner: MessageReader | None = None) -> Delta:
    """All that comes out of a text in pieces."""
    reader = ThinkReader(inner or PlainReader(), TAGS, prompt_end)
    return Delta.join([*map(reader.feed, pieces), reader.finish()])


def cuts(text: str) -> list[list[str]]:
    """The text in two pieces at every place, and character by character."""
    return [*([text[:at], text[at:]] for at in range(len(text))), list(text)]


@pytest.mark.parametrize(
    ("text", "prompt_end", "reasoning", "content"),
    [
        ("<think>hm</think>yes", ASSISTANT, "hm", "yes"),
        ("\n<think>\nhm\n</think>\n\nyes", ASSISTANT, "\nhm\n", "\n\nyes"),
        ("hm</think>yes", ASSISTANT + "<think>\n", "hm", "yes"),
        ("hm</thin</think></think>", ASSISTANT + "<think>", "hm</thin", "</think>"),
        ("yes <think>no</think>", ASSISTANT, "", "yes <think>no</think>"),
        ("<think>no</think>", ASSISTANT + "<think>\n\n</think>\n\n", "", "<think>no</think>"),
        ("<think>cut", ASSISTANT, "cut", ""),
        ("<think>cut</thi", ASSISTANT, "cut</thi", ""),
        ("<thi", ASSISTANT, "", "<thi"),
        ("yes", ASSISTANT, "", "yes"),
        ("", ASSISTANT, "", ""),
        (" " * 40 + "<think>no</think>", ASSISTANT, "", " " * 40 + "<think>no</think>"),
    ],
)
def test_thinking_is_split_wherever_the_text_is_cut(text: str, prompt_end: str, reasoning: str, content: str) -> None:
    """Nothing is lost, and nothing is stripped but space before the tag."""
    for pieces in cuts(text):
        delta = read(pieces, prompt_end)
        assert (delta.reasoning, delta.content) == (reasoning, content), pieces


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Any tokenizer."""
    return AutoTokenizer.from_pretrained(model_path(DEMO_MODEL))


def test_calls_come_after_thinking(tokenizer: PreTrainedTokenizerBase) -> None:
    """What the model only thinks of calling is no call."""
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    for pieces in cuts(f"<think>perhaps {call}</think>Now {call}"):
        inner = TemplateReader(tokenizer, HERMES, "", [], parallel=True)
        delta = read(pieces, inner=inner)
        assert (delta.reasoning, delta.content.strip()) == (f"perhaps {call}", "Now")
        assert [call.name for call in delta.calls] == ["f"]


def test_the_chat_template_shows_the_tags(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of them, or the model does not think."""
    assert thinking_tags(tokenizer) is None
    for template, opening in (
        ("{# <think> and </think> #}", "<think>"),
        ("{# [THINK] and [/THINK] #}", "[THINK]"),
        ("{# </think> alone #}", None),
    ):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        tags = thinking_tags(tokenizer)
        assert (None if tags is None else tags.opening) == opening


def test_roles_and_thinking_have_the_names_that_templates_read() -> None:
    """A developer is the system where the template does not know one, and thinking has both names."""
    messages = [{"role": "developer", "content": "x"}, {"role": "assistant", "content": "", "reasoning_content": "hm"}]
    known = with_known_roles(messages, "… developer …")
    assert [message["role"] for message in known] == ["developer", "assistant"]
    assert with_known_roles(messages, "…")[0]["role"] == "system"
    assert (known[1]["reasoning"], known[1]["reasoning_content"]) == ("hm", "hm")


@pytest.fixture
def thinking(engine: PtEngine, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has the template open the tag at the end of each prompt, unless thinking is off, and returns that end."""
    tokenizer = engine.generator.tokenizer
    opens = tokenizer.chat_template.replace("assistant\\n' }}", "assistant\\n' }}{{ end }}")
    assert opens != tokenizer.chat_template
    shut = "{% set end = '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>' %}"
    monkeypatch.setattr(tokenizer, "chat_template", shut + opens)
    return f"<|im_start|>user\n{QUESTIONS[0]}<|im_end|>\n{ASSISTANT}<think>"


async def test_all_apis_show_the_thinking(client: httpx.AsyncClient, thinking: str) -> None:
    """Whole and streamed. This model never closes the tag, so all of its text is thinking."""
    raw = await client.post("/v1/completions", json={"prompt": thinking, "temperature": 0, "max_tokens": 12})
    text = raw.json()["choices"][0]["text"]
    asked = chat(QUESTIONS[0], max_tokens=12)
    whole = (await client.post("/v1/chat/completions", json=asked)).json()
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == (text, text, "")
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 12}
    chunks = events((await client.post("/v1/chat/completions", json=asked | {"stream": True})).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == text
    assert "".join(delta.get("reasoning", "") for delta in deltas) == text

    reply = (await client.post("/v1/messages", json=asked)).json()
    (block,) = [block for block in reply["content"] if block["type"] == "thinking"]
    assert (block["thinking"], bool(block["signature"])) == (text, True)
    stream = (await client.post("/v1/messages", json=asked | {"stream": True})).text
    assert '"thinking_delta"' in stream
    assert '"signature_delta"' in stream
    body = {"input": QUESTIONS[0], "temperature": 0, "max_output_tokens": 12}
    response = (await client.post("/v1/responses", json=body)).json()
    (item,) = response["output"]
    assert (item["type"], item["content"]) == ("reasoning", [{"type": "reasoning_text", "text": text}])
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 12}
    stream = (await client.post("/v1/responses", json=body | {"stream": True})).text
    assert "response.reasoning_text.done" in stream


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", chat(QUESTIONS[0], reasoning_effort="none", max_tokens=8)),
        ("/v1/messages", chat(QUESTIONS[0], thinking={"type": "disabled"}, max_tokens=8)),
        ("/v1/responses", {"input": QUESTIONS[0], "temperature": 0, "reasoning": {"effort": "none"},
                           "max_output_tokens": 8}),
    ],
)  # fmt: skip
async def test_thinking_can_be_switched_off(
    client: httpx.AsyncClient, thinking: str, path: str, fields: dict[str, object]
) -> None:
    """Where the template can do so."""
    reply = (await client.post(path, json=fields)).text
    assert "reasoning_text" not in reply
    assert '"thinking"' not in reply
    assert '"reasoning_content"' not in reply


async def test_a_format_comes_without_thinking(client: httpx.AsyncClient, thinking: str) -> None:
    """The grammar bounds the text from its first token, so all of it is the answer."""
    asked = chat(QUESTIONS[0], structured_outputs={"choice": ["yes", "no"]})
    message = (await client.post("/v1/chat/completions", json=asked)).json()["choices"][0]["message"]
    assert message["content"] in ("yes", "no")
    assert "reasoning" not in message


async def test_a_model_without_tags_is_read_as_it_is(client: httpx.AsyncClient) -> None:
    """As the demo model."""
    message = (await client.post("/v1/chat/completions", json=chat(QUESTIONS[0]))).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": ANSWERS[QUESTIONS[0]]}
