"""One engine at a time starts on a GPU, and a lock never outlives its holder."""

import asyncio
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import EngineError
from serve_app.facts.gpus import Gpu
from serve_app.replica import deployment
from serve_app.replica.start_lock import FOLDER, PREFIX, starting_alone
from tests.builders import model_config
from tests.replica.start_together import overlaps, start_all


@pytest.mark.slow
def test_eight_engines_on_two_gpus_start_one_after_the_other(tmp_path: Path) -> None:
    """All do in the end, though the first of each GPU is killed in the middle."""
    starts = start_all(8, tmp_path, real=False, timeout_s=50)
    assert len(starts) == 8
    assert not overlaps(starts)
    on_a = [start for start in starts if start["gpu"] == "GPU-a"]
    on_b = [start for start in starts if start["gpu"] == "GPU-b"]
    assert any(a["begun"] < b["ended"] and b["begun"] < a["ended"] for a in on_a for b in on_b)  # Two GPUs at once.


async def test_a_wait_is_told_and_ends_with_who_holds_the_lock(tmp_path: Path) -> None:
    """Serve then tries the start again."""
    told: list[str] = []
    async with starting_alone(["GPU-a", "GPU-b"], told.append, folder=tmp_path):
        with pytest.raises(EngineError, match=f"pid {os.getpid()} has held the start lock of GPU GPU-b for 0.3 s"):
            async with starting_alone(["GPU-b"], told.append, timeout_s=0.3, folder=tmp_path):
                pass
    assert told == [f"waiting for another engine that starts on GPU GPU-b (pid {os.getpid()})"]
    async with asyncio.timeout(1), starting_alone(["GPU-b"], told.append, folder=tmp_path):
        pass


async def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    """The folder is open to all users of the machine."""
    target = tmp_path / "target"
    target.write_text("untouched")
    (tmp_path / f"{PREFIX}GPU-a").symlink_to(target)
    with pytest.raises(EngineError, match="cannot be opened"):
        async with starting_alone(["GPU-a"], print, folder=tmp_path):
            pass
    assert target.read_text() == "untouched"


async def test_another_name_of_a_file_is_not_written_to(tmp_path: Path) -> None:
    """A hard link passes for a plain file, and the lock's holder writes its pid into it. Nor is anything but a file."""
    target = tmp_path / "target"
    target.write_text("untouched")
    (tmp_path / f"{PREFIX}GPU-a").hardlink_to(target)
    os.mkfifo(tmp_path / f"{PREFIX}GPU-b")
    for gpu in ("GPU-a", "GPU-b"):
        with pytest.raises(EngineError, match="is not a plain file with one name"):
            async with asyncio.timeout(5), starting_alone([gpu], print, folder=tmp_path):
                pass
    assert target.read_text() == "untouched"


async def test_a_folder_in_which_others_replace_files_is_refused(tmp_path: Path) -> None:
    """One of another user, one without the sticky bit, and a link to one; the message says what to do."""
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(EngineError, match="cannot be opened: (Not a directory|Too many levels)"):
        async with starting_alone(["GPU-a"], print, folder=tmp_path / "link"):
            pass
    (shared := tmp_path / "shared").mkdir()
    shared.chmod(0o777)
    with pytest.raises(EngineError, match=r"Set its sticky bit: chmod \+t"):
        async with starting_alone(["GPU-a"], print, folder=shared):
            pass
    shared.chmod(0o1777)
    async with starting_alone(["GPU-a"], print, folder=shared):
        pass
    if os.getuid() == 0:
        os.chown(shared, 12345, -1)
        with pytest.raises(EngineError, match="belongs to user 12345"):
            async with starting_alone(["GPU-a"], print, folder=shared):
                pass


def test_the_default_folder_belongs_to_nobody_who_starts_engines() -> None:
    """Root's, and sticky: each user's files stay what they are, and the folder needs no making."""
    status = FOLDER.lstat()
    assert (status.st_uid, status.st_mode & 0o1000) == (0, 0o1000)


async def test_a_replica_holds_the_locks_of_all_its_gpus_while_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before its plan until what it holds was measured. Each rank of vLLM takes one of them."""
    gpus = [Gpu(number, f"GPU-{number}", "card", 2**30, 2**30) for number in range(3)]
    held: dict[str, list[str]] = {}

    async def is_locked(uuid: str) -> bool:
        try:
            async with starting_alone([uuid], lambda _: None, timeout_s=0, folder=tmp_path):
                return False
        except EngineError:
            return True

    async def look(when: str) -> None:
        held[when] = [gpu.uuid for gpu in gpus if await is_locked(gpu.uuid)]

    class Probe:
        """An engine, and a watch of it, that look at the locks when they start."""

        def __init__(self, *_: object):
            pass

        async def start(self, *_: object) -> Any:
            await look("watch" if "engine" in held else "engine")

    async def plan(_: deployment.Model) -> None:
        await look("plan")

    monkeypatch.setattr(deployment, "_gpus", lambda _: gpus)
    monkeypatch.setattr(deployment, "starting_alone", partial(starting_alone, folder=tmp_path))
    monkeypatch.setattr(deployment, "create_engine", Probe)
    monkeypatch.setattr(deployment, "MemoryWatch", Probe)
    monkeypatch.setattr(deployment.Model, "_plan", plan)
    monkeypatch.delattr(deployment.Model, "__del__")  # Serve awaits it.
    replica = deployment.Model.__new__(deployment.Model)
    replica.name, replica._config = "m", model_config(infer_backend="vllm", tensor_parallel_size=3)
    await replica._start(time.monotonic())
    every = [gpu.uuid for gpu in gpus]
    assert held == {"plan": every, "engine": every, "watch": every}
    await look("end")
    assert held["end"] == []
