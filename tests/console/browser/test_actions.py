"""What a person can do by keyboard and pointer: go through the page, read the map, plan, and change what runs."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser import DESKTOP, PHONE
from tests.console.browser import states
from tests.console.browser.conftest import Open
from tests.console.browser.scripted import Scripted
from tests.console.browser.test_sections import plan


def focused(page: Page) -> str:
    """The accessible name, id or tag of what has the focus."""
    name: str = page.evaluate(
        "(e => e.getAttribute('aria-label') || e.id || e.textContent.trim() || e.tagName)(document.activeElement)"
    )
    return name


def test_the_keyboard_reaches_everything(open_page: Open) -> None:
    """The link to the content first, the tabs by arrow keys, and each block of the map, whose figures are told."""
    page = open_page().open()
    expect(page.get_by_role("tab").first).to_be_visible()
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the content"
    page.keyboard.press("Enter")
    assert focused(page) == "main"
    page.locator("#tab-memory").focus()
    for key, tab in (
        ("ArrowRight", "models"),
        ("End", "events"),
        ("ArrowRight", "memory"),
        ("ArrowLeft", "events"),
        ("Home", "memory"),
    ):
        page.keyboard.press(key)
        assert focused(page) == f"tab-{tab}"
        expect(page.locator(f"#panel-{tab}")).to_be_visible()
        assert page.locator("[role=tab][tabindex='0']").count() == 1
    for _ in range(12):
        if focused(page).startswith("tiny-pt"):
            break
        page.keyboard.press("Tab")
    detail = page.locator(".detail")
    expect(detail.locator("h3")).to_have_text("tiny-pt")
    page.keyboard.press("ArrowRight")
    expect(detail.locator("h3")).to_have_text("tiny-vllm")
    page.keyboard.press("ArrowUp")
    expect(detail.locator("h3")).to_have_text("tiny-vllm")
    page.keyboard.press("Enter")
    expect(page.locator("g.block.chosen")).to_have_count(2)  # of the bar to scale, and of the closer one
    page.keyboard.press("Home")
    expect(detail.locator("h3")).to_have_text("tiny-vllm")
    page.keyboard.press("Escape")
    expect(detail.locator("h3")).to_have_text("tiny-pt")
    ring = page.evaluate("getComputedStyle(document.activeElement.querySelector('.ring')).stroke")
    assert ring.startswith("rgb")


def test_the_map_the_details_and_the_table_have_the_figures(open_page: Open, scripted: Scripted) -> None:
    """Of the state: planned, held, peak and certainty, of the block and of each part."""
    page = open_page().open()
    block = states.demo()["nodes"][0]["devices"][0]["blocks"][1]
    page.locator("g.block").nth(1).hover()
    facts = page.locator(".detail .facts")
    expect(facts.get_by_role("row", name="Planned")).to_contain_text("1.17 GiB")
    expect(facts.get_by_role("row", name="Planned")).to_contain_text("guessed")
    expect(facts.get_by_role("row", name="Held")).to_contain_text("1.14 GiB")
    parts = page.locator(".detail .parts")
    cells = [parts.get_by_role("row", name=name).first.inner_text() for name in ("weights", "KV cache", "activations")]
    sizes = [
        (part["planned"], part["held"])
        for part in block["parts"]
        if part["name"] in ("weights", "kv_cache", "activations")
    ]
    told = [re.findall(r"[\d.]+ MiB", text) for text in cells]
    assert told == [[f"{planned / states.MIB:.1f} MiB", f"{held / states.MIB:.1f} MiB"] for planned, held in sizes]
    page.get_by_role("button", name="Table", exact=True).click()
    row = page.get_by_role("row", name="tiny-vllm")
    for text in ("1.17 GiB", "1.14 GiB", "1.16 GiB", "guessed", "659.4 MiB", "639.7 MiB"):
        expect(row).to_contain_text(text)
    expect(page.locator("#panel-memory tfoot")).to_contain_text("4.00 GiB are not held by models on the CPU")


def test_bars_are_to_scale(open_page: Open, scripted: Scripted) -> None:
    """Every block of every GPU has the width of its bytes, and so have its fill, its outline and other processes."""
    scripted.state = states.mixed
    page = open_page().open()
    gpu = states.mixed()["nodes"][0]["devices"][1]
    bar = page.locator(".device", has=page.get_by_text("GPU 1", exact=True)).first.locator("svg.bar")
    width = float(bar.get_attribute("width") or 0)
    scale = width / gpu["total"]

    def widths(selector: str) -> list[float]:
        return [float(each.get_attribute("width") or 0) for each in bar.locator(selector).all()]

    expect(bar.locator("rect.outline")).to_have_count(10)
    assert [each + 1.5 for each in widths("rect.outline")] == pytest.approx(
        [scale * each["planned"] for each in gpu["blocks"]]
    )
    fills = sum(widths("rect.fill"))
    assert fills == pytest.approx(scale * sum(each["held"] for each in gpu["blocks"]), abs=1)
    assert widths("rect.foreign") == [pytest.approx(scale * gpu["foreign"], abs=0.01)] or gpu["foreign"] * scale < 3


def test_the_plans_of_a_pool_are_counted_for_its_resident_alone(open_page: Open, scripted: Scripted) -> None:
    """The others are as long as what they hold, so the bar is that of the card. They can still be reached."""
    scripted.state = states.pool
    watched = open_page()
    page = watched.open()
    expect(page.locator(".map > .note")).to_contain_text("The full width is 80.00 GiB for GPUs.")
    bar = page.locator("svg.bar").first
    total = float(bar.get_attribute("width") or 0)
    outlines = [float(each.get_attribute("width") or 0) for each in bar.locator("rect.outline:not(.away)").all()]
    assert [each + 1.5 for each in outlines] == pytest.approx([total * 60 / 80, total * 8 / 80])
    expect(bar.locator("rect.outline.away")).to_have_count(3)
    facts = page.locator(".detail .facts")
    expect(facts.get_by_role("row", name="Planned for models")).to_contain_text("68.00 GiB")
    expect(page.locator(".detail")).to_contain_text("parked and leaving models (180.0 GiB) are not counted.")
    assert watched.violations() == []
    row = page.locator("section[aria-labelledby=holders]").get_by_role("row", name="member-1")
    expect(row).to_contain_text("60.00 GiB when resident")
    bar.locator("g.block").first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator(".detail h3")).to_have_text("member-3")
    expect(facts.get_by_role("row", name="Planned when resident")).to_contain_text("60.00 GiB")
    assert page.locator("g.block:focus").get_attribute("aria-label") == (
        "member-3: parked, holds 0, planned 60.00 GiB (calibrated) when resident"
    )


def test_what_is_not_known_is_not_told_as_that_of_others(open_page: Open, scripted: Scripted) -> None:
    """In a container, a model's own memory would look like that of other processes."""
    scripted.state = states.container
    watched = open_page(scheme="dark")
    page = watched.open()
    gpus = page.locator(".detail .facts", has_text="GPUs")
    expect(gpus.get_by_role("row", name="Other processes")).to_contain_text("not known")
    expect(gpus.get_by_role("row", name="Held by models")).to_contain_text("not known")
    memory = page.locator(".detail .facts", has_text="Memory of nodes")
    expect(memory.get_by_role("row", name="Not held by models on the CPU")).to_contain_text("4.00 GiB")
    bar = page.locator(".device", has_text="GPU 0").locator("svg.bar").first
    expect(bar.locator("rect.foreign")).to_have_count(0)
    width = float(bar.get_attribute("width") or 0)
    used = float(bar.locator("rect.unexplained").get_attribute("width") or 0)
    assert used == pytest.approx(width * 15 / 24)
    expect(page.locator("svg.bar rect.foreign title").first).to_have_text("Not held by models on the CPU: 4.00 GiB")
    expect(page.locator(".legend")).to_contain_text("not held by models on the CPU")
    assert watched.violations() == []
    page.get_by_role("button", name="Table", exact=True).click()
    expect(page.locator("#panel-memory tfoot")).to_contain_text("other processes: not known")


