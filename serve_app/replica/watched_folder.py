"""Watches a folder of which each subfolder is an adapter, and says which of them are there and complete.

A folder is taken when it has not changed for a while, so one that is still being copied is not, and it is missed when
it has been away for a while, so one that is replaced by a renamed copy is not.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from serve_app.errors import AdapterError
from serve_app.facts.adapter import CONFIG, PICKLED, WEIGHTS, subfolders
from serve_app.model_fields import ADAPTER_NAME, MOST_ADAPTERS

# A folder with all its files is taken after this many seconds without a change, and one that lacks some is reported
# after these. A folder that is away counts as removed after these.
SETTLED_S, INCOMPLETE_S, AWAY_S = 1.0, 10.0, 2.0

# The names of an adapter's files that exist, each with the time of its last change in ns, its bytes and its inode.
Stamp = tuple[tuple[str, int, int, int], ...]


def stamp_of(folder: Path) -> Stamp:
    """Returns what changes when an adapter's files do."""
    found = []
    for name in (CONFIG, WEIGHTS, PICKLED):
        try:
            status = (folder / name).stat()
        except OSError:
            continue
        found.append((name, status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


@dataclass
class _Seen:
    """Is a subfolder as it was seen: its stamp since when, when it was there last, and the stamp that was taken."""

    stamp: Stamp
    since: float
    last: float
    taken: Stamp | None = None


class WatchedFolder:
    """Is the folder of one replica. `tell` gets what is wrong with it, once for each text. `was_read` says whether it
    could be read at least once."""

    def __init__(self, folder: Path, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._folder, self._tell, self._clock = folder, tell, clock
        self._seen: dict[str, _Seen] = {}
        self._told: set[str] = set()
        self.was_read = False

    def look(self, at_once: bool = False) -> Mapping[str, tuple[Path, Stamp]]:
        """Returns the adapters that are there by name, each with its folder and its stamp. It blocks for a moment, and
        is to be called every second. `at_once` takes complete folders as they are, which is for the start. If the
        folder cannot be read, what was there last stays."""
        now = self._clock()
        try:
            found = {path.name: path for path in subfolders(self._folder, MOST_ADAPTERS)}
        except AdapterError as error:
            self._tell_once(str(error))
            return self._taken()
        self.was_read = True
        for name, path in found.items():
            if ADAPTER_NAME.fullmatch(name) is None:
                self._tell_once(f"adapters_folder: {name[:100]!r} is left out, because no adapter may have this name.")
                continue
            stamp = stamp_of(path)
            seen = self._seen.setdefault(name, _Seen(stamp, now, now))
            if seen.stamp != stamp:
                seen.stamp, seen.since = stamp, now
            seen.last = now
            settled_s = 0.0 if at_once else SETTLED_S
            if now - seen.since >= (settled_s if _is_complete(stamp) else INCOMPLETE_S):
                seen.taken = stamp
        self._seen = {name: seen for name, seen in self._seen.items() if now - seen.last < AWAY_S}
        return self._taken()

    def _taken(self) -> Mapping[str, tuple[Path, Stamp]]:
        return {name: (self._folder / name, seen.taken) for name, seen in self._seen.items() if seen.taken is not None}

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._tell(text)


def _is_complete(stamp: Stamp) -> bool:
    names = {name for name, *_ in stamp}
    return CONFIG in names and bool({WEIGHTS, PICKLED} & names)
