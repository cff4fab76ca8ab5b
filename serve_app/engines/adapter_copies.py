"""Keeps files of LoRA adapters that nobody else changes: copies of versions that an engine reads again later, and
adapters that were written anew. They lie in a temporary folder of this process, which ends with it."""

import fcntl
import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

from serve_app.errors import AdapterError
from serve_app.facts.adapter import CONFIG, WEIGHTS

# The folders of processes begin like this, and each has a file of this name.
COPIES, LOCK = "serve-app-adapters-", "lock"


class AdapterCopies:
    """Is the folder, which is made at the first use. All of it blocks, and may be called from any thread. Folders of
    processes that have been killed are removed when one is made."""

    def __init__(self) -> None:
        self._made: tuple[Path, IO[bytes]] | None = None
        self._making = threading.Lock()

    @property
    def folder(self) -> Path:
        """Returns where the copies are."""
        with self._making:
            if self._made is None:
                self._made = _own_folder()
            return self._made[0]

    def new(self) -> Path:
        """Returns a new empty folder for one adapter."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def copied(self, folder: Path) -> Path:
        """Returns a folder with copies of an adapter's two files. Raises AdapterError if they cannot be copied."""
        copy = self.new()
        try:
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(folder / name, copy / name)
        except OSError as error:
            remove(copy)
            raise AdapterError(f"{error.filename or folder} cannot be copied: {error.strerror or error}.") from error
        return copy

    def close(self) -> None:
        """Removes all of them."""
        with self._making:
            made, self._made = self._made, None
        if made is not None:
            remove(made[0])
            made[1].close()


def remove(folder: Path | None) -> None:
    """Removes a folder as far as it can be removed, if there is one."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _own_folder() -> tuple[Path, IO[bytes]]:
    """Returns a new folder with a file that this process has locked, and that file. Removes the folders of processes
    that have been killed, whose files nobody has locked any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{COPIES}*"):
        with suppress(OSError), (folder / LOCK).open("rb") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(folder)
    folder = Path(tempfile.mkdtemp(prefix=COPIES))
    # Nobody sees the file before it is locked.
    hidden = folder / f"{LOCK}.new"
    file = hidden.open("wb")
    fcntl.flock(file, fcntl.LOCK_EX)
    hidden.rename(folder / LOCK)
    return folder, file
