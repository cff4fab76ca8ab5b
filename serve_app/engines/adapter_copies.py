"""Keeps files of LoRA adapters that nobody else changes: copies of versions that an engine reads again later, and
adapters that were written anew. They lie in a temporary folder of this process, which ends with it.

The folder itself is locked, since systemd-tmpfiles, which removes old files of /tmp, leaves out such a folder with all
that is in it. A lock on a file within would not keep it.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from serve_app.engines.folder_lock import lock_folder
from serve_app.errors import AdapterError
from serve_app.facts.adapter import CONFIG, WEIGHTS

# The folders of processes begin like this.
COPIES = "serve-app-adapters-"


class AdapterCopies:
    """Is the folder, which is made at the first use. All of it blocks, and may be called from any thread. Folders of
    processes that have been killed are removed when one is made."""

    def __init__(self) -> None:
        self._made: tuple[Path, int] | None = None
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
            os.close(made[1])


def remove(folder: Path | None) -> None:
    """Removes a folder as far as it can be removed, if there is one."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _own_folder() -> tuple[Path, int]:
    """Returns a new folder that this process has locked, and its descriptor. Removes the folders of processes that have
    been killed, which nobody has locked any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{COPIES}*"):
        with suppress(OSError), _locked(folder):
            remove(folder)
    # Nobody looks for the folder under this name, so it is locked before others see it.
    hidden = Path(tempfile.mkdtemp(prefix=f".{COPIES}"))
    descriptor = lock_folder(hidden)
    return hidden.rename(hidden.with_name(hidden.name.removeprefix("."))), descriptor


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = lock_folder(folder)
    try:
        yield
    finally:
        os.close(descriptor)
