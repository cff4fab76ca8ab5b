"""The playground: one or two conversations, their parameters, how they end, and the same request as code."""

import ast
import json
import shlex
import time
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser import Watched
from tests.console.browser.conftest import Open
from tests.console.browser.scripted import Scripted, delta_chunk, last_chunks, text_chunk


@pytest.fixture
def watched(open_page: Open) -> Watched:
    """The playground, open."""
    opened = open_page()
    opened.open("playground")
    return opened


def send(watched: Watched, text: str) -> None:
    """Sends a message."""
    watched.page.locator("#draft").fill(text)
    watched.page.keyboard.press("Enter")


def finish(watched: Watched) -> None:
    """Waits until no answer is under way."""
    expect(watched.page.get_by_role("button", name="Stop")).to_be_disabled()


def test_two_panes_stream_side_by_side(watched: Watched, scripted: Scripted) -> None:
    """Each asks its own model with its own parameters, and shows the beginning before the end has come."""
    page = watched.page
    scripted.pause_s = 0.1
    page.get_by_role("button", name="Two side by side").click()
    second = page.get_by_role("region", name="Pane B")
    second.get_by_text("Parameters").click()
    second.get_by_label("Temperature").fill("0.5")
    second.get_by_label("System prompt").fill("Be brief.")
    send(watched, "Hello")
    for letter in "AB":
        expect(page.get_by_role("region", name=f"Conversation {letter}")).to_contain_text("word3 ")
    assert scripted.running_chats == 2
    finish(watched)
    for letter in "AB":
        expect(page.get_by_role("region", name=f"Conversation {letter}")).to_contain_text("word19")
    bodies = {body["model"]: body for body in scripted.chats}
    asked = {"role": "user", "content": "Hello"}
    usual = {"stream": True, "stream_options": {"include_usage": True}}
    assert bodies["tiny-pt"] == {"model": "tiny-pt", "messages": [asked], **usual}
    system = {"role": "system", "content": "Be brief."}
    assert bodies["tiny-vllm"] == {"model": "tiny-vllm", "messages": [system, asked], "temperature": 0.5, **usual}


