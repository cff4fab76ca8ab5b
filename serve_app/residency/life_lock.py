"""Shows to other processes of a node whether a replica lives, by a lock that the kernel frees when it dies.

Memory of a replica is free only when its engine's processes have ended too. They may end some seconds later, and are
found by a variable of their environment.

The file of the lock says what the replica holds. So the keeper of a new node of Ray, which has another id than the node
that died on this machine, finds what replicas of that one still hold until they have ended.

The files are in /tmp itself, whatever TMPDIR says, since a keeper and its replicas may have different ones.
"""

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from serve_app.errors import EngineError
from serve_app.residency.member import Bytes

# The processes that a replica starts inherit this variable, whose value is the replica's name.
MARK = "SERVE_APP_LEASE_OF"
# A process started at the same time as another one if the two times differ by less than so many seconds.
SAME_START_S = 1.0

Process = tuple[int, float]


@dataclass(frozen=True)
class Holding:
    """This is what the file of a lock says: the replica with its pool and its model, its process, the raylet that has
    started that, and the bytes by device that the replica holds, or is about to take."""

    replica: str
    pool: str
    model: str
    process: Process
    raylet: Process
    lease: Bytes


def this_process() -> Process:
    """Returns the pid of this process, and when it started in seconds since 1970."""
    import psutil

    return os.getpid(), psutil.Process().create_time()


def parent_process() -> Process:
    """Returns the process that has started this one, which is the raylet of a replica's node, or the pid 0 if it cannot
    be seen from here, as from a container of its own."""
    import psutil

    parent = psutil.Process().parent()
    return (0, 0.0) if parent is None else (parent.pid, parent.create_time())


def lock_folder() -> Path:
    """Returns the folder of the locks of this user's replicas on this node, and makes it if there is none."""
    folder = Path("/tmp", f"serve-app-leases-{os.getuid()}")  # noqa: S108
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
        raise EngineError(f"{folder} belongs to user {status.st_uid} or is no folder. Remove it.")
    return folder


class LifeLock:
    """Is held by a replica of a pool from its start to its end."""

    def __init__(self, replica: str, pool: str, model: str, folder: Path | None = None):
        self._path = _path(replica, folder or lock_folder())
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.environ[MARK] = replica
        self._holding = Holding(replica, pool, model, this_process(), parent_process(), {})
        self.hold({})

    def hold(self, lease: Bytes) -> None:
        """Writes down what the replica holds: before it takes more, and after it has freed what it gives back."""
        self._holding = replace(self._holding, lease=dict(lease))
        line = json.dumps(asdict(self._holding)).encode() + b"\n"  # Only the first line counts.
        os.pwrite(self._file, line, 0)
        os.ftruncate(self._file, len(line))

    def release(self) -> None:
        """Says that the replica has ended and holds no memory any more."""
        with suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._file)


def left_behind(pool: str, folder: Path | None = None) -> list[Holding]:
    """Returns what replicas of a pool still hold on this machine though their raylet is dead, so that no keeper of its
    node counts it. It blocks for some milliseconds for each dead replica, whose file it removes if nothing of it lives.
    """
    there = folder or lock_folder()
    found = (holding for path in there.iterdir() if (holding := read_holding(path)) is not None)
    orphans = [
        holding
        for holding in found
        if holding.raylet[0] and not _is_alive(holding.raylet) and lives(holding.replica, holding.process, there)
    ]
    return [holding for holding in orphans if holding.pool == pool and any(holding.lease.values())]


def read_holding(path: Path) -> Holding | None:
    """Returns what a file says, or None if it has been removed or another version has written it."""
    try:
        told = json.loads(path.read_bytes().partition(b"\n")[0])
        told |= {name: (int(told[name][0]), float(told[name][1])) for name in ("process", "raylet")}
        return Holding(**told)
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None


def lives(replica: str, process: Process, folder: Path | None = None) -> bool:
    """Returns whether the replica, which is this process, or a process that it has started lives. It blocks for some
    milliseconds if the replica itself does not."""
    path = _path(replica, folder or lock_folder())
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:  # Whoever tidies /tmp may have removed it.
        return _is_alive(process) or _has_processes(replica)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.utime(file)  # Files that are old are tidied away.
        return True
    finally:
        os.close(file)
    if _has_processes(replica):
        return True
    path.unlink(missing_ok=True)
    return False


def _path(replica: str, folder: Path) -> Path:
    return folder / "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in replica)


def _is_alive(process: Process) -> bool:
    import psutil

    pid, started = process
    with suppress(psutil.Error):
        found = psutil.Process(pid)
        same = abs(found.create_time() - started) < SAME_START_S
        return bool(same and found.status() != psutil.STATUS_ZOMBIE)
    return False


def _has_processes(replica: str) -> bool:
    mark = f"{MARK}={replica}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # It belongs to another user, or has ended meanwhile.
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    return True
    return False