def test_a_plan_is_asked_for_and_can_be_saved(open_page: Open, scripted: Scripted) -> None:
    """By fields and by a file, with the fixes, and the file to download."""
    scripted.state = states.container
    watched = open_page()
    page = watched.open("what-if")
    scripted.plan = (200, plan("tensor_parallel_size: 2") | {"yaml": "applications: []  # ü\n"})
    page.get_by_label("Model: an id").fill("org/model")
    page.get_by_label("Backend").select_option("pt")
    page.get_by_label("GPUs", exact=True).fill("2")
    page.get_by_label("Memory limits").fill('{"0": "3GiB"}')
    page.get_by_role("button", name="Plan", exact=True).click()
    expect(page.locator(".verdict")).to_have_text(re.compile("It does not fit"))
    expect(page.locator(".fixes li")).to_contain_text("tensor_parallel_size: 2")
    expect(page.locator(".plan-map svg.bar g.block")).to_have_count(1)
    expected = {"model": "org/model", "infer_backend": "pt", "num_gpus": 2, "max_memory": {"0": "3GiB"}}
    assert scripted.asked == [("plan", expected)]
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download").click()
    assert saved.value.suggested_filename == "serve-app.yaml"
    assert saved.value.path().read_text() == "applications: []  # ü\n"
    page.get_by_role("button", name="A config file").click()
    page.get_by_label("Config file (YAML)").fill("applications: []")
    scripted.plan = (200, plan(fits=True))
    page.get_by_role("button", name="Plan", exact=True).click()
    expect(page.locator(".verdict")).to_have_text(re.compile("It fits"))
    assert scripted.asked[1] == ("plan", {"yaml": "applications: []"})
    scripted.plan = (400, {"error": {"message": "applications[0].args: 'modle' is no field.", "code": "bad_config"}})
    watched.expected = ("status of 400",)
    page.get_by_role("button", name="Plan", exact=True).click()
    expect(page.locator("#panel-what-if .problem")).to_contain_text("'modle' is no field.")