def test_stop_ends_the_request_and_the_conversation_goes_on(watched: Watched, scripted: Scripted) -> None:
    """What has come stays, and is part of the next request."""
    page = watched.page
    scripted.chunks = [text_chunk(f"word{number} ") for number in range(1000)]
    scripted.pause_s = 0.05
    send(watched, "Count")
    expect(page.locator(".answer")).to_contain_text("word2 ")
    page.get_by_role("button", name="Stop").click()
    finish(watched)
    deadline = time.monotonic() + 5
    while scripted.running_chats:
        assert time.monotonic() < deadline, "the server still generates"
        time.sleep(0.02)
    expect(page.locator(".turn .note").last).to_contain_text("stopped")
    scripted.chunks = [text_chunk("Yes."), *last_chunks()]
    send(watched, "Again")
    finish(watched)
    roles = [message["role"] for message in scripted.chats[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert scripted.chats[1]["messages"][1]["content"].startswith("word0 word1 word2")


def test_the_figures_of_an_answer_are_shown(watched: Watched, scripted: Scripted) -> None:
    """The header server-timing to scale, the tokens, and how fast they came."""
    scripted.chunks = [*(text_chunk("a ") for _ in range(5)), *last_chunks("length")]
    scripted.pause_s = 0.05
    send(watched, "Hello")
    finish(watched)
    page = watched.page
    assert page.locator(".timing svg").get_attribute("aria-label") == (
        "Time until the first byte: router 0.4 ms, queue 1.2 ms, engine until the first byte 19 ms"
    )
    shares = [float(each.get_attribute("width").rstrip("%")) for each in page.locator(".timing rect").all()]  # type: ignore[union-attr]
    assert shares == pytest.approx([100 * part / 20.1 for part in (0.4, 1.2, 18.5)])
    note = page.locator(".turn > .said > .note").inner_text()
    assert "7 tokens of prompt, 21 of answer" in note
    assert "ended by length" in note
    assert 20 < float(note.split(" tokens/s")[0].split()[-1]) < 200


def test_tools_are_called_and_their_results_are_sent(watched: Watched, scripted: Scripted) -> None:
    """Names and arguments come in pieces; reasoning stands apart from the answer."""
    page = watched.page
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    page.get_by_text("Parameters").click()
    page.get_by_label("Tools (JSON)").fill(json.dumps(tools))
    scripted.chunks = [
        delta_chunk(reasoning_content="I need the "), delta_chunk(reasoning_content="weather."),
        delta_chunk(tool_calls=[{"index": 0, "id": "call-1", "function": {"name": "weather", "arguments": '{"ci'}}]),
        delta_chunk(tool_calls=[{"index": 0, "function": {"arguments": 'ty": "Ulm"}'}}]), *last_chunks("tool_calls"),
    ]  # fmt: skip
    send(watched, "Is it warm?")
    finish(watched)
    expect(page.locator(".reasoning p")).to_have_text("I need the weather.")
    assert json.loads(page.locator(".tool pre").inner_text()) == {"city": "Ulm"}
    page.get_by_label("Result of weather").fill("24 degrees")
    scripted.chunks = [text_chunk("It is."), *last_chunks()]
    page.get_by_role("button", name="Send the results").click()
    expect(page.locator(".answer")).to_have_text("It is.")
    call = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    assert scripted.chats[1]["messages"] == [
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "24 degrees"},
    ]
    assert scripted.chats[1]["tools"] == tools


def test_structured_output_is_set_with_line_breaks(watched: Watched, scripted: Scripted) -> None:
    """Once it is whole."""
    page = watched.page
    page.get_by_text("Parameters").click()
    page.get_by_label("Response format").fill('{"type": "json_object"}')
    scripted.chunks = [text_chunk('{"city":'), text_chunk('"Ulm"}'), *last_chunks()]
    send(watched, "Where?")
    expect(page.locator("pre.answer")).to_have_text('{\n  "city": "Ulm"\n}')
    assert scripted.chats[0]["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize(
    ("label", "text", "told"),
    [
        ("Temperature", "hot", 'temperature must be a number from 0 to 2, and it is "hot".'),
        ("Max tokens", "1.5", 'max_tokens must be a whole number, and it is "1.5".'),
        ("Tools (JSON)", "{}", "tools must be a list in JSON."),
        ("Response format", "{", "response_format is not valid JSON"),
        ("More fields", "[]", "More fields must be an object in JSON."),
    ],
)
def test_a_parameter_that_cannot_be_read_sends_nothing(
    watched: Watched, scripted: Scripted, label: str, text: str, told: str
) -> None:
    """It is named, with what it must be."""
    watched.page.get_by_text("Parameters").click()
    watched.page.get_by_label(label).fill(text)
    send(watched, "Hello")
    expect(watched.page.locator(".pane .problem")).to_contain_text(told)
    assert not scripted.chats


@pytest.mark.parametrize("is_begun", [False, True])
def test_an_error_is_shown_with_its_code(watched: Watched, scripted: Scripted, is_begun: bool) -> None:
    """That of a refused request, and of a stream that has begun. The next request leaves that answer out."""
    error = {"message": "Too many requests.", "type": "rate_limit", "code": "rate_limit_exceeded"}
    if is_begun:
        scripted.chunks = [text_chunk("Well, "), {"error": error}]
    else:
        scripted.chat_error = (429, "rate_limit_exceeded", "Too many requests.")
        watched.expected = ("status of 429",)
    send(watched, "Hello")
    finish(watched)
    problem = watched.page.locator(".pane .problem")
    expect(problem).to_contain_text("rate_limit_exceeded")
    expect(problem).to_contain_text("Too many requests.")
    scripted.chat_error = None
    send(watched, "Again")
    finish(watched)
    assert [message["role"] for message in scripted.chats[1]["messages"]] == ["user", "user"]


def arguments_of(code: str) -> dict[str, Any]:
    """What a Python program gives to `create`."""
    (call,) = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "create"
    ]
    found = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    return found | found.pop("extra_body", {})


