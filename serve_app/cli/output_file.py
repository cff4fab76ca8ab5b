"""Writes the files that a command is asked for."""

import os
from contextlib import suppress
from pathlib import Path

from serve_app.errors import ConfigError


def write_file(target: Path, text: str) -> None:
    """Writes a text file as a whole or not at all, so that a reader sees the old file or the new one.

    A link is followed. Raises ConfigError where the file cannot be written, or is no regular file.
    """
    file = target.resolve()
    if file.exists() and not file.is_file():
        raise ConfigError(f"{target}: it is not a regular file. Name another one.")
    new = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(file)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise ConfigError(f"{target}: {error.strerror}.") from None
