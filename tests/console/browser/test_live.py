"""The page stays up to date by one stream, says when it is not, and keeps the key to itself."""

import re
import time
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.console.browser import states
from tests.console.browser.conftest import Open
from tests.console.browser.scripted import KEY, Scripted


def test_deltas_change_what_is_shown(open_page: Open, scripted: Scripted) -> None:
    """Models, nodes, events and requests, each by what a delta brings; the rest stays."""
    watched = open_page()
    page = watched.open("models")
    expect(page.locator("article.model")).to_have_count(2)
    changed = scripted.state()["models"]
    changed[0] |= {"state": "failed", "message": "The engine has died.", "active": 17}
    scripted.push(models=changed[:1])
    card = page.get_by_role("article", name="tiny-pt")
    expect(card).to_contain_text("The engine has died.")
    expect(card.locator(".facts-row")).to_contain_text("17")
    expect(page.locator("#tab-models")).to_contain_text("1 failed")
    watched.show("events")
    scripted.push(events=[states.event(9, "lost", "tiny-pt", "Replica abc of tiny-pt is gone.", time.time())])
    expect(page.locator(".events li").first).to_contain_text("Replica abc of tiny-pt is gone.")
    expect(page.get_by_role("log")).to_have_text("Replica abc of tiny-pt is gone.")
    expect(page.locator(".events li")).to_have_count(4)
    watched.show("requests")
    scripted.push(
        requests=[states.request(4, "tiny-pt", time.time(), retries=2), states.request(5, "tiny-pt", time.time())]
    )
    rows = page.locator("#panel-requests tbody tr")
    expect(rows).to_have_count(5)
    expect(rows.nth(1)).to_contain_text("retried 2×")
    page.locator("#panel-requests label", has_text="Outcome").locator("select").select_option("refused")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("rate_limit_exceeded")
    page.locator("#panel-requests label", has_text="Model").locator("select").select_option("tiny-pt")
    expect(page.locator("#panel-requests")).to_contain_text("No request is like this.")
    nodes = scripted.state()["nodes"]
    nodes[0]["devices"][0]["blocks"][0]["held"] = 3 * states.GIB
    watched.show("memory")
    scripted.push(nodes=nodes)
    expect(page.locator("g.block").first).to_have_attribute(
        "aria-label", "tiny-pt: planned 1.04 GiB (calibrated), holds 3.00 GiB, which is more than planned"
    )


def test_requests_that_a_page_was_not_told_of_are_counted(open_page: Open, scripted: Scripted) -> None:
    """A busy router leaves requests out of a delta, and forgets one that a page shows as running."""
    watched = open_page()
    page = watched.open("requests")
    rows, note = page.locator("#panel-requests tbody tr"), page.locator("#panel-requests .note")
    expect(rows).to_have_count(4)
    scripted.push(requests=[states.request(7, "tiny-pt", time.time(), "running")], requests_left_out=1)
    expect(rows).to_have_count(5)
    expect(note).to_contain_text("1 request came faster than a page is told of them, and is not shown.")
    scripted.push(gone_requests=[7], requests_left_out=40)
    expect(rows).to_have_count(4)
    expect(note).to_contain_text("41 requests came faster than a page is told of them, and are not shown.")


def test_only_what_changed_is_sent_and_drawn(open_page: Open, scripted: Scripted) -> None:
    """A changed node or model keeps its place, a new one comes last, one that is gone is left out, and the elements of
    all others are not touched."""
    scripted.state = states.mixed
    watched = open_page()
    page = watched.open()
    cards = page.locator(".node h3")
    expect(cards).to_have_text(["10.0.0.1", "10.0.0.2"])
    page.evaluate(
        """() => {
          window.touched = new Set();
          new MutationObserver((changes) => changes.forEach(({ target }) => {
            const node = target.parentElement?.closest(".node") || target.closest?.(".node");
            if (node) window.touched.add(node.querySelector("h3").textContent);
          })).observe(document.querySelector(".nodes"), {
            subtree: true, childList: true, attributes: true, characterData: true,
          });
        }"""
    )
    first, second = states.mixed()["nodes"]
    first["devices"][0]["blocks"][0]["held"] = 3 * states.GIB
    third = states.node(3, [states.device(None, "memory", 24 * states.GIB, [], now=time.time())])
    scripted.push(nodes=[third, first])
    expect(cards).to_have_text(["10.0.0.1", "10.0.0.2", "10.0.0.3"])
    expect(page.locator("g.block").first).to_have_attribute("aria-label", re.compile("holds 3.00 GiB"))
    assert set(page.evaluate("[...window.touched]")) == {"10.0.0.1"}
    scripted.push(gone_nodes=[second["id"]])
    expect(cards).to_have_text(["10.0.0.1", "10.0.0.3"])
    watched.show("models")
    names = [each["name"] for each in states.mixed()["models"]]
    titles = page.locator("article.model h3")
    expect(titles).to_have_text(names)
    scripted.push(
        models=[states.model("a-new-one"), states.model(names[3], message="It is busy.")], gone_models=[names[1]]
    )
    expect(titles).to_have_text([names[0], *names[2:], "a-new-one"])
    expect(page.get_by_role("article", name=names[3])).to_contain_text("It is busy.")


