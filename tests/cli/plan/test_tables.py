"""`--what fits` and `--compare` on pages of every width."""

import json
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


@pytest.mark.parametrize(("gpus", "verdict", "code"), [("8GiB", "1 model does not fit", 1), ("2x80GiB", "fits", 0)])
def test_a_comparison_gives_the_reason_and_the_code_of_the_second_file(
    file: Path, gpus: str, verdict: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one sentence. The first file has no say in the code."""
    demo = tmp_path / "demo.yaml"
    demo.write_text("applications:\n" + FILE[FILE.index("- {name: demo") :])
    assert main(["plan", str(demo), "--gpus", gpus, "--compare", str(file)]) == code
    told = capsys.readouterr().out
    assert verdict in told
    assert bool(re.search(r"does not fit: it needs [\d.]+ GiB more memory than is free\.", told)) == bool(code)
    assert main(["plan", str(file), "--gpus", gpus, "--compare", str(demo)]) == 0


def test_a_way_that_does_not_fit_has_one_sentence_and_the_number_of_its_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`max_memory` decides how many GPUs pt has. Data has the whole reason."""
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "x.yaml"
    path.write_text(
        "applications:\n- {name: m, import_path: 'serve_app.app:model', route_prefix: /models/m, "
        f"args: {{model: '{CONFIGS / 'qwen2-7b'}', infer_backend: pt, max_memory: {{0: 2GB, 1: 3GB}}}}}}\n"
    )
    command = ["plan", str(path), "--gpus", "8GiB,8GiB", "--what", "fits"]
    assert main(command) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(r"m pt 2 does not fit - it needs [\d.]+ GiB more memory than is free\.$", told)
    main([*command, "--json"])
    (way,) = json.loads(capsys.readouterr().out)
    assert "max_memory allows" in way["problem"]
    assert way["missing_bytes"] > 0


def test_a_page_becomes_paragraphs_where_it_is_too_narrow() -> None:
    """Prose may wrap in its column first, and numbers and names may not."""
    prose = "a sentence that may wrap into several lines of its column"
    rows = (("model-a", "12", prose), ("", "3", "n1:0"))
    page = Page(("name", "count", "where"), rows, frozenset({2}), frozenset({1}))
    assert page.fits(7 + 2 + 5 + 2 + 30)
    assert not page.fits(7 + 2 + 5 + 2 + 29)
    assert list(page.lines(200)) == ["model-a", f"  count: 12, where: {prose}", "  count: 3, where: n1:0"]
    assert max(map(len, page.lines(40))) <= 40
