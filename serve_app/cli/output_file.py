"""Writes the files that a command is asked to write."""

import os
import secrets
import stat
from pathlib import Path

from serve_app.errors import ConfigError


def require_folder(target: Path) -> None:
    """Raises ConfigError if the folder of a file that is to be written does not exist, or if it cannot be written.

    A command calls it before it works for long. `write_file` has the last word.
    """
    folder = target.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{target}: there is no folder {folder}. Make it first, or name another file.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{target}: the folder {folder} cannot be written. Name another file.")


def write_file(target: Path, text: str, replace: bool = True) -> None:
    """Writes a text file as a whole or not at all, so that a reader sees the old file or the new one.

    A link is followed, and the file that is replaced keeps its mode. Raises ConfigError if the file cannot be written,
    is not a regular file, or exists already without `replace`.
    """
    try:
        file = target.resolve() if replace else target
        mode = stat.S_IMODE(file.stat().st_mode) if replace and file.exists() else None
        if mode is not None and not file.is_file():
            raise ConfigError(f"{target}: it is not a regular file. Name another one.")
        # Others may write into the folder, so the name cannot be guessed, and "x" follows no link.
        new = file.with_name(f".{file.name[:100]}.{secrets.token_hex(8)}.new")
        try:
            with new.open("x", encoding="utf-8") as stream:
                if mode is not None:
                    os.fchmod(stream.fileno(), mode)
                stream.write(text)
            if replace:
                new.replace(file)
            else:
                os.link(new, file)  # Unlike a rename, it fails if somebody has made the file meanwhile.
        finally:
            new.unlink(missing_ok=True)
    except FileExistsError:
        raise ConfigError(f"{target}: this file exists already. Name another, or give --force to replace it.") from None
    except (OSError, RuntimeError) as error:  # A RuntimeError means links in a circle.
        raise ConfigError(f"{target}: {getattr(error, 'strerror', None) or error}.") from None
