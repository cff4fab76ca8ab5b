"""Reads what a model's folder holds of code, on which the answers of engines depend."""

import os
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from stat import S_ISREG

# The code of a model asks for the files of its processor by these names.
PROCESSOR_FILES = frozenset({"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"})
# A model's code is some files of some kilobytes. Of what goes beyond, only names, sizes and times are read.
MOST_FILES = 1000
MOST_FILE_BYTES = 8 * 2**20


def code_digest(folder: Path) -> str:
    """Returns a text that changes when a Python file of the folder or a file of its processor does.

    Raises OSError for a file that cannot be read.
    """
    digest = sha256()
    for number, file in enumerate(sorted(islice(_files(folder), 10 * MOST_FILES))):
        digest.update(f"{file.relative_to(folder)}\0".encode(errors="surrogateescape"))
        state = file.stat() if file.exists() else file.lstat()
        if number < MOST_FILES and state.st_size <= MOST_FILE_BYTES and S_ISREG(state.st_mode):
            digest.update(sha256(file.read_bytes()).digest())
        else:
            digest.update(f"{state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".py") or name in PROCESSOR_FILES:
                yield Path(place) / name
