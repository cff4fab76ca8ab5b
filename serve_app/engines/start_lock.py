"""One engine at a time starts on a GPU: what is free is read, compared and taken, and must not move meanwhile.

A lock is `flock` on a file per GPU of the machine. The kernel frees it when its holder dies, however it dies, and no
program that the holder starts inherits it. Containers that share a GPU share no lock, unless they share the folder.
Several GPUs are locked in one order everywhere, so nobody waits in a ring.
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

# For all users of the machine: their engines share its GPUs.
FOLDER = Path("/tmp/serve-app-start-locks")  # noqa: S108
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
    """Holds the locks of these GPUs, by UUID or whatever names them on this machine. `tell` reports a wait.

    Raises EngineError after `timeout_s` seconds, which names who holds the lock; Serve then tries the start again.
    """
    ends = time.monotonic() + timeout_s
    with ExitStack() as held:
        for gpu in sorted(set(gpus)):
            file = _open(folder, gpu)
            held.callback(os.close, file)  # Which also frees the lock.
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
            raise EngineError(f"{holder} has been starting on GPU {gpu} for {timeout_s:g} s. Stop it, or wait.")
        if now - told > TELL_EVERY_S:
            told = now
            tell(f"waits for another engine that starts on GPU {gpu} ({holder})")
        await asyncio.sleep(LOOK_AGAIN_S)


def _open_or_create(path: Path) -> int:
    """Not O_CREAT alone: for a file of another user in such a folder the kernel refuses that (fs.protected_regular)."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            with suppress(FileExistsError):  # Another process was faster.
                return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)


def _open(folder: Path, gpu: str) -> int:
    """The lock file. A link in its place is not followed: the folder is open to all users."""
    name = "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in gpu)
    try:
        if not folder.exists():
            folder.mkdir(exist_ok=True)
            folder.chmod(stat.S_ISVTX | 0o777)
        file = _open_or_create(folder / name)
        if os.fstat(file).st_uid == os.getuid():
            os.fchmod(file, 0o666)  # Whatever the umask was.
        return file
    except OSError as error:
        raise EngineError(f"the start lock {folder / name} cannot be opened: {error.strerror}.") from None
