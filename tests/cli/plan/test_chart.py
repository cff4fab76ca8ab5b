"""What the pictures of a plan show, and what the terminal and the SVG make of it."""

import io
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from serve_app.cli.main import main
from serve_app.cli.plan import text as plan_text
from serve_app.cli.plan.chart import LABELS, cells, chart_of, ranges
from serve_app.cli.plan.svg import INNER, plan_svg
from serve_app.cli.plan.text import ASCII, UNICODE, page, print_plan
from serve_app.facts.inventory import Device, Inventory, parse_gpus
from serve_app.planning.fixes import with_fixes
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.plan import Plan
from serve_app.planning.planner import make_plan
from tests.planning.model_requests import request

GIB = 2**30
ROOT = Path(__file__).parents[3]
SVG = "{http://www.w3.org/2000/svg}"
BLOCK_SIGNS = "".join(UNICODE.blocks.values())


def planned(requests: list[ModelRequest], gpus: str | Inventory) -> Plan:
    """Their plan with fixes, without this machine's calibrations."""
    inventory = replace(parse_gpus(gpus), calibrations={}) if isinstance(gpus, str) else gpus
    return with_fixes(make_plan(requests, inventory), requests, inventory)


def small(name: str = "q", **fields: object) -> ModelRequest:
    """A 7B model of which 8 GiB and more cards can hold a part."""
    return request(name=name, **{"infer_backend": "vllm", "max_model_len": 4096, "max_num_seqs": 32, **fields})


def mixed() -> Plan:
    """Two models on two unequal cards, one of which others use; a third model has no place."""
    devices = (
        Device("n1", 0, "RTX3090", 24 * GIB, 22 * GIB),
        Device("n1", 1, "GPU", 8 * GIB, 8 * GIB),
    )
    large = small("large", infer_backend="pt", max_num_seqs=None, max_memory={0: "13GiB", 1: "6GiB"})
    return planned([large, small("<b>&\x1b[31m")], Inventory(devices))


def text_of(plan: Plan, width: int = 100, signs: plan_text.Signs = UNICODE) -> str:
    """The page without colours."""
    return "\n".join(line.plain for line in page(plan, width, signs))


def bars_of(text: str) -> list[str]:
    """The lines that are bars: the legend has spaces."""
    return [line for line in text.splitlines() if line and set(line) <= set(BLOCK_SIGNS)]


sizes = st.lists(st.one_of(st.just(0), st.integers(1, 10), st.integers(1, 200 * GIB)), max_size=40)


@given(sizes, st.integers(0, 200))
def test_cells_add_up_to_the_width_and_none_is_negative(found: list[int], width: int) -> None:
    """Whatever the sizes are, a bar is as long as it should be."""
    counts = cells(found, width)
    assert sum(counts) == (width if any(found) else 0)
    assert all(count >= 0 for count in counts)
    assert all(count == 0 for count, size in zip(counts, found, strict=True) if not size)


@given(sizes, st.integers(0, 200))
def test_a_block_is_seen_while_there_are_cells_and_else_the_largest_are(found: list[int], width: int) -> None:
    """The smallest blocks take a cell of the largest one."""
    counts = cells(found, width)
    seen = [size for size, count in zip(found, counts, strict=True) if count]
    unseen = [size for size, count in zip(found, counts, strict=True) if size and not count]
    if sum(size > 0 for size in found) <= width:
        assert not unseen
    if seen and unseen:
        assert max(unseen) <= min(seen)


@given(sizes, st.integers(1, 200))
def test_cells_are_to_scale(found: list[int], width: int) -> None:
    """No block is a cell longer than its share, but for one that is a single cell so that it is seen."""
    total = sum(found)
    for size, count in zip(found, cells(found, width), strict=True):
        assert count <= 1 or count < size * width / total + 1


