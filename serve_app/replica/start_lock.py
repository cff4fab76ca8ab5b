"""Lets one engine at a time start on a GPU, because what is free is read, compared and taken, and must not change.

A lock is `flock` on a file for each GPU of the machine. The kernel frees it when its holder dies, however it dies, and
no program that the holder starts inherits it. Containers that share a GPU share no lock unless they share the folder.
Several GPUs are locked in one order everywhere, so there is no deadlock.

The files are in /tmp itself, since all users of the machine share its GPUs. A folder below it would belong to the first
user, and the owner of a folder may replace what is in it, whatever its mode.
"""

import asyncio
import fcntl
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

from serve_app.errors import EngineError

FOLDER = Path("/tmp")  # noqa: S108
PREFIX = "serve-app-start-lock-"
# A large model loads for minutes, and several may wait before this one.
TIMEOUT_S = 1800.0
LOOK_AGAIN_S, TELL_EVERY_S = 0.2, 30.0


@asynccontextmanager
async def starting_alone(
    gpus: Sequence[str],
    tell: Callable[[str], None],
    timeout_s: float = TIMEOUT_S,
    folder: Path = FOLDER,
) -> AsyncIterator[None]:
    """Holds the locks of these GPUs, which are named by UUID or by any other name on this machine. `tell` reports a
    wait.

    Raises EngineError after `timeout_s` seconds, which names the holder of the lock. Serve then tries the start again.
    """
    ends = time.monotonic() + timeout_s
    with ExitStack() as held:
        for gpu in sorted(set(gpus)):
            file = _open(folder, gpu)
            held.callback(os.close, file)  # This also frees the lock.
            await _lock(file, gpu, tell, ends, timeout_s)
            os.ftruncate(file, 0)
            os.pwrite(file, f"pid {os.getpid()}".encode(), 0)
        yield


async def _lock(file: int, gpu: str, tell: Callable[[str], None], ends: float, timeout_s: float) -> None:
    told = float("-inf")
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = os.pread(file, 100, 0).decode(errors="replace") or "another engine"
        now = time.monotonic()
        if now > ends:
            raise EngineError(f"{holder} has held the start lock of GPU {gpu} for {timeout_s:g} s. Stop it, or wait.")
        if now - told > TELL_EVERY_S:
            told = now
            tell(f"waiting for another engine that starts on GPU {gpu} ({holder})")
        await asyncio.sleep(LOOK_AGAIN_S)


def _open(folder: Path, gpu: str) -> int:
    """Returns the lock file. Raises EngineError if another user could have put something else in its place."""
    path = folder / (PREFIX + "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in gpu))
    try:
        inside = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _require_safe(inside, folder)
            file = _open_or_create(path.name, inside)
        finally:
            os.close(inside)
    except OSError as error:
        raise EngineError(f"The start lock {path} cannot be opened: {error.strerror}.") from None
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:  # Our text would be written into another file.
        os.close(file)
        raise EngineError(f"The start lock {path} is not a plain file with one name. Remove it.")
    if status.st_uid == os.getuid():
        os.fchmod(file, 0o666)  # The umask may have removed some of these rights.
    return file


def _require_safe(inside: int, folder: Path) -> None:
    """Raises EngineError for a folder in which another user may replace our files."""
    status = os.fstat(inside)
    if status.st_uid not in (0, os.getuid()):
        raise EngineError(
            f"The start lock's folder {folder} belongs to user {status.st_uid}, who may replace the locks of others. "
            "It must belong to root."
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
        raise EngineError(
            f"The start lock's folder {folder} lets everyone replace everyone's files. Set its sticky bit: "
            f"chmod +t {folder}."
        )


def _open_or_create(name: str, folder: int) -> int:
    """Returns the file `name` in the open `folder`. It does not follow a link in its place.

    O_CREAT alone does not work: the kernel refuses it for a file of another user there (fs.protected_regular).
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    while True:
        try:
            return os.open(name, flags, dir_fd=folder)
        except FileNotFoundError:
            with suppress(FileExistsError):  # Another process was faster.
                return os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder)
