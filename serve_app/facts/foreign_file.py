"""Reads files that others wrote, such as a model's config.json, without trusting their kind, their size or their form.

Three laws hold for every file that is read here. Only a regular file is opened, so a pipe never blocks and a device
never runs on without an end. No more bytes are read than the caller allows. What cannot be decoded is a ConfigError
that names the file.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from serve_app.errors import ConfigError
from serve_app.facts.field_kind import shown

# A whole number with more digits than this is read as a float, because Python's own conversion has a limit (4300) whose
# error does not name the field. The checks of fields refuse such a number.
MOST_DIGITS = 64
# In a longer file, what is wrong may be said without the field, because naming it takes a second, slower reading.
MOST_DIAGNOSED_BYTES = 8 * 2**20


class FileMissing(ConfigError):
    """There is no file of this name."""


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading, through symbolic links, which the hub's cache uses.

    Raises FileMissing if there is none, and ConfigError if it is a folder, a pipe or a device, or cannot be read.
    """
    try:
        number = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FileMissing(f"model: {file} does not exist.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {file} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if not stat.S_ISREG(mode := os.fstat(number).st_mode):
        os.close(number)
        raise ConfigError(f"model: {file} is {_kind(mode)}; a regular file is needed.")
    with os.fdopen(number, "rb") as stream:
        try:
            yield stream
        except OSError as error:
            raise ConfigError(f"model: {file} cannot be read: {error.strerror or error}.") from None


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"


def read_bytes(file: Path, most: int) -> bytes:
    """Returns the bytes of a regular file. Raises ConfigError, also if there are more than `most` bytes."""
    with opened(file) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ConfigError(f"model: {file} has more than {most} bytes, which is the most that is read of such a file.")
    return content


def read_object(file: Path, most: int) -> Mapping[str, Any]:
    """Returns the JSON object in a file of at most `most` bytes. Raises ConfigError that names the file and the
    place."""
    return object_of(read_bytes(file, most), file)


def object_of(content: bytes, file: Path) -> Mapping[str, Any]:
    """Returns the JSON object that a file's bytes are. Raises ConfigError as `read_object` does."""
    try:
        found = decode_json(content)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"model: {file} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}."
        ) from None
    except RecursionError:
        raise ConfigError(f"model: {file} is not readable JSON: its lists and objects are nested too deep.") from None
    except ValueError as error:
        raise ConfigError(f"model: {file} is not readable JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"model: {file} holds {shown(found)}; a JSON object is needed.")
    return found


def decode_json(content: bytes) -> Any:
    """Returns what JSON says. Raises ValueError or RecursionError, which means that it is nested too deep.

    `NaN` and `Infinity` are read as Python writes them, because files of working models have them in fields that do not
    matter here. A key that an object has twice is refused, unless both values are equal.
    """
    return json.loads(content.decode("utf-8"), object_pairs_hook=_object, parse_int=_whole)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for name, value in pairs:
            if repr(found[name]) != repr(value):
                raise ValueError(f"the key {json.dumps(name[:60])} appears twice with different values")
    return found


def _whole(text: str) -> int | float:
    return int(text) if len(text) <= MOST_DIGITS else float(text)