def test_what_is_equal_stays_the_same_object(open_page: Open) -> None:
    """So that it is not drawn again: nodes and devices that are sent again, and series whose last value is the same."""
    page = open_page().open()
    kept: Any = page.evaluate(
        """async () => {
          const { withDelta } = await import("./assets/state.js");
          const node = (id, used) => ({ id, devices: [{ device: "cpu", used: 1 }, { device: "GPU-0", used }] });
          const model = (name) => ({ name, state: "ready", replicas: [{ replica: "r" }] });
          const traffic = { interval_s: 5, slot: 10, models: { a: { requests: [1, 2] }, b: { requests: [1, 2] } } };
          const seen = { events: [], requests: [], traffic, nodes: [node("x", 1), node("y", 1)], models: [model("a")] };
          const next = withDelta(seen, {
            nodes: [node("y", 2)], models: [model("a")],
            traffic: { slot: 10, models: { a: { requests: 3 }, b: { requests: 2 } } },
          });
          const later = withDelta(next, { traffic: { slot: 11, models: {} } });
          return {
            otherNode: next.nodes[0] === seen.nodes[0],
            changedNode: next.nodes[1] === seen.nodes[1],
            otherDevice: next.nodes[1].devices[0] === seen.nodes[1].devices[0],
            changedDevice: next.nodes[1].devices[1] === seen.nodes[1].devices[1],
            models: next.models === seen.models,
            changedSeries: next.traffic.models.a === seen.traffic.models.a,
            sameSeries: next.traffic.models.b === seen.traffic.models.b,
            movedSeries: later.traffic.models.b === next.traffic.models.b,
            nodesWithoutChange: later.nodes === next.nodes,
          };
        }"""
    )
    assert {name for name, is_same in kept.items() if is_same} == {
        "otherNode", "otherDevice", "models", "sameSeries", "nodesWithoutChange"
    }  # fmt: skip


def test_traffic_moves_slot_by_slot(open_page: Open) -> None:
    """A value of the same slot replaces the last one, a later one is added, and slots without a value are empty."""
    page = open_page().open()
    merged: Any = page.evaluate(
        """async () => {
          const { withDelta } = await import("./assets/state.js");
          const series = { requests: [1, 2], ttft_p50_s: [0.1, 0.2] };
          const traffic = { interval_s: 5, slot: 10, models: { a: series, b: series } };
          let seen = { events: [], requests: [], traffic, nodes: [], models: [] };
          const step = (slot, models) => {
            seen = withDelta(seen, { traffic: { slot, models } });
            return seen.traffic.models;
          };
          return [
            step(10, { a: { requests: 3 } }),
            step(13, { a: { requests: 7 }, c: { requests: 1 } }),
            step(400, {}),
          ];
        }"""
    )
    assert merged[0] == {
        "a": {"requests": [1, 3], "ttft_p50_s": [0.1, 0.2]}, "b": {"requests": [1, 2], "ttft_p50_s": [0.1, 0.2]}
    }  # fmt: skip
    assert merged[1]["a"] == {"requests": [1, 3, 0, 0, 7], "ttft_p50_s": [0.1, 0.2, None, None, None]}
    assert merged[1]["b"]["requests"] == [1, 2, 0, 0, 0]
    assert merged[1]["c"]["requests"][-1] == 1
    assert merged[2]["a"]["requests"] == [0] * 120


