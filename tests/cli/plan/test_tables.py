"""`--what fits` and `--compare` on pages of every width."""

import re
from pathlib import Path

import pytest

from serve_app.cli.main import main
from serve_app.cli.plan.tables import Page
from serve_app.facts.checkpoint import DEMO_MODEL
from tests.planning.model_requests import CONFIGS

LONG = "a-very-long-model-name-of-a-team"
FILE = f"""
applications:
- {{name: {LONG}, import_path: "serve_app.app:model", route_prefix: /models/a,
   args: {{model: "{CONFIGS / "qwen2-7b"}", infer_backend: auto, max_model_len: 4096}}}}
- {{name: demo, import_path: "serve_app.app:model", route_prefix: /models/demo,
   args: {{model: {DEMO_MODEL}, infer_backend: auto}}}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config file with two models, of which one has a long name."""
    path = tmp_path / "x.yaml"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("columns", ["", "200", "80", "60", "1"])
@pytest.mark.parametrize("gpus", ["2xA100-80GB,RTX3090", "8GiB"])
def test_no_word_of_a_table_is_cut(
    file: Path, columns: str, gpus: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line has room on the page, unless one word alone has none, and both tables have the same words as on a
    page that is wide enough."""
    words = {}
    for width in ("400", columns):
        monkeypatch.setenv("COLUMNS", width)
        main(["plan", str(file), "--gpus", gpus, "--what", "fits"])
        told = capsys.readouterr().out
        untitled = re.sub(r"\b(backend|GPUs|longest request|at once|where|model)\b:?", "", " ".join(told.split()))
        words[width] = sorted(untitled.replace(",", " ").split())
        most = max(40, int(columns or 160)) if width == columns else 400
        assert all(len(line) <= most for line in told.splitlines())
        assert LONG in told
        main(["plan", str(file), "--gpus", gpus, "--compare", str(file)])
        told = capsys.readouterr().out
        assert LONG in told
        assert all(len(line) <= most or len(line.split()) <= 2 for line in told.splitlines())
        assert "…" not in told
    assert words["400"] == words[columns]


def test_a_page_becomes_paragraphs_where_it_is_too_narrow() -> None:
    """Prose may wrap in its column first, and numbers and names may not."""
    prose = "a sentence that may wrap into several lines of its column"
    rows = (("model-a", "12", prose), ("", "3", "n1:0"))
    page = Page(("name", "count", "where"), rows, frozenset({2}), frozenset({1}))
    assert page.fits(7 + 2 + 5 + 2 + 30)
    assert not page.fits(7 + 2 + 5 + 2 + 29)
    assert list(page.lines(200)) == ["model-a", f"  count: 12, where: {prose}", "  count: 3, where: n1:0"]
    assert max(map(len, page.lines(40))) <= 40
