"""Every section of the page can be read, by screen readers too, on a desktop and a phone, whatever texts come."""

import json
import time
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser import DESKTOP, PHONE, Watched
from tests.console.browser import states
from tests.console.browser.conftest import Open
from tests.console.browser.scripted import Scripted, delta_chunk, last_chunks, text_chunk

SECTIONS = ("memory", "models", "playground", "what-if", "requests", "events")
STATES = {
    "demo": states.demo,
    "large": states.large,
    "hostile": states.hostile,
    "pool": states.pool,
    "container": states.container,
}
# Chromium is a second or two busier with axe-core in each section.
pytestmark = pytest.mark.timeout(120)


def fill(watched: Watched, scripted: Scripted, section: str) -> None:
    """Shows a section with something in it."""
    page = watched.page
    watched.show(section)
    if section == "memory":
        page.locator("g.block").first.click()
    elif section == "models":
        for summary in page.locator("#panel-models summary").all()[:2]:
            summary.click()
    elif section == "playground":
        page.get_by_role("button", name="Two side by side").click()
        page.locator("#draft").fill("Hello")
        page.keyboard.press("Enter")
        expect(page.locator(".pane .timing")).to_have_count(2)
        expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    elif section == "what-if":
        page.get_by_label("Model: an id").fill("org/model")
        page.get_by_role("button", name="Plan", exact=True).click()
        page.locator(".verdict").wait_for()