def test_the_blocks_of_a_bar_add_up_to_its_card() -> None:
    """Models, spare memory and what others hold, in this order."""
    plan = mixed()
    chart = chart_of(plan)
    assert [bar.title for bar in chart.bars] == ["n1:0", "n1:1"]
    for bar, device in zip(chart.bars, plan.devices, strict=True):
        assert sum(block.figure.bytes for block in bar.blocks) == device.total_bytes
        assert bar.spare.figure.bytes == device.free_bytes - plan.planned(device)
        assert [block.kind for block in bar.blocks] == sorted((block.kind for block in bar.blocks), key=[*LABELS].index)
    assert chart.bars[0].others.figure.bytes == 2 * GIB
    assert (chart.bars[0].length, chart.bars[1].length) == (1.0, 8 / 24)


def test_cards_of_very_different_sizes_have_scales_of_their_own_and_that_is_said() -> None:
    """Else the small one would be a few columns long."""
    chart = chart_of(planned([small()], "8GiB,80GiB"))
    assert [bar.length for bar in chart.bars] == [1.0, 1.0]
    assert any("scale of its own" in note for note in chart.notes)


def test_host_memory_does_not_shorten_the_bars_of_gpus() -> None:
    """A host has a hundred times the memory of a card; it is shown where a model runs on it."""
    devices = (Device("n1", 0, "GPU", 24 * GIB, 24 * GIB), Device("n1", None, "memory", 512 * GIB, 512 * GIB))
    cpu = request(name="c", infer_backend="pt", device="cpu", max_model_len=2048)
    chart = chart_of(planned([small(), cpu], Inventory(devices)))
    assert [(bar.title, bar.length) for bar in chart.bars] == [("n1:0", 1.0), ("n1:cpu", 1.0)]
    assert [bar.title for bar in chart_of(planned([small()], Inventory(devices))).bars] == ["n1:0"]


def test_many_cards_that_are_alike_are_one_bar() -> None:
    """And the replicas of a model on them are one name with a count; a few cards stay apart."""
    many = chart_of(planned([replace(small(), replicas=30)], "32x24GiB"))
    assert [bar.title for bar in many.bars] == ["n1:0 to n1:29 (30 alike)", "n1:30, n1:31 (2 alike)"]
    assert many.bars[0].occupants[0].title == "q ×30"
    assert len(many.models) == 1
    assert many.models[0].title == "q, 30 replicas: vllm, tensor_parallel_size 1 on n1:0 to n1:29"
    assert len(chart_of(planned([small()], "4x24GiB")).bars) == 4


def test_neighbours_are_named_by_their_ends() -> None:
    """Nodes stay apart, and two neighbours are both named."""
    places = [("a", 0), ("a", 1), ("a", 2), ("b", 3), ("b", 4)]
    devices = [Device(node, index, "GPU", GIB, GIB) for node, index in places]
    assert ranges(devices) == "a:0 to a:2, b:3, b:4"


@pytest.mark.parametrize("width", [40, 57, 80, 100, 120])
def test_bars_and_prose_are_never_wider_than_the_page(width: int) -> None:
    """What is copied, a fix or a command, is on one line whatever its width."""
    plan = mixed()
    lines = text_of(plan, width).splitlines()
    bars = bars_of("\n".join(lines))
    assert [len(bar) for bar in bars] == [width, round(width * 8 / 24)]
    copied = [line for line in lines if line.startswith(("    fix: ", "    or: ")) or "ray start" in line]
    assert copied
    assert all(cell_len(line) <= width for line in lines if line not in copied)
    assert " ".join(plan.problems[0].message.split()) in " ".join(" ".join(lines).split())


def test_the_order_is_bars_table_reasons_problems() -> None:
    """The verdict comes last, where a terminal ends."""
    text = text_of(mixed())
    marks = [
        "██ weights",
        bars_of(text)[0],
        "device     model",
        "large: pt on",
        "PROBLEM ",
        "    fix: ",
        "1 model does",
    ]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert text.splitlines()[-1] == "1 model does not fit."


def test_the_table_has_the_figures_and_a_narrow_page_names_them() -> None:
    """No figure is lost where the columns have no room."""
    plan = mixed()
    rank = plan.models[0].ranks[0]
    figures = [f"{rank.weights.bytes / GIB:.2f}", f"~{rank.share.bytes / GIB:.2f}"]
    row = next(line for line in text_of(plan).splitlines() if line.startswith("n1:0       large "))
    assert (row.split()[2], row.split()[-1]) == (figures[0], figures[1])
    narrow = " ".join(text_of(plan, 60).split())
    assert f"weights {figures[0]}, KV cache" in narrow
    assert f"share {figures[1]}" in narrow


