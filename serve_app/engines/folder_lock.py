"""Locks a folder for as long as its process lives, so that others can tell it from one that a killed process left."""

import fcntl
import os
from pathlib import Path


def lock_folder(folder: Path) -> int:
    """Returns a descriptor of a folder that is now locked, which no other program that is started inherits. Raises
    OSError if another process has locked it, if it is a link, or if another user owns it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to another user")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
