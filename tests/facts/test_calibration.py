"""Where the file of measured figures lies. tests/replica/test_calibration_writer.py reads and writes it."""

from pathlib import Path

import pytest

from serve_app.facts.calibration import calibration_file


def test_the_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a variable of ours, or the desktop's."""
    monkeypatch.setenv("SERVE_APP_CACHE", str(tmp_path / "own"))
    assert calibration_file() == tmp_path / "own" / "calibration.json"
    monkeypatch.delenv("SERVE_APP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_file() == tmp_path / "serve-app" / "calibration.json"