@pytest.fixture
def busy(scripted: Scripted) -> Scripted:
    """With an answer that has everything, and a plan."""
    call = {"index": 0, "id": "call-1", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    scripted.chunks = [
        delta_chunk(reasoning_content="They greet. "), text_chunk("Hello to you."), delta_chunk(tool_calls=[call]),
        *last_chunks("tool_calls"),
    ]  # fmt: skip
    scripted.plan = (200, plan())
    return scripted


def plan(text: str = "qwen fits.", fits: bool = False) -> dict[str, Any]:
    """The answer of what if, with `text` in all of its texts."""
    gpu = {"id": "n1:0", "name": text, "total_bytes": 24 * states.GIB, "free_bytes": 20 * states.GIB}
    gpu |= {"planned_bytes": 9 * states.GIB, "spare_bytes": 11 * states.GIB}
    rank = {"gpu": "n1:0", "weights_bytes": 6 * states.GIB, "adapters_bytes": 0, "kv_cache_bytes": 2 * states.GIB}
    rank |= {"activation_bytes": states.GIB, "graph_bytes": 0, "context_bytes": 0, "share_bytes": 9 * states.GIB}
    rank["certainty"] = {"share": "guessed"}
    model = {"name": text, "replica": 0, "backend": "vllm", "ranks": [rank]}
    return {
        "fits": fits, "text": text, "plan": {"fits": fits, "gpus": [gpu], "models": [model]},
        "fixes": [{"model": text, "text": text, "effect": text}], "yaml": text, "notes": [text],
    }  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", [states.demo, states.mixed], ids=["demo", "mixed"])
def test_axe_finds_nothing(open_page: Open, busy: Scripted, state: Any, scheme: str) -> None:
    """Of any impact, in any section, in both colours."""
    busy.state = state
    watched = open_page(scheme=scheme)
    watched.open()
    for section in SECTIONS:
        fill(watched, busy, section)
        assert watched.violations() == [], section


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", STATES)
def test_no_section_is_wider_than_the_window(open_page: Open, busy: Scripted, name: str, size: tuple[int, int]) -> None:
    """Wide tables scroll by themselves."""
    busy.state = STATES[name]
    watched = open_page(size=size)
    watched.open()
    for section in SECTIONS:
        fill(watched, busy, section)
        assert watched.overflow() <= 0, section
    watched.show("memory")
    watched.page.get_by_role("button", name="Table", exact=True).click()
    assert watched.overflow() <= 0


def test_a_large_cluster_is_drawn_at_once(open_page: Open, scripted: Scripted) -> None:
    """Eight nodes of eight GPUs with ten models on each: the whole map, and its redrawing each second."""
    scripted.state = states.large
    watched = open_page()
    page = watched.open()
    expect(page.locator("svg.bar g.block")).to_have_count(8 * (8 * 10 + 2))
    took = page.evaluate(
        """async (fresh) => {
          const { withDelta } = await import("./assets/state.js");
          const { keyed } = await import("./assets/memory.js");
          let seen = { ...fresh, nodes: keyed(structuredClone(fresh.nodes)) };
          const began = performance.now();
          const first = seen.nodes[0];
          for (let turn = 0; turn < 10; turn += 1) {
            seen = withDelta(seen, { time: turn, nodes: keyed(structuredClone(fresh.nodes)) });
          }
          return { ms: (performance.now() - began) / 10, isSame: seen.nodes[0] === first };
        }""",
        states.large(),
    )
    assert took["ms"] < 200, took
    assert took["isSame"], "what has not changed is not drawn again"


def has_markup(watched: Watched) -> int:
    """How many elements there are that only markup from data can have made."""
    made: int = watched.page.evaluate(
        "document.querySelectorAll('#app :is(img, script, style, iframe, object, [onload], [onerror]), "
        "#app a:not(.skip)').length"
    )
    return made


def shown(watched: Watched, section: str) -> str:
    """All text of a section, hidden or not."""
    text: str = watched.page.locator(f"#panel-{section}").evaluate("element => element.textContent")
    return text


def test_hostile_texts_of_a_state_are_shown_as_text(open_page: Open, scripted: Scripted) -> None:
    """Names of models, nodes and keys, messages, events and requests, in the map and in tables."""
    scripted.state = states.hostile
    watched = open_page()
    page = watched.open()
    for section in ("memory", "models", "requests", "events"):
        watched.show(section)
        for view in ("Map", "Table") if section == "memory" else ("",):
            if view:
                page.get_by_role("button", name=view, exact=True).click()
            for text in states.HOSTILE:
                assert text in shown(watched, section), (section, text)
            assert has_markup(watched) == 0
    scripted.push(events=[states.event(100, text, text, text, time.time()) for text in states.HOSTILE])
    expect(page.get_by_role("log")).to_contain_text(states.HOSTILE[-1])
    page.locator("#tab-playground").click()
    page.get_by_role("button", name="Code").click()
    assert page.locator("dialog pre").inner_text().count(states.HOSTILE[0].replace('"', '\\"')) == 1
    assert has_markup(watched) == 0


def test_hostile_answers_and_plans_are_shown_as_text(open_page: Open, scripted: Scripted) -> None:
    """Answers, reasoning, names and arguments of tools, errors, plans and their fixes."""
    text = " ".join(states.HOSTILE)
    call = {"index": 0, "id": text, "function": {"name": text, "arguments": json.dumps({text: text})}}
    scripted.chunks = [
        delta_chunk(reasoning=text),
        text_chunk(text),
        delta_chunk(tool_calls=[call]),
        *last_chunks(text),
    ]
    scripted.plan = (200, plan(text))
    watched = open_page()
    page = watched.open("playground")
    ask(watched, text)
    expect(page.locator(".tool strong")).to_have_text(text)
    assert shown(watched, "playground").count(text) >= 5
    assert json.loads(page.locator(".tool pre").inner_text()) == {text: text}
    scripted.chat_error = (400, text, text)
    watched.expected = ("status of 400",)
    ask(watched, text)
    expect(page.locator(".pane .problem")).to_contain_text(text)
    assert has_markup(watched) == 0
    fill(watched, scripted, "what-if")
    assert shown(watched, "what-if").count(text) >= 4
    scripted.plan = (400, {"error": {"message": text, "code": text}})
    page.get_by_role("button", name="Plan", exact=True).click()
    expect(page.locator("#panel-what-if .problem")).to_contain_text(text)
    assert has_markup(watched) == 0


def ask(watched: Watched, text: str) -> None:
    """Sends a message to one pane, and waits for the end of its answer."""
    watched.page.locator("#draft").fill(text)
    watched.page.keyboard.press("Enter")
    expect(watched.page.get_by_role("button", name="Stop")).to_be_disabled()


@pytest.mark.parametrize(
    ("code", "heading"), [("console_off", "The console is off"), ("admin_only", "The server refuses this page")]
)
def test_a_hostile_refusal_is_shown_as_text(open_page: Open, scripted: Scripted, code: str, heading: str) -> None:
    """For a reason that has markup, whether the page gives up or tries again."""
    scripted.stream_error = (404, code, states.HOSTILE[1])
    watched = open_page()
    watched.expected = ("status of 404",)
    page = watched.open()
    expect(page.locator("main")).to_contain_text(states.HOSTILE[1])
    expect(page.get_by_role("heading", name=heading)).to_be_visible()
    assert has_markup(watched) == 0
    scripted.stream_error = (404, states.HOSTILE[0], states.HOSTILE[2])
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("main .problem")).to_contain_text(states.HOSTILE[2])
    assert has_markup(watched) == 0
