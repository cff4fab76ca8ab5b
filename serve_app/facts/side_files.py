"""Reads JSON files that may lie beside a model's config.json, in a local folder or on the Hugging Face hub."""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from serve_app.errors import ConfigError
from serve_app.facts.foreign_file import decode_json, read_bytes

# These files have some kilobytes. A tokenizer_config.json may list thousands of special tokens.
MOST_SIDE_BYTES = 8 * 2**20

# It returns the path of a file of the model by its name, or None if the model has no such file.
Find = Callable[[str], Path | None]


def in_folder(folder: Path) -> Find:
    """Returns how files of a local folder are found. A name that leaves the folder is a ConfigError."""
    return lambda name: folder / inner_path(name) if os.path.lexists(folder / inner_path(name)) else None


def on_hub(model: str, revision: str | None, is_reachable: Callable[[], bool]) -> Find:
    """Returns how files of a model on the hub are found: in the hub's cache, or else by a download of the file, if
    `is_reachable` says that the hub answers. A file that cannot be asked for counts as missing."""

    def find(name: str) -> Path | None:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError

        inner = str(inner_path(name))
        cached = try_to_load_from_cache(model, inner, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        if cached is not None or not is_reachable():  # The cache knows that there is none.
            return None
        try:
            return Path(hf_hub_download(model, inner, revision=revision))
        except (EntryNotFoundError, OSError):  # The hub's own errors are OSErrors.
            return None

    return find


def inner_path(name: str) -> PurePosixPath:
    """Returns the path of a file within a model. Raises ConfigError for one that leaves the model's folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ConfigError(f"model: the file {name[:100]!r} is not in the model's folder.")
    return path


def read_side_file(find: Find, name: str) -> Any:
    """Returns the decoded JSON of a file, or None if the model has none of this name. Raises ConfigError for a file
    that cannot be read."""
    file = find(name)
    if file is None:
        return None
    content = read_bytes(file, MOST_SIDE_BYTES)
    try:
        return decode_json(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"model: {file} is not readable JSON: {error}.") from None