def test_what_an_admin_can_do_is_offered_and_confirmed(open_page: Open, scripted: Scripted) -> None:
    """Wake at once; park and reload once the dialog that says what happens is answered. Escape does nothing."""
    scripted.state = states.large
    watched = open_page()
    page = watched.open("models")
    page.get_by_role("button", name="Wake model-07-instruct").click()
    expect(page.locator("#panel-models [role=status]")).to_have_text("It was done.")
    page.get_by_role("button", name="Park model-00-instruct").click()
    expect(page.locator("dialog")).to_contain_text("leaves its memory once its running requests have ended")
    assert watched.violations() == []
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    assert focused(page) == "Park model-00-instruct"
    assert len(scripted.asked) == 1
    page.keyboard.press("Enter")
    page.locator("dialog").get_by_role("button", name="Park").click()
    page.get_by_role("button", name="Reload the config").click()
    expect(page.locator("dialog")).to_contain_text("A file with a mistake changes nothing")
    page.locator("dialog").get_by_role("button", name="Reload").click()
    expect(page.locator("dialog")).to_have_count(0)
    told = page.locator("#panel-models [role=status]")
    expect(told).to_have_text(
        "The config file /etc/models.yaml on 10.0.0.1 was read again, and this changes:\na is new"
    )
    base = "/ui/api/models/model-0"
    assert [path for path, _ in scripted.asked] == [
        f"{base}7-instruct/wake",
        f"{base}0-instruct/park",
        "/ui/api/reload",
    ]