def test_a_name_that_has_no_room_above_its_blocks_is_said_below() -> None:
    """A long name is cut above the bar and in full below it."""
    name = "a-model-with-a-very-long-name-indeed" * 3
    plan = planned([small(name, num_gpus=0.5), small("b", num_gpus=0.4)], "48GiB")
    lines = text_of(plan, 80).splitlines()
    bar = lines.index(bars_of("\n".join(lines))[0])
    assert lines[bar - 1].startswith("a-model-with-a-very-long-name")
    assert "…" in lines[bar - 1]
    assert "b ~" in lines[bar - 1]
    assert f"also here: {name} ~" in " ".join(" ".join(lines[bar + 1 : bar + 4]).split())


def test_nothing_from_outside_moves_the_cursor() -> None:
    """A model's name may hold any sign; escape sequences are not passed on."""
    assert "<b>&\N{REPLACEMENT CHARACTER}[31m" in text_of(mixed())
    assert not any(unicodedata.category(sign) == "Cc" for sign in text_of(mixed()).replace("\n", ""))


def test_a_terminal_without_unicode_gets_ascii() -> None:
    """Blocks differ by their signs there too."""
    text = text_of(mixed(), signs=ASCII)
    assert text.isascii() or set(text) - set(map(chr, range(128))) == {"\N{REPLACEMENT CHARACTER}"}
    assert "## weights" in text


