"""What the lock of a replica shows to other processes, with real processes that die."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve_app.residency.life_lock import LifeLock, left_behind, lives, parent_process, this_process

NOBODY = (2**22 - 1, 1.0)
# A raylet with a replica, which has a process of its own, as vLLM's engine is one. They print their pids.
RAYLET = """
import subprocess, sys
replica = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
replica.wait()
"""
REPLICA = """
import os, subprocess, sys
from pathlib import Path
from serve_app.residency.life_lock import LifeLock
lock = LifeLock("a#b", "default", "chat", Path(sys.argv[1]))
lock.hold({"GPU 0": 12345678})
lock.hold({"GPU 0": 5})
engine = subprocess.Popen(["sleep", "60"])
print(os.getpid(), engine.pid, flush=True)
engine.wait()
"""


def test_a_lock_shows_that_a_replica_lives(tmp_path: Path) -> None:
    """The kernel frees it with its process; one that was never there is dead."""
    lock = LifeLock("a#b/1", "default", "chat", tmp_path)
    assert lives("a#b/1", NOBODY, tmp_path)
    assert not lives("other", NOBODY, tmp_path)
    (file,) = tmp_path.iterdir()
    file.unlink()
    assert lives("a#b/1", this_process(), tmp_path)  # Somebody has tidied the folder.
    assert not lives("a#b/1", NOBODY, tmp_path)
    lock.release()
    again = LifeLock("a#b/1", "default", "chat", tmp_path)
    again.release()
    assert not lives("a#b/1", NOBODY, tmp_path)
    assert not list(tmp_path.iterdir())


def until(is_so: Callable[[], bool]) -> None:
    """Waits for at most ten seconds."""
    ends = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.02)


class Node:
    """A raylet, its replica, and the replica's engine."""

    def __init__(self, folder: Path):
        line = [sys.executable, "-c", RAYLET, REPLICA, str(folder)]
        self.raylet = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        assert self.raylet.stdout is not None
        self.replica, self.engine = map(int, self.raylet.stdout.readline().split())

    def end(self, pid: int) -> None:
        """By SIGKILL, if it is there still."""
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        if pid == self.raylet.pid:
            self.raylet.wait()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """One that runs."""
    found = Node(tmp_path)
    yield found
    for pid in (found.raylet.pid, found.replica, found.engine):
        found.end(pid)
    found.raylet.stdout and found.raylet.stdout.close()


def test_what_a_replica_holds_is_found_once_its_raylet_is_dead(tmp_path: Path, node: Node) -> None:
    """Until the replica and the processes that it has started have ended. Then its file goes too."""
    assert left_behind("default", tmp_path) == []
    node.end(node.raylet.pid)
    (found,) = left_behind("default", tmp_path)
    assert (found.replica, found.model, found.process[0], found.lease) == ("a#b", "chat", node.replica, {"GPU 0": 5})
    assert left_behind("other", tmp_path) == []
    node.end(node.replica)
    until(lambda: not Path(f"/proc/{node.replica}/exe").exists())
    assert [each.replica for each in left_behind("default", tmp_path)] == ["a#b"]
    node.end(node.engine)
    until(lambda: not left_behind("default", tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_lock_that_says_nothing_readable_is_left_alone(tmp_path: Path) -> None:
    """Another version may have written it, or an empty one may be of a replica that starts."""
    for name, text in {"empty": "", "other": '{"replica": "x"}\n', "list": "[1]\n", "cut": '{"replica": '}.items():
        (tmp_path / name).write_text(text)
    assert left_behind("default", tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 4


def test_the_parent_is_the_one_of_this_process() -> None:
    """With the time at which it has started, because a pid is used again."""
    pid, started = parent_process()
    assert pid == os.getppid()
    assert 0 < started <= time.time()
