"""The file of measured figures."""

import multiprocessing
from pathlib import Path

import pytest

from serve_app.facts.calibration import Calibration, read_calibrations, setting_key
from serve_app.replica.calibration_writer import write_calibrations

SETTING = {"model": "m", "device": "H100"}


def found(activation: int, context: int | None = None, **setting: object) -> dict[str, Calibration]:
    """One figure by its key."""
    calibration = Calibration({**SETTING, **setting}, activation, context)
    return {setting_key(calibration.setting): calibration}


def test_figures_only_grow_and_settings_stay_apart(tmp_path: Path) -> None:
    """Of two measurements of one setting the larger figures are kept, each."""
    file = tmp_path / "deep" / "calibration.json"
    assert write_calibrations(found(100, 50), file)
    assert not write_calibrations(found(90, 50), file)
    assert write_calibrations(found(80, 60) | found(7, rank="1 of 2"), file)
    assert read_calibrations(file) == found(100, 60) | found(7, rank="1 of 2")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"setting": {}}]', "\x00"])
def test_a_damaged_file_has_no_figures_and_is_written_anew(tmp_path: Path, text: str) -> None:
    """It is only a help."""
    file = tmp_path / "calibration.json"
    assert read_calibrations(file) == {}
    file.write_text(text)
    assert read_calibrations(file) == {}
    assert write_calibrations(found(1), file)
    assert read_calibrations(file) == found(1)


def _write(file: Path, number: int) -> None:
    for size in range(20):
        write_calibrations(found(size, rank=number), file)


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    """Replicas of several models become ready at the same moment."""
    file = tmp_path / "calibration.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(file, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    figures = read_calibrations(file)
    assert {item.setting["rank"]: item.activation_bytes for item in figures.values()} == dict.fromkeys(range(4), 19)