def test_a_cluster_without_gpus_is_not_asked_for_them(open_page: Open, scripted: Scripted) -> None:
    """Nor is what was typed for GPUs sent once they are gone."""
    scripted.plan = (200, plan())
    page = open_page().open("what-if")
    panel = page.locator("#panel-what-if")
    expect(panel).to_contain_text("This cluster has no GPU, so the model is planned for the CPU.")
    expect(page.get_by_label("GPUs", exact=True)).to_have_count(0)
    expect(page.get_by_label("Memory limits")).to_have_count(0)
    nodes = states.container()["nodes"]
    scripted.push(nodes=nodes)
    page.get_by_label("GPUs", exact=True).fill("2")
    expect(panel).not_to_contain_text("This cluster has no GPU")
    scripted.push(nodes=states.demo()["nodes"])
    expect(page.get_by_label("GPUs", exact=True)).to_have_count(0)
    page.get_by_label("Model: an id").fill("org/model")
    page.get_by_role("button", name="Plan", exact=True).click()
    page.locator(".verdict").wait_for()
    assert scripted.asked == [("plan", {"model": "org/model"})]


@pytest.mark.parametrize(("may", "is_admin"), [(True, True), (False, True), (None, True), (None, False), (True, False)])
def test_what_a_key_may_do_is_what_the_server_says(
    open_page: Open, scripted: Scripted, may: bool | None, is_admin: bool
) -> None:
    """`may_plan` and `may_reload`, or the role where a server tells only that. What is hidden is explained."""
    access = {"keys": True, "key": "ops", "is_admin": is_admin, "keeps_prompts": False}
    if may is not None:
        access |= {"may_plan": may, "may_reload": may}
    scripted.state = lambda: states.demo() | {"access": access}
    watched = open_page()
    page = watched.open("models")
    is_let = is_admin if may is None else may
    expect(page.locator("article.model")).to_have_count(2)
    expect(page.get_by_role("button", name="Reload the config")).to_have_count(int(is_let))
    told = page.get_by_text("Only an admin of all models may reload the config.")
    expect(told).to_have_count(int(is_admin and not is_let))
    watched.show("what-if")
    expect(page.get_by_role("button", name="Plan", exact=True)).to_have_count(int(is_let))
    why = "Only an admin of all models may plan" if is_admin else "Only a key of the role admin may plan"
    expect(page.locator("#panel-what-if").get_by_text(why)).to_have_count(int(not is_let))


def test_a_parked_model_is_not_ready(open_page: Open, scripted: Scripted) -> None:
    """If all of its replicas are parked. Its card says how long a request would wait for it."""
    found = states.demo()
    member = {"state": "parked", "pool": "p", "ready_in_s": 2.0, "is_guess": False}
    found["models"][0]["replicas"][0]["residency"] = member
    found["models"][0]["ready_in_s"] = 2.0
    scripted.state = lambda: found
    watched = open_page()
    page = watched.open("models")
    card = page.get_by_role("article", name="tiny-pt")
    expect(card.locator("header .badge")).to_have_text("parked")
    expect(card).to_contain_text("It can answer about 2.0 s after a request has come.")
    expect(page.locator(".sums")).to_contain_text("1/2")
    second = found["models"][0]["replicas"][0] | {"replica": "b", "residency": member | {"state": "resident"}}
    scripted.push(models=[found["models"][0] | {"replicas": [found["models"][0]["replicas"][0], second]}])
    expect(card.locator("header .badge")).to_have_text("ready")
    expect(page.locator(".sums")).to_contain_text("2/2")
    watched.show("memory")
    expect(page.locator("section[aria-labelledby=holders] tbody tr").first).to_contain_text("ready")


def test_a_load_says_when_it_ends_as_far_as_that_is_known(open_page: Open, scripted: Scripted) -> None:
    """Once the estimate has passed, nothing is known."""
    page = open_page().open("models")
    card = page.get_by_role("article", name="tiny-pt")
    scripted_model = states.model("tiny-pt", "loading", ready_in_s=12.0)
    expect(card).to_be_visible()
    scripted.push(models=[scripted_model])
    expect(card).to_contain_text("It will be ready in about 12.0 s.")
    scripted.push(models=[scripted_model | {"ready_in_s": None}])
    expect(card).to_contain_text("It takes longer than was estimated.")
    scripted.push(models=[scripted_model | {"state": "ready", "ready_in_s": None}])
    expect(card).not_to_contain_text("It takes longer")