def test_a_lost_connection_is_said_and_comes_back_with_the_whole_state(open_page: Open, scripted: Scripted) -> None:
    """Meanwhile the page shows what it knew, and since when it knows nothing new."""
    watched = open_page()
    watched.expected = ("status of 503",)
    page = watched.open("models")
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    scripted.stream_error = (503, "model_unavailable", "64 pages are open.")
    scripted.drop()
    expect(page.locator(".top .link")).to_contain_text("Not connected since")
    expect(page.locator("main .problem")).to_contain_text("64 pages are open.")
    expect(page.locator("article.model")).to_have_count(2)
    scripted.stream_error, scripted.state = None, states.large
    expect(page.locator("article.model")).to_have_count(10)
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    expect(page.locator("main .problem")).to_have_count(0)
    assert scripted.pages == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ((404, "", "Path '/ui/api/stream' not found."), "The server has no console at this address now."),
        ((403, "foreign_page", "This address is not one of this machine."), "This address is not one of this machine."),
        ((502, "", "Bad gateway"), "Bad gateway"),
    ],
)
def test_an_error_that_may_pass_is_tried_again(
    open_page: Open, scripted: Scripted, error: tuple[int, str, str], told: str
) -> None:
    """Such as a proxy's 404 while the router restarts. What the page knew, and what was typed into it, stays."""
    watched = open_page()
    watched.expected = (f"status of {error[0]}",)
    page = watched.open("playground")
    page.locator("#draft").fill("A question that is not sent yet")
    scripted.stream_error = error
    scripted.drop()
    expect(page.locator("main .problem")).to_contain_text(told)
    expect(page.locator("#draft")).to_have_value("A question that is not sent yet")
    scripted.stream_error = None
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    expect(page.locator("#draft")).to_have_value("A question that is not sent yet")
    expect(page.locator("main .problem")).to_have_count(0)


def test_a_console_that_is_off_is_not_asked_again(open_page: Open, scripted: Scripted) -> None:
    """Until a person wants it: a switch does not change by itself."""
    watched = open_page()
    watched.expected = ("status of 404",)
    scripted.stream_error = (404, "console_off", "The console is off. Set console: true.")
    page = watched.open()
    expect(page.get_by_role("heading", name="The console is off")).to_be_visible()
    expect(page.locator(".sign-in")).to_contain_text("Set console: true.")
    asked = len(scripted.keys_seen)
    scripted.stream_error = None
    page.wait_for_timeout(1500)
    assert len(scripted.keys_seen) == asked
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_text("Live", exact=True)).to_be_visible()


def test_a_page_of_an_older_server_says_so(open_page: Open, scripted: Scripted) -> None:
    """Its scripts are not those of the new server, until it is loaded again."""
    page = open_page().open()
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    scripted.drop()
    expect(page.locator(".top .link")).to_contain_text("Not connected since")
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    scripted.state = lambda: states.demo() | {"version": "0.8.0"}
    scripted.drop()
    expect(page.get_by_role("alert")).to_contain_text("The server was updated. Reload this page.")
    page.get_by_role("button", name="Reload", exact=True).click()
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    expect(page.locator("h1")).to_contain_text("0.8.0")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_hidden_tab_gives_its_stream_back(open_page: Open, scripted: Scripted) -> None:
    """After a minute; and it opens another once it is seen."""
    watched = open_page()
    watched.page.clock.install()
    page = watched.open()
    expect(page.get_by_role("tab").first).to_be_visible()
    hide = """hidden => {
        Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));
    }"""
    page.evaluate(hide, True)
    page.clock.fast_forward(61_000)
    wait_for_pages(scripted, 0)
    page.evaluate(hide, False)
    wait_for_pages(scripted, 1)


def wait_for_pages(scripted: Scripted, number: int) -> None:
    """Until so many streams are open."""
    deadline = time.monotonic() + 10
    while scripted.pages != number:
        assert time.monotonic() < deadline, scripted.pages
        time.sleep(0.02)


def test_a_key_is_asked_for_and_kept_in_memory_only(open_page: Open, scripted: Scripted) -> None:
    """A wrong one is told; the right one is in no storage, no address and no part of the document; signing out forgets
    it and everything that it showed."""
    scripted.needs_key = True
    watched = open_page()
    watched.expected = ("status of 401",)
    page = watched.open()
    field = page.get_by_label("API key")
    expect(field).to_be_visible()
    assert watched.violations() == []
    assert "tiny-pt" not in page.content()
    field.fill("sk-wrong-key")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The server does not accept this key.")
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("tab").first).to_be_visible()
    expect(page.locator(".who")).to_have_text("team-a")
    kept = page.evaluate(
        "JSON.stringify([{...localStorage}, {...sessionStorage}, location.href, document.cookie, "
        "document.documentElement.outerHTML, [...document.querySelectorAll('input, textarea')].map(e => e.value)])"
    )
    assert KEY not in kept
    assert "tiny-pt" in kept
    watched.show("models")
    expect(page.get_by_role("button", name="Reload the config")).to_have_count(0)
    watched.show("what-if")
    expect(page.locator("#panel-what-if")).to_contain_text("Only a key of the role admin may plan")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert "tiny-pt" not in page.content()
    assert scripted.keys_seen[-1] == "", "the key is not sent after it was forgotten"
    page.reload()
    expect(page.get_by_label("API key")).to_be_visible()


