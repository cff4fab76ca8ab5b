"""Reads how much memory this process and its neighbours in the same container may take of the host."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

PROC_CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# These are the files of a limit: in the single tree of cgroups v2, and in the tree of the controller "memory" of v1.
LIMIT_V2, LIMIT_V1 = "memory.max", "memory.limit_in_bytes"
# By the file of a limit: the file with what is used, and the line of memory.stat with the files that may be dropped.
USED = {LIMIT_V2: ("memory.current", "inactive_file"), LIMIT_V1: ("memory.usage_in_bytes", "total_inactive_file")}


def host_memory_bytes(own: Path = PROC_CGROUP, tree: Path = CGROUPS) -> int:
    """Returns the bytes of the host's memory, or the least limit of the cgroups of this process if that is less, as in
    a container. `own` names these cgroups and `tree` has their limits, both as in `man 7 cgroups`."""
    total: int = psutil.virtual_memory().total
    return min([total, *(limit for limit, _, _ in _limits(own, tree))])


def container_memory(host_bytes: int, own: Path = PROC_CGROUP, tree: Path = CGROUPS) -> tuple[int, int] | None:
    """Returns the limit and the use, in bytes, of the cgroup that limits this process most, or None if none limits it
    to less than `host_bytes` or its use cannot be read. Cached files that the kernel may drop do not count as used."""
    limits = [found for found in _limits(own, tree) if found[0] < host_bytes]
    if not limits:
        return None
    limit, group, name = min(limits, key=lambda found: found[0])
    current, droppable = USED[name]
    try:
        used = int((group / current).read_text())
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = {line[0]: int(line[1]) for line in lines if len(line) == 2}
    except (OSError, ValueError):
        return None
    return limit, max(0, used - files.get(droppable, 0))


def _limits(own: Path, tree: Path) -> Iterator[tuple[int, Path, str]]:
    """Yields the limits that can be read, which are none without cgroups, each with its group's folder and the name of
    its file. A group's parents limit it too."""
    for folder, name in _folders(own, tree):
        # A container may see its own group as the root, under the path that the host knows, so that is looked at too.
        for place in (folder, *folder.parents):
            if place.is_relative_to(tree):
                with suppress(OSError, ValueError):  # "max" is no limit.
                    yield int((place / name).read_text()), place, name


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
