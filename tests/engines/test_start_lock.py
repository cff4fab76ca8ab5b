"""One engine at a time starts on a GPU, and a lock never outlives its holder."""

import asyncio
import os
from pathlib import Path

import pytest

from serve_app.engines.start_lock import starting_alone
from serve_app.errors import EngineError
from tests.engines.start_together import overlaps, start_all


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
        with pytest.raises(EngineError, match=f"pid {os.getpid()} has been starting on GPU GPU-b for 0.3 s"):
            async with starting_alone(["GPU-b"], told.append, timeout_s=0.3, folder=tmp_path):
                pass
    assert told == [f"waits for another engine that starts on GPU GPU-b (pid {os.getpid()})"]
    async with asyncio.timeout(1), starting_alone(["GPU-b"], told.append, folder=tmp_path):
        pass


async def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    """The folder is open to all users of the machine."""
    target = tmp_path / "target"
    target.write_text("untouched")
    (tmp_path / "GPU-a").symlink_to(target)
    with pytest.raises(EngineError, match="cannot be opened"):
        async with starting_alone(["GPU-a"], print, folder=tmp_path):
            pass
    assert target.read_text() == "untouched"