def test_the_colours_are_chosen_and_remembered(open_page: Open) -> None:
    """Whatever the system has."""
    watched = open_page(scheme="light")
    page = watched.open()
    back = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(back)
    page.get_by_label("Colours").select_option("dark")
    dark = page.evaluate(back)
    assert dark != light
    page.reload()
    expect(page.get_by_label("Colours")).to_have_value("dark")
    assert page.evaluate(back) == dark


def test_an_earlier_slot_is_changed_in_its_place(open_page: Open) -> None:
    """The tokens of an answer that comes whole are told so. A model without series yet gets them up to now."""
    page = open_page().open()
    models: Any = page.evaluate(
        """async () => {
          const { withDelta } = await import("./assets/state.js");
          const series = () => ({ tokens_per_s: [1, 2, 3], ttft_p50_s: [0.1, null, 0.2] });
          const traffic = { interval_s: 5, slot: 10, models: { a: series(), b: series() } };
          const seen = { events: [], requests: [], traffic, nodes: [], models: [] };
          const values = { tokens_per_s: 9, ttft_p50_s: null };
          const next = withDelta(seen, { traffic: { slot: 9, models: { a: values, c: values } } });
          return [next.traffic.slot, next.traffic.models, next.traffic.models.b === traffic.models.b];
        }"""
    )
    slot, found, is_same = models
    assert (slot, is_same) == (10, True)
    assert found["a"] == {"tokens_per_s": [1, 9, 3], "ttft_p50_s": [0.1, None, 0.2]}
    assert found["c"] == {"tokens_per_s": [9, 0], "ttft_p50_s": [None, None]}


@pytest.mark.parametrize("key", ["ключ", "sk-\x01", "sk-€"])
def test_a_key_that_no_header_can_have_is_refused_at_once(open_page: Open, scripted: Scripted, key: str) -> None:
    """The browser would not send it. The form stays, so another key can be tried."""
    scripted.needs_key = True
    watched = open_page()
    watched.expected = ("status of 401",)
    page = watched.open()
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_have_text("The server does not accept this key.")
    assert scripted.keys_seen == [""], "nothing was sent with it"
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("Live", exact=True)).to_be_visible()


def test_a_key_that_was_revoked_says_so_and_loses_no_draft(open_page: Open, scripted: Scripted) -> None:
    """What the server told is gone from the page. What was typed and said is there after the next sign-in, unless it
    shall be forgotten."""
    scripted.needs_key = True
    watched = open_page()
    watched.expected = ("status of 401",)
    page = watched.open("playground")

    def sign_in() -> None:
        page.get_by_label("API key").fill(scripted.key)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_text("Live", exact=True)).to_be_visible()

    def revoke(key: str) -> None:
        scripted.key = key
        scripted.drop()
        expect(page.get_by_role("alert")).to_have_text("This key is not valid any more.")

    sign_in()
    page.locator("#draft").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_contain_text("word19")
    page.locator("#draft").fill("A question that is not sent yet")
    revoke("sk-second-key")
    expect(page.locator("#draft")).to_be_hidden()
    expect(page.get_by_role("tab")).to_have_count(0)
    assert "team-a" not in page.content()
    assert watched.violations() == []
    page.get_by_label("API key").fill("sk-wrong-key")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The server does not accept this key.")
    sign_in()
    expect(page.locator("#draft")).to_have_value("A question that is not sent yet")
    expect(page.locator(".answer")).to_contain_text("word19")
    revoke("sk-third-key")
    page.get_by_role("button", name="Forget them").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    assert "word19" not in page.content()
    sign_in()
    expect(page.locator("#draft")).to_have_value("")


def test_what_the_network_does_is_told_in_words(open_page: Open, scripted: Scripted) -> None:
    """Not in those of the browser."""
    watched = open_page()
    watched.expected = ("ERR_FAILED", "ERR_INCOMPLETE_CHUNKED_ENCODING")
    page = watched.open("playground")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.locator("#draft").fill("Hello")
    page.keyboard.press("Enter")
    problem = page.locator(".pane .problem")
    expect(problem).to_have_text(re.compile(r"^\s*Error\s*The server cannot be reached\.\s*$"))
    page.unroute("**/v1/chat/completions")
    scripted.breaks = True
    page.locator("#draft").fill("Hello")
    page.keyboard.press("Enter")
    expect(problem.last).to_contain_text("The connection to the server broke.")
