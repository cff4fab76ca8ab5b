"""`serve-app new-key`."""

import re
from pathlib import Path

import pytest

from serve_app.access.keys import KeyRing, read_keys
from serve_app.cli.main import main


def test_a_new_key_opens_what_its_entry_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The entry below `keys:` is a keys file, and the key of stderr is found in it."""
    assert main(["new-key", "team-a"]) == 0
    out, err = capsys.readouterr()
    key = re.search(r"^sk-[A-Za-z0-9_-]{43}$", err, re.MULTILINE)
    assert key is not None
    assert key[0] not in out
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n" + out)
    assert KeyRing(read_keys(file, {})).find(b"Bearer " + key[0].encode()).name == "team-a"


def test_every_key_is_another(capsys: pytest.CaptureFixture[str]) -> None:
    """Two calls, two keys."""
    main(["new-key", "a"])
    first = capsys.readouterr().err
    main(["new-key", "a"])
    assert capsys.readouterr().err != first


def test_a_name_that_the_file_would_refuse_is_refused_here(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and no key."""
    assert main(["new-key", "team a"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "'team a' cannot be the name of a key: it must be 1 to 64 letters" in err
    assert "sk-" not in err


def test_an_admin_gets_the_role_in_the_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --role the entry has no role, which means a user."""
    assert main(["new-key", "ops", "--role", "admin"]) == 0
    assert main(["new-key", "team-a"]) == 0
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n" + capsys.readouterr().out)
    assert [(key.name, key.is_admin) for key in read_keys(file, {})] == [("ops", True), ("team-a", False)]