def test_a_plan_keeps_its_lines_on_a_phone(open_page: Open, scripted: Scripted) -> None:
    """It is a table of text, which scrolls sideways by itself."""
    line = "n1:0 NVIDIA H100  " + "9.99  " * 30
    scripted.plan = (200, plan() | {"text": f"{line}\n{line}", "yaml": f"# {line}\n"})
    watched = open_page(size=PHONE)
    page = watched.open("what-if")
    page.get_by_label("Model: an id").fill("org/model")
    page.get_by_role("button", name="Plan", exact=True).click()
    text = page.get_by_role("region", name="The plan")
    assert text.evaluate("e => e.clientHeight < 3 * 22 && e.scrollWidth > e.clientWidth + 200")
    assert watched.overflow() <= 0
    watched.show("memory")
    page.get_by_role("button", name="Table", exact=True).click()
    note = page.locator("#memory-table")
    assert note.evaluate("e => e.getBoundingClientRect().right <= innerWidth")


def test_a_long_name_takes_one_line_of_an_event(open_page: Open, scripted: Scripted) -> None:
    """It can be read whole by its title and in the text."""
    name = "model-" + "x" * 109
    scripted.state = lambda: states.demo() | {"events": [states.event(1, "ready", name, "It is ready.", 0.0)]}
    for size in (DESKTOP, PHONE):
        watched = open_page(size=size)
        page = watched.open("events")
        line = page.locator("#panel-events .events li")
        expect(line.locator(".name")).to_have_attribute("title", name)
        assert line.evaluate("e => e.getBoundingClientRect().height") < 60
        assert watched.overflow() <= 0


def test_a_phone_is_not_told_of_keys(open_page: Open) -> None:
    """Which it does not have."""
    page = open_page(size=PHONE).open()
    expect(page.locator(".detail")).to_contain_text("Touch a block of the map")
    expect(page.locator(".detail")).not_to_contain_text("arrow keys")


def test_more_than_the_plan_on_the_cpu_is_explained(open_page: Open, scripted: Scripted) -> None:
    """It has what libraries keep. On a GPU, it is no matter of course."""
    page = open_page().open()
    reason = page.get_by_text("what the C library and others keep for themselves")
    expect(page.locator("section[aria-labelledby=holders]")).to_be_visible()
    expect(reason).to_have_count(0)
    nodes = states.demo()["nodes"]
    nodes[0]["devices"][0]["blocks"][0] = states.block("tiny-pt", states.GIB, 3.4, 1)
    scripted.push(nodes=nodes)
    expect(reason).to_have_count(1)
    page.locator("g.block").first.click()
    expect(page.locator(".detail")).to_contain_text("what the C library and others keep for themselves")
    nodes[0]["devices"] = [states.device(0, "L4", 24 * states.GIB, nodes[0]["devices"][0]["blocks"], now=1.0)]
    scripted.push(nodes=nodes)
    expect(page.locator(".detail")).to_contain_text("GPUs")
    expect(reason).to_have_count(0)


@pytest.mark.parametrize("section", ["memory", "events"])
def test_labels_beside_long_names_stay_whole_on_a_phone(open_page: Open, scripted: Scripted, section: str) -> None:
    """The list of models is cut instead."""
    name = "model-" + "x" * 109
    found = states.demo()
    found["events"].append(states.event(9, "ready", name, "It is ready.", 0.0))
    found["nodes"][0]["devices"][0]["blocks"].append(states.block(name, states.GIB, 0.5, 7))
    scripted.state = lambda: found
    page = open_page(size=PHONE).open(section)
    labels = page.locator(f"#panel-{section} label.inline")
    expect(labels.last).to_be_visible()
    assert all(each.evaluate("e => e.getBoundingClientRect().height") < 40 for each in labels.all())