def printed(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, **environment: str) -> str:
    """What `print_plan` writes, with these variables set."""
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(out, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stdout", out)
    print_plan(mixed())
    out.flush()
    return out.buffer.getvalue().decode()


def without_colours(text: str) -> str:
    """The text without escape sequences."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_colours_come_only_where_a_terminal_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR and dumb terminals have none, and the text is the same everywhere."""
    wide = {"COLUMNS": "100"}
    coloured = printed(monkeypatch, True, TERM="xterm-256color", **wide)
    assert "\x1b[" in coloured
    plain = printed(monkeypatch, False, **wide)
    assert without_colours(coloured) == plain
    assert "\x1b[" not in plain
    assert "\x1b[" not in printed(monkeypatch, True, TERM="dumb", **wide)
    no_color = printed(monkeypatch, True, TERM="xterm-256color", NO_COLOR="1", **wide)
    assert not re.search(r"\x1b\[[\d;]*(?:3|4)8;", no_color)
    assert without_colours(no_color) == plain


@pytest.mark.parametrize(("columns", "width"), [("60", 60), ("20", 40), ("500", 120), ("", 100), ("x", 100)])
def test_columns_are_respected_within_what_can_be_read(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe without COLUMNS is wide enough for the table."""
    text = printed(monkeypatch, False, COLUMNS=columns)
    assert len(bars_of(text)[0]) == width


def drawn(plan: Plan) -> ElementTree.Element:
    """The SVG, parsed. Raises ParseError where it is no XML."""
    return ElementTree.fromstring(plan_svg(plan))  # noqa: S314  # it is our own


def test_the_svg_stands_alone_and_is_accessible() -> None:
    """No script, no reference to elsewhere; a title and a description that says all that the bars show."""
    plan = mixed()
    text, root = plan_svg(plan), drawn(plan)
    assert root.get("role") == "img"
    named = {element.get("id"): element.text for element in root.iter() if element.get("id")}
    title, description = (named[name] for name in (root.get("aria-labelledby") or "").split())
    assert title == "Memory plan: 1 model does not fit."
    assert "n1:0 (RTX3090, 24.00 GiB): large 1" in (description or "")
    assert "has no place. Fix: " in (description or "")
    assert not {element.tag.removeprefix(SVG) for element in root.iter()} & {
        "script",
        "image",
        "foreignObject",
        "a",
        "use",
    }
    assert not re.findall(r"(?:href|src|on\w+)=|@import|url\((?!#)", text)
    assert "prefers-color-scheme:dark" in text
    assert "\x1b" not in text


def test_the_svg_shows_the_same_bars_as_the_terminal() -> None:
    """Each block has its share of the bar, in whole pixels, and says its figure; the fix is there as it is printed."""
    plan = mixed()
    root, chart = drawn(plan), chart_of(plan)
    rectangles = [
        (rectangle.get("class"), int(rectangle.get("width", "0")))
        for group in root.iter(f"{SVG}g")
        for rectangle in group.findall(f"{SVG}rect")
        if rectangle.get("class") != "hatch"
    ]
    expected = []
    for bar in chart.bars:
        widths = cells([block.figure.bytes for block in bar.blocks], round(bar.length * INNER))
        expected += [(block.kind.replace("_", "-"), width) for block, width in zip(bar.blocks, widths, strict=True)]
    assert rectangles == expected
    texts = " ".join(" ".join(element.itertext()) for element in root.iter(f"{SVG}text"))
    assert f"fix: {chart.problems[0].fixes[0].text}" in texts
    assert "<b>&\N{REPLACEMENT CHARACTER}[31m has no place" in texts
    hatched = [rectangle for rectangle in root.iter(f"{SVG}rect") if rectangle.get("class") == "hatch"]
    assert len(hatched) == sum(block.figure.certainty == "guessed" for bar in chart.bars for block in bar.blocks)


def test_fixes_that_belong_together_are_set_apart() -> None:
    """Two models share a card only if both say so, in the terminal and in the picture."""
    plan = planned([small(name, max_model_len=32768) for name in "ab"], "A100-80GB")
    text = text_of(plan)
    joint = text[text.index("── ALL MODELS FIT WITH ──") :]
    assert "    a: num_gpus: 0.5\n        loses 50% of a card, which other models may take; gains: a fits " in joint
    assert "    b: num_gpus: 0.5\n" in joint
    assert "gains: b fits " in joint
    texts = " ".join(" ".join(element.itertext()) for element in drawn(plan).iter(f"{SVG}text"))
    assert "All models fit with a: num_gpus: 0.5 loses 50% of a card" in texts


def test_svg_is_written_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the plan does not fit. What cannot be written exits 2 and leaves nothing behind."""
    file, folder = tmp_path / "plan.svg", tmp_path / "folder"
    folder.mkdir()
    arguments = ["plan", "--model", "serve-app/demo", "--gpus", "8GiB", "--svg"]
    assert main([*arguments, str(file)]) == 0
    assert file.read_text().startswith("<svg ")
    assert f"The picture is in {file}." in capsys.readouterr().err
    assert main([*arguments, str(folder)]) == 2
    assert main([*arguments, str(tmp_path / "none" / "plan.svg")]) == 2
    assert f"there is no folder {tmp_path / 'none'}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "plan.svg"]


def test_the_picture_in_the_docs_is_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make picture` would draw the same one."""
    monkeypatch.setenv("SERVE_APP_CACHE", str(tmp_path))
    monkeypatch.chdir(ROOT)
    target = tmp_path / "plan.svg"
    assert main(["plan", "docs/images/plan.yaml", "--gpus", "RTX3090,RTX3090,RTX3080", "--svg", str(target)]) == 1
    capsys.readouterr()
    assert target.read_text() == (ROOT / "docs/images/plan.svg").read_text()


def test_a_page_is_what_rich_prints() -> None:
    """No markup is read in names, and long lines are left to the terminal."""
    out = io.StringIO()
    console = Console(file=out, width=100, highlight=False)
    for line in page(planned([small("[red]x[/red]")], "24GiB"), 100):
        console.print(line, soft_wrap=True)
    assert "[red]x[/red]: vllm" in out.getvalue()


def test_a_message_that_names_its_cure_is_not_contradicted() -> None:
    """Without a GPU, the cure is to use the CPU, and no smaller change is missing."""
    host = Inventory((Device("n1", None, "memory", 64 * GIB, 64 * GIB),))
    made = planned([small(max_memory={0: "3GB"}, infer_backend="pt")], host)
    lines = text_of(made, 120)
    assert "there is no GPU. Set device: cpu and leave out max_memory to run it on the CPU." in lines
    assert "No small change" not in lines
