"""Files that commands write: whole or not at all, with no way for others to choose where the text goes."""

import stat
from pathlib import Path

import pytest

from serve_app.cli import output_file
from serve_app.cli.output_file import write_file
from serve_app.errors import ConfigError


def mode(file: Path) -> int:
    """Its permissions."""
    return stat.S_IMODE(file.stat().st_mode)


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    """So is the one that a link names. A new file has the mode of any other new file."""
    file, link, usual = tmp_path / "x", tmp_path / "link", tmp_path / "usual"
    usual.touch()
    write_file(file, "a")
    assert mode(file) == mode(usual)
    file.chmod(0o640)
    link.symlink_to(file)
    write_file(link, "ä")
    assert (file.read_text(encoding="utf-8"), mode(file), link.is_symlink()) == ("ä", 0o640, True)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["link", "usual", "x"]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if somebody could guess its name."""
    monkeypatch.setattr(output_file.secrets, "token_hex", lambda _: "guessed")
    other = tmp_path / "other"
    other.write_text("theirs")
    (tmp_path / ".x.guessed.new").symlink_to(other)
    with pytest.raises(ConfigError):
        write_file(tmp_path / "x", "mine")
    assert other.read_text() == "theirs"
    assert not (tmp_path / "x").exists()


def test_the_temporary_name_is_another_one_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So nobody can put something in its place beforehand."""
    names: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (names.append(self.name), replace(self, target))[1])
    for _ in range(2):
        write_file(tmp_path / "x", "a")
    assert len(set(names)) == 2


def test_a_race_for_the_name_is_lost_with_an_error(tmp_path: Path) -> None:
    """The file that somebody made meanwhile stays, and no temporary one does."""
    file = tmp_path / "x.yaml"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="this file exists already"):
        write_file(file, "theirs", replace=False)
    assert file.read_text() == "mine"
    with pytest.raises(ConfigError, match="No such file"):
        write_file(tmp_path / "no" / "x.yaml", "a", replace=False)
    with pytest.raises(ConfigError, match="not a regular file"):
        write_file(tmp_path, "a")
    assert list(tmp_path.iterdir()) == [file]