def test_the_code_is_the_request(watched: Watched, scripted: Scripted) -> None:
    """curl's words and Python's arguments have every byte of the body, whatever signs are in it."""
    page = watched.page
    question = """It's "quoted" \\ back, $HOME `ls` and\na new line: ünï ✓ 😀"""
    page.get_by_text("Parameters").click()
    page.get_by_label("Seed").fill("7")
    tools = [
        {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"x": None, "y": [], "z": {}}}}
    ]
    page.get_by_label("Tools (JSON)").fill(json.dumps(tools))
    page.get_by_label("More fields").fill('{"ignore_eos": true, "stop": ["x"]}')
    page.locator("#draft").fill(question)
    page.get_by_role("button", name="Code").click()
    code = page.get_by_role("region", name="Code")
    words = shlex.split(code.inner_text())
    assert words[:3] == ["curl", "-N", f"{scripted.url}/v1/chat/completions"]
    assert "authorization: Bearer KEY" in words
    body = json.loads(words[words.index("-d") + 1])
    assert body["messages"] == [{"role": "user", "content": question}]
    assert (body["seed"], body["tools"], body["ignore_eos"], body["stop"]) == (7, tools, True, ["x"])
    page.get_by_role("button", name="Python (openai)").click()
    assert arguments_of(code.inner_text()) == body
    assert f'base_url="{scripted.url}/v1", api_key="KEY"' in code.inner_text()
    watched.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == code.inner_text()
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    send(watched, question)
    finish(watched)
    assert scripted.chats == [body]


def test_another_section_leaves_an_answer_going(watched: Watched, scripted: Scripted) -> None:
    """And what was said is there when one comes back."""
    scripted.pause_s = 0.05
    send(watched, "Hello")
    watched.show("events")
    watched.show("playground")
    finish(watched)
    expect(watched.page.locator(".answer")).to_contain_text("word19")


def test_the_code_after_an_answer_is_what_was_sent(watched: Watched, scripted: Scripted) -> None:
    """If nothing else is to be sent: without the answer, which no request ends with."""
    page = watched.page
    send(watched, "Hello")
    finish(watched)
    page.get_by_role("button", name="Code").click()
    code = page.get_by_role("region", name="Code")
    words = shlex.split(code.inner_text())
    assert json.loads(words[words.index("-d") + 1]) == scripted.chats[0]
    expect(page.locator("dialog")).to_contain_text("This is the request that was sent last.")
    page.keyboard.press("Escape")
    page.locator("#draft").fill("And now?")
    page.get_by_role("button", name="Code").click()
    words = shlex.split(code.inner_text())
    messages = json.loads(words[words.index("-d") + 1])["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert "sent last" not in page.locator("dialog").inner_text()


def test_code_is_not_made_of_parameters_that_cannot_be_read(watched: Watched) -> None:
    """They would be left out without a word."""
    page = watched.page
    page.get_by_text("Parameters").click()
    page.get_by_label("Temperature").fill("hot")
    page.get_by_role("button", name="Code").click()
    expect(page.locator(".pane .problem")).to_contain_text('temperature must be a number from 0 to 2, and it is "hot".')
    expect(page.locator("dialog")).to_have_count(0)


def test_the_code_prints_the_calls_of_tools(watched: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    """With the name once and the arguments as they come."""
    page = watched.page
    page.get_by_text("Parameters").click()
    page.get_by_label("Tools (JSON)").fill('[{"type": "function", "function": {"name": "f"}}]')
    page.get_by_role("button", name="Code").click()
    page.get_by_role("button", name="Python (openai)").click()
    lines = page.get_by_role("region", name="Code").inner_text()
    loop = lines[lines.index("for chunk in stream") :]
    space = SimpleNamespace

    def piece(content: str | None, *calls: Any) -> Any:
        return space(choices=[space(delta=space(content=content, tool_calls=list(calls) or None))])

    def call(name: str | None, arguments: str) -> Any:
        return space(function=space(name=name, arguments=arguments))

    stream = [piece("Wait."), piece(None, call("f", '{"a"')), piece(None, call(None, ": 1}")), space(choices=[])]
    exec(compile(loop, "loop", "exec"), {"stream": stream})  # noqa: S102  (it is the page's own program)
    assert capsys.readouterr().out == 'Wait.\nf {"a": 1}\n'


def test_a_model_that_is_gone_is_not_asked(watched: Watched, scripted: Scripted) -> None:
    """It stays chosen, is marked, and the message stays too."""
    page = watched.page
    expect(page.get_by_label("Model A")).to_have_value("tiny-pt")
    scripted.push(gone_models=["tiny-pt"])
    expect(page.get_by_label("Model A").locator("option:checked")).to_have_text("tiny-pt (gone)")
    send(watched, "Hello")
    expect(page.locator(".pane .problem")).to_have_text("tiny-pt is gone from this server. Choose another model.")
    assert not scripted.chats
    page.get_by_label("Model A").select_option("tiny-vllm")
    expect(page.locator(".pane .problem")).to_have_count(0)
    page.get_by_role("button", name="Send").click()
    finish(watched)
    assert [chat["model"] for chat in scripted.chats] == ["tiny-vllm"]
