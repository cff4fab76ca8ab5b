"""The console's page in a browser, on a real cluster with both engines.

What it shows of a replica that dies, and without the right key, is in `test_traffic.py`, whose cluster has these.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from tests.browser import PHONE, Watched, chromium
from tests.cluster.serve_run import ServeRun
from tests.cluster.test_serving import ENGINES, running_in_vllm
from tests.console.browser.test_sections import SECTIONS
from tests.demo_answers import ANSWERS, QUESTIONS

# Replicas report every ten seconds at most, and `serve-app status` takes a few to read them.
FIGURES_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def watched(run: ServeRun) -> Iterator[Watched]:
    """The page, in which nothing may go wrong until the last test here."""
    with chromium() as browser:
        page = Watched(browser, run.url)
        page.open()
        expect(page.page.get_by_text("Live", exact=True)).to_be_visible()
        yield page
        page.close()


def gib(count: int) -> str:
    """Bytes as the page writes them."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def figures_of_status(run: ServeRun) -> dict[str, list[str]]:
    """Planned, held and peak of each model's only device, by `serve-app status --json`."""
    models = {model["name"]: model for model in run.status_of_ours()["models"]}
    reports = {name: models[name]["replicas"][0]["report"] for name in ENGINES}
    devices = {name: report["devices"][0] for name, report in reports.items() if report is not None}
    return {name: [gib(device[field]) for field in ("planned", "held", "peak")] for name, device in devices.items()}


def figures_of_page(watched: Watched) -> dict[str, list[str]]:
    """The same, of the details that the page shows of each block."""
    figures = {}
    for name in ENGINES:
        block = watched.page.locator(f"g.block[aria-label^='{name}:']").first
        block.focus()
        expect(watched.page.locator(".detail h3")).to_have_text(name)
        rows = watched.page.locator(".detail .facts tr").all()
        figures[name] = [row.locator("td").first.inner_text() for row in rows]
    return figures


def test_the_map_has_the_figures_of_serve_app_status(run: ServeRun, watched: Watched) -> None:
    """Both models are there, with what was planned, is held and was the peak."""
    deadline = time.monotonic() + FIGURES_TIMEOUT_S
    while (seen := figures_of_page(watched)) != (told := figures_of_status(run)):  # What is held moves in between.
        assert time.monotonic() < deadline, (seen, told)
    assert sorted(seen) == ENGINES


def test_a_head_request_for_the_stream_holds_up_no_client(run: ServeRun) -> None:
    """HAProxy takes its connection for a free one, and gives it to the next client."""
    for _ in range(5):
        head = httpx.head(f"{run.url}/ui/api/stream", timeout=10)
        assert (head.status_code, head.content) == (200, b"")
        assert httpx.get(f"{run.url}/ui/api/state", timeout=10).status_code == 200
        assert httpx.get(f"{run.url}/v1/models", timeout=10).status_code == 200


def test_the_models_are_shown_with_why_one_has_failed(watched: Watched) -> None:
    """The state and the reason that `/ready` tells too."""
    watched.show("models")
    page = watched.page
    for name in ENGINES:
        expect(page.get_by_role("article", name=name)).to_contain_text("ready")
    expect(page.get_by_role("article", name="homeless")).to_contain_text("needs 2 GPUs")


def test_both_engines_stream_side_by_side(watched: Watched) -> None:
    """One question to both gives the known answer twice, with its timing and its tokens."""
    page = watched.page
    watched.show("playground")
    page.get_by_role("button", name="Two side by side").click()
    for letter, name in zip("AB", ENGINES, strict=True):
        pane = page.get_by_role("region", name=f"Pane {letter}")
        pane.get_by_label(f"Model {letter}").select_option(name)
        pane.get_by_text("Parameters").click()
        pane.get_by_label("Temperature").fill("0")
    page.locator("#draft").fill(QUESTIONS[0])
    page.keyboard.press("Enter")
    for letter in "AB":
        answer = page.get_by_role("region", name=f"Conversation {letter}")
        expect(answer.locator(".answer")).to_have_text(ANSWERS[QUESTIONS[0]], timeout=30_000)
        expect(answer.locator(".said > .note")).to_contain_text("tokens/s")
        expect(answer.locator(".timing svg")).to_have_count(1)
    watched.show("requests")
    for name in ENGINES:
        row = page.locator("#panel-requests tbody tr", has=page.get_by_role("rowheader", name=name)).first
        expect(row).to_contain_text("ok")
        expect(row).to_contain_text("/v1/chat/completions")


def running_in_pt(run: ServeRun) -> int:
    """Sequences that pt's engine is working on, by its own count."""
    load: int = httpx.get(f"{run.url}/models/tiny-pt/load", timeout=10).json()["server_load"]
    return load


def wait_for(what: str, count: Any, wanted: int, timeout_s: float) -> None:
    """Until `count()` is so much."""
    deadline = time.monotonic() + timeout_s
    while (now := count()) != wanted:
        assert time.monotonic() < deadline, f"{what}: {now} and not {wanted}"
        time.sleep(0.05)


def test_stop_stops_the_engines(run: ServeRun, watched: Watched) -> None:
    """Long before the answers would have ended: 1,900 tokens take some ten seconds."""
    page = watched.page
    watched.show("playground")
    for letter in "AB":
        pane = page.get_by_role("region", name=f"Pane {letter}")
        pane.get_by_label("Max tokens").fill("1900")
        pane.get_by_label("More fields").fill(json.dumps({"ignore_eos": True}))
        pane.get_by_role("button", name="Clear").click()
    page.locator("#draft").fill("Hello")
    page.keyboard.press("Enter")
    wait_for("vLLM runs", lambda: running_in_vllm(run), 1, timeout_s=10)
    wait_for("pt runs", lambda: running_in_pt(run), 1, timeout_s=10)
    page.get_by_role("button", name="Stop").click()
    wait_for("vLLM runs", lambda: running_in_vllm(run), 0, timeout_s=3)
    wait_for("pt runs", lambda: running_in_pt(run), 0, timeout_s=3)
    for letter in "AB":
        note = page.get_by_role("region", name=f"Conversation {letter}").locator(".said > .note")
        expect(note).to_contain_text("stopped")
    watched.show("requests")
    expect(page.locator("#panel-requests tbody tr").first).to_contain_text("left")


def test_a_plan_beside_what_runs(watched: Watched) -> None:
    """A third model would fit, and its place is drawn beside what is taken."""
    page = watched.page
    watched.show("what-if")
    page.get_by_label("Model: an id").fill("serve-app/demo")
    page.get_by_label("Backend").select_option("pt")
    page.get_by_role("button", name="Plan", exact=True).click()
    expect(page.locator(".verdict")).to_contain_text("It fits.", timeout=70_000)
    expect(page.locator(".plan-map g.block")).to_have_count(1)
    expect(page.locator(".plan-map rect.foreign")).to_have_count(1)
    expect(page.get_by_role("region", name="Config", exact=True)).to_contain_text("model: serve-app/demo")


def test_axe_finds_nothing_in_the_real_page(watched: Watched) -> None:
    """In any section, with what a real cluster tells."""
    for section in SECTIONS:
        watched.show(section)
        assert watched.violations() == [], section
    width, height = PHONE
    watched.page.set_viewport_size({"width": width, "height": height})
    for section in SECTIONS:
        watched.show(section)
        assert watched.overflow() <= 0, section
