"""A question about a model with code of its own changes with the code."""

import os
from pathlib import Path

import pytest

from serve_app.facts import model_code
from serve_app.facts.model_code import code_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with code, a module in a folder, and weights."""
    (tmp_path / "inner").mkdir()
    for name in ("configuration_own.py", "inner/layers.py", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / name).write_text("1")
    return tmp_path


@pytest.mark.parametrize("name", ["configuration_own.py", "inner/layers.py", "preprocessor_config.json", "new.py"])
def test_code_and_files_of_the_processor_count(folder: Path, name: str) -> None:
    """Each of them may change what the model is."""
    before = code_digest(folder)
    assert code_digest(folder) == before
    (folder / name).write_text("2")
    assert code_digest(folder) != before


@pytest.mark.parametrize("name", ["model.safetensors", "README.md"])
def test_other_files_do_not_count(folder: Path, name: str) -> None:
    """A download of the weights asks nothing again."""
    before = code_digest(folder)
    (folder / name).write_text("2")
    assert code_digest(folder) == before


def test_a_large_file_counts_by_its_size_and_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan reads a bounded amount."""
    monkeypatch.setattr(model_code, "MOST_FILE_BYTES", 10)
    file = folder / "large.py"
    file.write_text("1" * 100)
    os.utime(file, (1, 1))
    before = code_digest(folder)
    file.write_text("2" * 100)
    assert code_digest(folder) != before
    os.utime(file, (1, 1))
    assert code_digest(folder) == before


def test_what_is_no_regular_file_is_not_read(folder: Path) -> None:
    """A pipe would hold the plan up, and a link may lead nowhere."""
    os.mkfifo(folder / "pipe.py")
    (folder / "lost.py").symlink_to(folder / "nowhere")
    assert code_digest(folder) == code_digest(folder)
