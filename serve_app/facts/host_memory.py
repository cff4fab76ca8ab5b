"""Reads how much memory this process and its neighbours in the same container may take of the host."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

PROC_CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# These are the files of a limit: in the single tree of cgroups v2, and in the tree of the controller "memory" of v1.
LIMIT_V2, LIMIT_V1 = "memory.max", "memory.limit_in_bytes"


def host_memory_bytes(own: Path = PROC_CGROUP, tree: Path = CGROUPS) -> int:
    """Returns the bytes of the host's memory, or the least limit of the cgroups of this process if that is less, as in
    a container. `own` names these cgroups and `tree` has their limits, both as in `man 7 cgroups`."""
    total: int = psutil.virtual_memory().total
    return min([total, *_limits(own, tree)])


def _limits(own: Path, tree: Path) -> Iterator[int]:
    """Yields the limits that can be read, which are none without cgroups. A group's parents limit it too."""
    for folder, name in _folders(own, tree):
        # A container may see its own group as the root, under the path that the host knows, so that is looked at too.
        for place in (folder, *folder.parents):
            if place.is_relative_to(tree):
                with suppress(OSError, ValueError):  # "max" is no limit.
                    yield int((place / name).read_text())


def _folders(own: Path, tree: Path) -> Iterator[tuple[Path, str]]:
    """Yields the folders of the cgroups that limit memory, each with the name of the limit's file."""
    lines: list[str] = []
    with suppress(OSError):
        lines = own.read_text().splitlines()
    for line in lines:  # A line has a number, controllers and a path: "0::/a/b" in v2 and "4:memory:/a/b" in v1.
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        inside = path.strip("/")
        if number == "0" and not controllers:
            yield tree / inside, LIMIT_V2
        elif "memory" in controllers.split(","):
            yield tree / "memory" / inside, LIMIT_V1
