"""Where the files of adapters lie that only this process changes."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from serve_app.engines import adapter_copies
from serve_app.engines.adapter_copies import AdapterCopies
from serve_app.errors import AdapterError
from tests.lora_folders import adapter

LIVES = """
import time
from serve_app.engines.adapter_copies import AdapterCopies
copies = AdapterCopies()
print(copies.new(), flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary folders are made in that of the test."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_copies_of_a_process_that_was_killed_are_removed(tmp_path: Path) -> None:
    """Those of one that lives stay."""
    process = subprocess.Popen([sys.executable, "-c", LIVES], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    theirs = Path(process.stdout.readline().strip())
    own = AdapterCopies()
    assert own.new().is_dir()
    assert theirs.is_dir()
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    again = AdapterCopies()
    assert again.folder != own.folder
    assert not theirs.parent.exists()
    for each in (own, again):
        folder = each.folder
        assert folder.is_dir()
        each.close()
        assert not folder.exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_folder_itself_is_locked_while_it_is_used() -> None:
    """So that what tidies /tmp leaves it alone, as systemd-tmpfiles does with folders that it cannot lock."""
    copies = AdapterCopies()
    descriptor = os.open(copies.folder, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    copies.close()
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_a_link_with_the_name_of_a_folder_of_copies_is_left_alone(tmp_path: Path) -> None:
    """Others may write in /tmp too."""
    own = adapter(tmp_path / "own")
    (tmp_path / "tmp" / f"{adapter_copies.COPIES}x").symlink_to(own)
    copies = AdapterCopies()
    copies.new()
    assert sorted(file.name for file in own.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    copies.close()


def test_a_copy_has_the_two_files_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    """The message names the file."""
    copies = AdapterCopies()
    folder = adapter(tmp_path / "own")
    copy = copies.copied(folder)
    assert sorted(file.name for file in copy.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(AdapterError, match=r"nowhere/adapter_config\.json cannot be copied: No such file or directory"):
        copies.copied(tmp_path / "nowhere")
    adapter_copies.remove(copy)
    assert list(copies.folder.glob("*/")) == []
    copies.close()
    AdapterCopies().close()  # One that was never used.
