"""The report as a page."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from serve_app.cli.tune.charts import HEIGHT, WIDTH, Bar, Dot, bars, frontier, scatter
from serve_app.cli.tune.report import report_page
from serve_app.tuning.verdict import verdict
from tests.cli.tune.builders import ended, setup

VOID = {"meta", "link"}


class Checked(HTMLParser):
    """Notes tags, and fails where one is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens it."""
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Such as a circle."""
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        """Closes it."""
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path: Path) -> str:
    """Of a run that has ended."""
    of = setup(tmp_path)
    trials = ended(of)
    return report_page(of, trials, verdict(of.task.objective, of.task.space, trials))


def test_it_is_whole_and_needs_nothing_else(page: str) -> None:
    """No script, no other host, and no tag that is open at its end."""
    parser = Checked()
    parser.feed(page)
    assert parser.open == []
    assert not parser.tags & {"script", "img", "iframe", "object"}
    assert not re.search(r"https?://", page)


def test_it_says_what_was_found(page: str) -> None:
    """The verdict, all trials, the memory, the points that were cut, and the file."""
    for words in ("num_replicas 2", "1.48 times the score", "measured again", "1.00", "Cut before anything started",
                  "CPUs are asked for, and there are 2", "# tuned: about +", "failed"):  # fmt: skip
        assert words in page
    assert page.count("<circle") == 7


def test_texts_from_outside_are_shown_as_text(page: str) -> None:
    """Such as the error of a start."""
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; no room" in page


def test_the_frontier_has_what_nothing_beats() -> None:
    """More tokens in less time."""
    dots = [Dot(x, y, "", "other") for x, y in ((1, 10), (2, 30), (3, 20), (4, 40), (4, 35))]
    assert [(dot.x, dot.y) for dot in frontier(dots)] == [(1, 10), (2, 30), (4, 40)]


def test_pictures_of_nothing_are_empty() -> None:
    """As after a first start that has failed."""
    assert scatter([], "x", "y") == bars([]) == ""
    assert scatter([Dot(float("inf"), 1, "", "best")], "x", "y") == ""


def test_all_dots_and_bars_are_inside_of_the_picture() -> None:
    """Whatever the values are, with a logarithmic axis too."""
    dots = [Dot(x, y, "<b>", "best") for x in (0.1, 5, 9000) for y in (0.001, 10**6)]
    found = scatter(dots, "x", "y")
    assert all(0 <= float(value) <= WIDTH for value in re.findall(r'cx="([^"]+)"', found))
    assert all(0 <= float(value) <= HEIGHT for value in re.findall(r'cy="([^"]+)"', found))
    assert "<b>" not in found
    drawn = bars([Bar("x" * 200, value, noise, "best") for value, noise in ((5, 0.1), (10, 0.5), (1, float("inf")))])
    assert all(float(value) <= WIDTH for value in re.findall(r' width="([^"]+)"', drawn))
