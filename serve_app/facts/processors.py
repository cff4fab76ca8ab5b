"""Counts the processors that this process may use."""

import os
from pathlib import Path

# The kernel's files of the group that a container's processes are in, version 2 and 1: a quota in microseconds for each
# period of so many.
QUOTA = Path("/sys/fs/cgroup/cpu.max")
OLD_QUOTA, OLD_PERIOD = (Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))


def own_cpus() -> int:
    """Returns the processors that the scheduler and the limits of a container allow, at least 1."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, round(_quota() or allowed)))


def _quota() -> float | None:
    """Returns the processors' time that the group may use, or None if nothing bounds it."""
    try:
        if QUOTA.exists():
            quota, period = QUOTA.read_text().split()
        else:
            quota, period = OLD_QUOTA.read_text(), OLD_PERIOD.read_text()
        found = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max" means that there is no bound.
        return None
    return found if found > 0 else None
